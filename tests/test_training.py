"""perturbed.train: its records, its ends, and runs that go on where a checkpoint says."""

import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed import (
    ARS,
    NES,
    PGPE,
    PSO,
    SNES,
    Checkpoints,
    CSVLog,
    Explicit,
    PerturbedModel,
    train,
    training,
)
from perturbed.logs import Log

COMMON = ["step", "evaluations", "seconds"]
STATS = ["mean", "best", "nonfinite", "nonfinite_total"]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def make(kind=NES, seed=0, **options):
    """A small network, its optimizer, and the closure of its mean square."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    perturbed.convert(net, 8, perturbed.Dense() if kind in (NES, ARS) else Explicit())
    pm = PerturbedModel(net, 8, kind in (NES, ARS), sigma=0.1)
    if kind is NES:
        options["optimizer"] = torch.optim.Adam(net.parameters(), 0.05)
    optimizer = kind(pm, **options)
    return net, optimizer, lambda: (pm(pm.replicate(X)) - 1).square().mean(1)


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(net, other):
    for a, b in zip(parameters(net), parameters(other), strict=True):
        assert torch.equal(a, b)


class Kept(Log):
    """Keeps what it is given, and fails if it is not open."""

    def __init__(self):
        self.records, self.is_open, self.opened = [], False, []

    def open(self, optimizer, steps=None):
        assert not self.is_open
        self.is_open = True
        self.opened.append((optimizer.steps, steps))

    def __call__(self, record):
        assert self.is_open
        self.records.append(dict(record))

    def close(self):
        assert self.is_open
        self.is_open = False

    def numbers(self, name):
        return [record[name] for record in self.records if name in record]


# ---- records -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (NES, ["lr", "sigma"]),
        (ARS, ["lr", "sigma"]),
        (SNES, ["lr", "sigma"]),
        (PGPE, ["lr", "sigma"]),
        (PSO, ["best_value", "without_best"]),
    ],
)
def test_a_record_of_every_optimizer(kind, extra):
    _, optimizer, closure = make(kind)
    kept = Kept()
    records = list(train(optimizer, closure, steps=4, log=[kept]))
    assert kept.records == records
    assert not kept.is_open
    assert kept.opened == [(0, 4)]
    for step, record in enumerate(records, 1):
        assert set(record) == {*COMMON, *STATS, "evaluations_per_second", *extra}
        assert all(math.isfinite(number) for number in record.values())
        assert record["step"] == step
        assert record["evaluations"] == step * (16 if kind in (NES, ARS) else 8)
        assert record["evaluations_per_second"] > 0
    stats = optimizer.stats
    assert {name: records[-1][name] for name in STATS} == {name: stats[name] for name in STATS}
    if kind in (NES, ARS):
        assert record["sigma"] == 0.1
        assert record["lr"] == (0.05 if kind is NES else 0.02)
    if kind in (SNES, PGPE):
        assert record["sigma"] == pytest.approx(float(optimizer.std.mean()))


@pytest.mark.parametrize("kind", [NES, PSO])
def test_the_loop_trains_as_steps_do(kind):
    net, optimizer, closure = make(kind)
    for _ in train(optimizer, closure, steps=5):
        pass
    other, optimizer, closure = make(kind)
    for _ in range(5):
        optimizer.step(closure)
    assert_equal(net, other)


def test_a_plain_module_is_trained_too():
    net = nn.Linear(2, 1)
    pso = PSO(net, particles=4)
    records = list(train(pso, lambda net: net.bias.item() ** 2, steps=3))
    assert records[-1]["evaluations"] == 12
    assert records[-1]["best_value"] == pso.best_value


def test_numbers_that_wait_are_read_now_and_then_only(monkeypatch):
    _, nes, closure = make()
    reads = []
    stats = NES.stats.fget
    monkeypatch.setattr(
        NES, "stats", property(lambda self: reads.append(self.steps) or stats(self))
    )
    kept = Kept()
    records = list(train(nes, closure, steps=8, every=3, log=[kept]))
    assert reads == [3, 6, 8]
    assert kept.numbers("step") == [3, 6, 8]
    assert [set(r) for r in records[:2]] == [{*COMMON, "lr"}] * 2
    assert all("mean" in record for record in kept.records)


def test_what_the_body_adds_is_logged():
    _, nes, closure = make()
    kept = Kept()
    for record in train(nes, closure, steps=6, every=3, log=[kept]):
        if record["step"] in (2, 3):
            record["test"] = torch.tensor(0.5)
    assert kept.numbers("step") == [2, 3, 6]
    assert [("test" in r) for r in kept.records] == [True, True, False]


def test_logs_that_measure_come_first_and_a_function_is_a_log():
    class Measure(Log):
        everywhere = True

        def __call__(self, record):
            if record["step"] == 2:
                record["measured"] = 1.0

    _, nes, closure = make()
    seen, printed = Kept(), []
    body = []
    for record in train(nes, closure, 5, every=5, log=[seen, printed.append, Measure()]):
        body.append("measured" in record)
    assert body == [False, True, False, False, False]
    assert seen.numbers("measured") == [1.0]
    assert [record["step"] for record in printed] == [2, 5]


def test_schedulers_step_after_the_record_of_their_rate():
    _, nes, closure = make()
    decay = torch.optim.lr_scheduler.ExponentialLR(nes.optimizer, 0.5)
    rates = [record["lr"] for record in train(nes, closure, steps=3, schedulers=[decay])]
    assert rates == [0.05, 0.025, 0.0125]
    # One that watches the mean: a value that never falls halves the rate after each step.
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(nes.optimizer, factor=0.5, patience=0)
    rates = [r["lr"] for r in train(nes, lambda: torch.ones(16), steps=6, schedulers=[plateau])]
    assert rates == [0.00625, 0.00625, 0.003125]


def test_groups_have_their_own_rates():
    net, nes, closure = make()
    a, b = net[0].parameters(), net[2].parameters()
    nes.optimizer = torch.optim.SGD([{"params": a}, {"params": b, "lr": 0.2}], lr=0.1)
    (record,) = train(nes, closure, steps=1)
    assert (record["lr_0"], record["lr_1"]) == (0.1, 0.2)
    assert "lr" not in record


# ---- ends --------------------------------------------------------------------------------------


class Clock:
    """A clock that a closure moves."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_time_is_up(monkeypatch):
    _, nes, closure = make()
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)

    def slow():
        clock.now += 2.0
        return closure()

    records = []
    for record in train(nes, slow, steps=100, seconds=7.0, every=3):
        clock.now += 1.0  # the body's own time is no time of members
        records.append(record)
    assert [record["seconds"] for record in records] == [2.0, 5.0, 8.0]
    assert records[-1]["evaluations_per_second"] == 16 / 2.0
    assert "mean" in records[-1]


def test_the_last_record_is_whole_when_time_is_up_between():
    _, nes, closure = make()
    kept = Kept()
    (record,) = train(nes, closure, seconds=1e-9, every=10, log=[kept])
    assert "mean" in record
    assert kept.records == [record]


def test_without_an_end_the_loop_is_left_by_break():
    _, nes, closure = make()
    kept = Kept()
    for record in train(nes, closure, log=[kept]):
        record["test"] = 1
        if record["step"] == 3:
            break
    assert not kept.is_open
    assert kept.numbers("test") == [1, 1, 1]


def test_nothing_is_left_to_do():
    _, nes, closure = make()
    list(train(nes, closure, steps=3))
    kept = Kept()
    assert list(train(nes, closure, steps=3, log=[kept])) == []
    assert kept.opened == []


@pytest.mark.parametrize("where", ["closure", "body", "log"])
def test_logs_are_closed_whatever_happens(where, tmp_path):
    net, nes, closure = make()
    first, last = Kept(), Kept()
    checkpoints = Checkpoints(tmp_path, every=2, net=net, nes=nes)

    def fails(at):
        if where == at and nes.steps == (4 if at == "closure" else 5):
            raise OSError("disk full")

    def closure_(old=closure):
        fails("closure")
        return old()

    with pytest.raises(OSError, match="disk full"):  # noqa: PT012 (the loop is what is tested)
        for _ in train(
            nes,
            closure_,
            steps=9,
            log=[first, lambda record: fails("log"), last],
            checkpoints=checkpoints,
        ):
            fails("body")
    assert not first.is_open
    assert not last.is_open
    # A step that is done is saved; one that failed leaves the checkpoint before it.
    newest = checkpoints.files()[0][0]
    assert newest == {"closure": 4, "body": 5, "log": 4}[where]


# ---- resuming ----------------------------------------------------------------------------------


def run(folder, steps, stop=None, every=4, kind=NES):
    """Train with everything; leave the loop after step ``stop``."""
    net, nes, closure = make(kind)
    parts, schedulers = {"net": net, "nes": nes}, []
    if kind is not PSO:
        parts["decay"] = torch.optim.lr_scheduler.ExponentialLR(nes.optimizer, 0.9)
        schedulers.append(parts["decay"])
    checkpoints = Checkpoints(folder / "saved", every=every, **parts)
    log = [CSVLog(folder / "run.csv")]
    for record in train(
        nes, closure, steps, log=log, schedulers=schedulers, checkpoints=checkpoints
    ):
        if stop is not None and record["step"] == stop:
            break
    return net, nes


def rows(folder):
    """The rows of a run's log without its times."""
    header, *lines = [line.split(",") for line in (folder / "run.csv").read_text().splitlines()]
    untimed = [i for i, name in enumerate(header) if "second" not in name]
    return [[line[i] for i in untimed] for line in (header, *lines)]


@pytest.mark.parametrize("kind", [NES, ARS, SNES, PGPE, PSO])
def test_a_run_goes_on_bit_for_bit_with_its_log(tmp_path, kind):
    whole, _ = run(tmp_path / "a", 12, kind=kind)
    run(tmp_path / "b", 12, stop=6, kind=kind)
    resumed, other = run(tmp_path / "b", 12, kind=kind)
    assert other.steps == 12
    assert_equal(whole, resumed)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")) == 13


def test_steps_that_were_lost_are_dropped_from_the_log(tmp_path):
    run(tmp_path / "a", 12)
    run(tmp_path / "b", 6, every=4)
    (tmp_path / "b/saved/step-6.pt").unlink()  # as if the process had died after step 6
    run(tmp_path / "b", 12)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_seconds_go_on(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)

    def seconds(steps):
        net, nes, closure = make()
        checkpoints = Checkpoints(tmp_path, every=2, net=net, nes=nes)

        def slow():
            clock.now += 1.0
            return closure()

        return [r["seconds"] for r in train(nes, slow, steps, checkpoints=checkpoints)]

    assert seconds(3) == [1.0, 2.0, 3.0]
    clock.now += 1000.0
    assert seconds(5) == [4.0, 5.0]
    (tmp_path / "step-5.pt").unlink()
    assert seconds(5) == [5.0]


def test_the_end_is_saved_and_what_the_body_did_is_in_it(tmp_path):
    net, nes, closure = make()
    curve = []
    checkpoints = Checkpoints(tmp_path, every=100, net=net, nes=nes, curve=curve)
    for record in train(nes, closure, steps=3, checkpoints=checkpoints):
        curve.append(record["step"])
    assert [steps for steps, _ in checkpoints.files()] == [3]
    assert checkpoints.resume() == 3
    assert checkpoints.values["curve"] == [1, 2, 3]
    assert set(checkpoints.values["training"]) == {"seconds"}


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got 2.0"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"seconds": 0}, ValueError, "seconds must be finite and greater than 0, got 0"),
        ({"seconds": "1"}, TypeError, "seconds must be a number, got '1'"),
        ({"closure": 3}, TypeError, "closure must be a function or a pool, got int"),
        ({"log": print}, TypeError, "log must be a list, got builtin"),
        ({"log": [3]}, TypeError, "log must hold logs or functions of a record, got 3"),
        ({"log": [CSVLog]}, TypeError, "log must hold logs or functions of a record"),
        ({"schedulers": [3]}, TypeError, "schedulers must hold learning-rate schedulers, got 3"),
        ({"checkpoints": "runs"}, TypeError, "checkpoints must be Checkpoints, got str"),
    ],
)
def test_arguments_are_checked_before_the_first_step(wrong, error, message):
    _, nes, closure = make()
    with pytest.raises(error, match=message):
        train(**{"optimizer": nes, "closure": closure, **wrong})
    with pytest.raises(TypeError, match=r"one of a population .* got Adam"):
        train(nes.optimizer, closure)
    assert nes.steps == 0


def test_checkpoints_must_hold_all_that_a_run_goes_on_from(tmp_path):
    net, nes, closure = make()
    decay = torch.optim.lr_scheduler.ExponentialLR(nes.optimizer, 0.5)

    def refused(message, **parts):
        with pytest.raises(ValueError, match=message):
            train(nes, closure, 3, schedulers=[decay], checkpoints=Checkpoints(tmp_path, **parts))

    refused(r"hold the NES of this run.*got the parts \['decay', 'net'\]", net=net, decay=decay)
    refused("hold the ExponentialLR of this run", net=net, nes=nes)
    refused(r"hold the model.*\['0.weight', '0.bias', '2.weight'\]", nes=nes, decay=decay)
    refused("hold the model", nes=nes, decay=decay, net=nn.Linear(3, 4))
    refused("no part called 'training'", net=net, nes=nes, decay=decay, training=1)
    # A PerturbedModel holds its model.
    parts = {"pm": nes.pm, "nes": nes, "decay": decay}
    list(train(nes, closure, 1, schedulers=[decay], checkpoints=Checkpoints(tmp_path, **parts)))
