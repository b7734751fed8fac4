"""A generation in several forwards is the generation in one."""

import copy
import itertools

import pytest
import torch
from families import FAMILIES
from torch import nn

import perturbed
from perturbed import ARS, NES, PGPE, PSO, SNES, Dense, Explicit, LowRank, PerturbedModel
from perturbed.rl import CartPole, ObservationNorm, rollout

D = 6
CHUNKS = [1, 3, D - 1, D, D + 4]
STEPS = 3


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(4, 6)


def convnet():
    net = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 5)
    )
    return net, torch.randn(3, 6, 4, 4)


def transformer():
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return net, torch.randn(3, 5, 8)


NETS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


class Run:
    """A population that trains for some steps, and what is to be the same of it."""

    def __init__(self, net="mlp", noise=None, antithetic=None, optimizer=NES, **options):
        torch.manual_seed(3)
        net, self.x = NETS[net]()
        self.pm = PerturbedModel(perturbed.convert(net, D, noise), D, antithetic, sigma=0.1)
        if optimizer is NES:
            options = {"optimizer": torch.optim.SGD(net.parameters(), 0.05), **options}
        self.optimizer = optimizer(self.pm, **options)
        self.losses, self.shown, self.generators = [], [], []
        update = self.optimizer._update
        self.optimizer._update = lambda values: (self.losses.append(values.clone()), update(values))

    def loss(self):
        self.shown.append(self.pm.directions)
        return self.pm(self.pm.replicate(self.x)).square().flatten(1).mean(1)

    def train(self, closure=None, steps=STEPS):
        for _ in range(steps):
            self.optimizer.step(closure or self.loss)
        return self

    @property
    def parameters(self):
        return nn.utils.parameters_to_vector(self.pm.model.parameters()).detach()


def assert_same(run, one, bits=True):
    """Losses and parameters of two runs, bit for bit or to rounding."""
    losses, expected = torch.stack(run.losses), torch.stack(one.losses)
    if bits:
        assert torch.equal(losses, expected)
        assert torch.equal(run.parameters, one.parameters)
    else:
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run.parameters, one.parameters, rtol=1e-5, atol=1e-6)


# ---- every family, kind of network and option ----------------------------------------------------


# Families whose kernels sum an output alike however many there are. The others, and convolutions,
# call a BLAS on the rows of a forward, whose order of summation depends on their number; and stored
# noise is dropped with its window, so that the estimate draws it again.
EXACT = [f for f in FAMILIES if f.startswith(("dense", "low", "sparse")) and "stored" not in f]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_network(family, net):
    one = Run(net, FAMILIES[family]).train()
    for chunk in CHUNKS:
        run = Run(net, FAMILIES[family], chunk=chunk).train()
        whole = min(chunk, D)
        assert run.shown == ([whole] * (D // whole) + [D % whole] * (D % whole > 0)) * STEPS
        assert_same(run, one, bits=family in EXACT and net != "convnet")


@pytest.mark.parametrize("antithetic", [None, True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_signs(antithetic, chunk):
    one = Run(antithetic=antithetic).train()
    assert one.losses[0].shape == (1 if antithetic is False else 2, D)
    assert_same(Run(antithetic=antithetic, chunk=chunk).train(), one)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"reuse": 2},
        {"maximize": True},
        {"sigma_schedule": lambda step: 0.1 / (1 + step)},
        {"shaping": "zscore"},
        {"optimizer": ARS, "top": 2},
        {"optimizer": ARS, "reuse": 3, "maximize": True},
    ],
    ids=lambda o: "-".join(map(str, o)),
)
def test_options_of_the_optimizers(options):
    one = Run(**options).train(steps=4)
    for chunk in CHUNKS:
        assert_same(Run(chunk=chunk, **options).train(steps=4), one)


@pytest.mark.parametrize("optimizer", [PSO, SNES, PGPE])
def test_swarms_and_searches(optimizer):
    options = {"noise": Explicit(), "optimizer": optimizer}
    if optimizer is PSO:
        options["reevaluate"] = True
    one = Run(**options).train(steps=4)
    for chunk in CHUNKS:
        run = Run(chunk=chunk, **options).train(steps=4)
        assert max(run.shown) == min(chunk, D)
        assert_same(run, one)


@pytest.mark.parametrize("signs", [1, 2])
def test_rows_that_are_each_members_own(signs):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(signs * 2, D, 6, generator=generator)
    x, y = rows.flatten(0, 1), rows.sum(2).flatten()

    def closure(run):
        return lambda: (run.pm(run.pm.window_rows(x)).mean(1) - run.pm.window_rows(y)).square()

    one = Run(antithetic=signs == 2)
    one.train(closure(one))
    for chunk in CHUNKS:
        run = Run(antithetic=signs == 2, chunk=chunk)
        assert_same(run.train(closure(run)), one, bits=False)


def test_windows_of_rows():
    pm = Run().pm
    x = torch.arange(4 * D * 2).view(4 * D, 2)
    assert pm.window_rows(x) is x
    short = pm.replicate(torch.randn(3, 2))
    with pm.window(2, 3):
        expected = x.view(4, D, 2)[:, 2:5].reshape(12, 2)
        assert torch.equal(pm.window_rows(x), expected)
        part = pm.window_rows(short)
        assert (part.directions, part.shape) == (3, (18, 2))  # still the short form
        assert torch.equal(part.full(), pm.replicate(short.source).full())
        assert pm.first_direction == 2
        with pytest.raises(ValueError, match=r"x must have R \* P rows, P = 6"):
            pm.window_rows(torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"x must have R \* P rows"):
            pm.window_rows(torch.zeros(()))
        with pytest.raises(TypeError, match="x must be a tensor"):
            pm.window_rows([1, 2, 3])
    assert pm.first_direction == 0


def test_ask_windows_tell():
    one = Run().train()
    for chunk in CHUNKS:
        run = Run(chunk=chunk)
        for _ in range(STEPS):
            run.optimizer.ask()
            parts = [run.pm.member_mean(run.loss()) for _ in run.optimizer.windows()]
            run.optimizer.tell(torch.cat(parts, 1))
        assert_same(run, one)


def test_member_values_in_place_of_rows():
    one = Run().train()
    run = Run(chunk=4)
    assert_same(run.train(lambda: run.pm.member_mean(run.loss())), one)


def test_a_resumed_run():
    straight = Run(chunk=4).train(steps=6)
    stopped = Run(chunk=4).train(steps=3)
    resumed = Run(chunk=4)
    resumed.pm.load_state_dict(copy.deepcopy(stopped.pm.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(stopped.optimizer.state_dict()))
    resumed.train(steps=3)
    assert torch.equal(resumed.parameters, straight.parameters)


# ---- noise that is held --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_stored_noise_is_that_of_a_window(chunk):
    run = Run(noise=Dense(storage="stored"), chunk=chunk)
    held = []

    def closure():
        losses = run.loss()
        held.append(sum(layer.held_bytes() for layer in run.pm.layers()))
        return losses

    run.train(closure)
    each = sum(layer.weight.nbytes for layer in run.pm.layers())
    assert held == [each * n for n in run.shown]
    assert sum(layer.held_bytes() for layer in run.pm.layers()) == 0


# ---- what goes wrong -----------------------------------------------------------------------------


class BoomError(Exception):
    pass


@pytest.mark.parametrize("optimizer", [NES, ARS])
def test_an_error_in_the_second_forward_leaves_no_trace(optimizer):
    run, calm = Run(optimizer=optimizer, chunk=2), Run(optimizer=optimizer, chunk=2).train(steps=3)
    run.train(steps=1)
    before = run.parameters.clone(), run.pm.get_extra_state()
    calls = itertools.count()

    def closure():
        if next(calls) == 1:
            raise BoomError
        return run.loss()

    with pytest.raises(BoomError):
        run.optimizer.step(closure)
    assert torch.equal(run.parameters, before[0])
    assert run.pm.get_extra_state() == before[1]
    assert (run.pm.directions, run.pm.first_direction) == (D, 0)
    run.train(steps=2)
    assert_same(run, calm)


def test_a_loop_over_windows_that_is_left():
    run = Run(max_memory="1 GB")
    run.optimizer.ask()
    for _ in run.optimizer.windows():
        break
    assert (run.pm.directions, run.pm.first_direction) == (D, 0)
    assert len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) == 0


def test_signs_must_be_those_of_all_forwards():
    run = Run(chunk=2)
    calls = itertools.count()

    def closure():
        rows = run.pm.replicate(run.x) if next(calls) == 1 else torch.randn(run.pm.directions, 6)
        return run.pm(rows).mean(1)

    before = run.parameters.clone()
    with pytest.raises(ValueError, match="closure must return"):
        run.optimizer.step(closure)
    assert torch.equal(run.parameters, before)


def test_members_must_have_as_many_rows_in_every_forward():
    """Rows of the whole population, where the forward is of a part of it, are somebody else's."""
    run = Run(chunk=4)
    x = torch.randn(4 * D, 6)
    before = run.parameters.clone()
    with pytest.raises(ValueError, match=r"pm\.window_rows\(x\)"):
        run.optimizer.step(lambda: run.pm(x).mean(1))
    assert torch.equal(run.parameters, before)


def test_rows_that_do_not_fit_a_window():
    run = Run(chunk=5)
    with pytest.raises(ValueError, match=r"D = 5 .* all 6 directions, pm\.window_rows\(x\)"):
        run.optimizer.step(lambda: run.pm(torch.randn(2 * D, 6)).mean(1))


def test_rows_replicated_outside_of_the_closure():
    run = Run(chunk=2)
    rows = run.pm.replicate(run.x)
    with pytest.raises(ValueError, match="inside the closure"):
        run.optimizer.step(lambda: run.pm(rows).mean(1))


def test_losses_that_are_not_finite_in_one_window():
    def closure(run):
        def losses():
            values = run.pm.member_mean(run.loss())
            first = run.pm.first_direction
            for d in (1, 4):
                if first <= d < first + run.pm.directions:
                    values[0, d - first] = float("nan")
            return values

        return losses

    one = Run()
    one.train(closure(one))
    run = Run(chunk=2)
    run.train(closure(run))
    assert run.optimizer.stats["nonfinite"] == 2
    assert torch.equal(run.parameters, one.parameters)
    assert run.parameters.isfinite().all()


def test_arguments():
    net = perturbed.convert(nn.Linear(6, 5), D, LowRank(1))
    pm = PerturbedModel(net, D)
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError, match="chunk and max_memory must not both be given"):
        NES(pm, adam, chunk=2, max_memory="1 GB")
    for chunk in (0, -3):
        with pytest.raises(ValueError, match=f"chunk must be at least 1 direction, got {chunk}"):
            NES(pm, adam, chunk=chunk)
    with pytest.raises(TypeError, match=r"chunk must be an int, got 1\.5"):
        NES(pm, adam, chunk=1.5)
    for bad, kind in (("4 XB", ValueError), ("", ValueError), (0, ValueError), (None, None)):
        if kind is not None:
            with pytest.raises(kind, match="max_memory must be"):
                NES(pm, adam, max_memory=bad)
    with pytest.raises(TypeError, match="max_memory must be a number of bytes"):
        NES(pm, adam, max_memory=True)


# ---- episodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", ["common", "pairs", "members"])
def test_rollouts_in_a_closure(seeds):
    """Lanes are rows of a forward: an environment has R * chunk of them."""

    def train(lanes, chunk):
        torch.manual_seed(0)
        policy = perturbed.convert(nn.Linear(4, 2, bias=False), 8)
        pm = PerturbedModel(policy, 8, True, sigma=0.3)
        norm = ObservationNorm(4)
        ars = ARS(pm, lr=0.1, maximize=True, normalizer=norm, chunk=chunk)
        env = CartPole(lanes=lanes)
        shown = []
        for _ in range(3):
            ars.step(
                lambda: (
                    shown.append(pm.directions)
                    or rollout(pm, env, episodes=2, norm=norm, seeds=seeds, max_steps=40).returns
                )
            )
        return policy.weight.detach().clone(), norm.mean.clone(), shown

    weight, mean, _ = train(16, None)
    for lanes, chunk in ((8, 4), (16, 4), (8, 2), (4, 1)):
        chunked, statistics, shown = train(lanes, chunk)
        assert shown == [chunk] * (3 * 8 // chunk)
        assert torch.equal(chunked, weight)
        torch.testing.assert_close(statistics, mean)


def test_an_environment_of_another_size_than_a_window():
    pm = PerturbedModel(perturbed.convert(nn.Linear(4, 2), 8), 8, True)
    ars = ARS(pm, maximize=True, chunk=3)
    env = CartPole(lanes=6)
    with pytest.raises(ValueError, match=r"D = 2 .*population of 8.*got lanes = 6|R = 3"):
        ars.step(lambda: rollout(pm, env, max_steps=5).returns)
