"""max_memory: forwards that grow to the limit, never beyond, and then stay as they are."""

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import perturbed
from perturbed import NES, LowRank, PerturbedModel
from perturbed.memory import PeakMemory
from perturbed.optim import budget as budget_module
from perturbed.optim.budget import Budget

MB = 10**6
ROOT = Path(__file__).resolve().parent.parent

# Bytes of a forward of n directions: proportional, with a part that all share, with a phase of its
# own that directions do not enlarge, and with blocks of directions.
COSTS = {
    "proportional": lambda n: 3 * MB * n,
    "shared part": lambda n: 60 * MB + MB * n,
    "phases": lambda n: max(40 * MB, 5 * MB * n),
    "blocks": lambda n: 8 * MB * -(-n // 8) + MB * n,
    "nothing": lambda n: 0,
}


def generations(budget, cost, count, number):
    """Forwards of some generations, as Evaluation runs them."""
    for _ in range(number):
        done, forwards = 0, []
        while done < count:
            shown = min(budget.chunk, count - done)
            if not budget.settled and shown == budget.chunk:
                budget.learn(shown, cost(shown))
            forwards.append(shown)
            done += shown
        yield forwards


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 1000])
@pytest.mark.parametrize("cost", COSTS)
def test_forwards_grow_to_the_limit_and_stay(cost, count):
    cost, limit = COSTS[cost], 100 * MB
    budget = Budget(limit, count)
    *_, before, last = generations(budget, cost, count, 12)
    assert budget.settled
    assert last == before
    assert sum(last) == count
    assert max(map(cost, last)) <= limit
    largest = max(n for n in range(1, count + 1) if cost(n) <= limit)
    fewest = -(-count // largest)
    # A part that all share makes the last steps to the limit small; they stop when few are saved.
    assert len(last) <= 1 + 1.35 * fewest
    assert max(last) - min(last) <= len(last)  # of equal size, but for the rest


def test_no_forward_exceeds_the_limit_on_the_way():
    for cost in ("proportional", "shared part", "phases", "nothing"):
        for count in (1, 7, 64, 1000):
            for forwards in generations(Budget(100 * MB, count), COSTS[cost], count, 12):
                assert max(map(COSTS[cost], forwards)) <= 100 * MB, cost


def test_a_forward_beyond_the_limit_is_never_tried_again():
    budget = Budget(100, 64)
    for shown, peak in ((2, 2), (16, 160), (10, 100)):
        assert budget.chunk == shown
        budget.learn(shown, peak)
    assert budget.chunk <= 10
    assert budget.settled
    budget.learn(10, 50)  # shorter inputs: no reason to change forwards and their bits
    assert budget.chunk == 10
    budget.learn(10, 200)  # longer ones
    assert (budget.chunk, budget.settled) == (5, False)


def test_one_direction_beyond_the_limit_is_said_once():
    budget = Budget(10, 5)
    budget.learn(2, 40)
    with pytest.warns(UserWarning, match="max_memory is 10 bytes.* one direction alone takes 20"):
        budget.learn(1, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.learn(1, 20)
    assert (budget.chunk, budget.settled) == (1, True)


def test_what_was_learnt_is_saved():
    budget = Budget(100, 64)
    budget.learn(2, 20)
    budget.learn(10, 100)
    state = copy.deepcopy(budget.state())
    assert all(type(v) is int for v in state.values())
    again = Budget(100, 64)
    again.load(state)
    assert again.__dict__ == budget.__dict__
    few = Budget(100, 3)  # a process with a smaller share
    few.load(state)
    assert few.chunk == 3
    other = Budget(101, 64)
    other.load(state)
    assert other.__dict__ == Budget(101, 64).__dict__


# ---- in an optimizer -----------------------------------------------------------------------------


class Run:
    """A population of two-layer networks that trains under a limit."""

    def __init__(self, directions=48, limit="500 KB", **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 4))
        self.pm = PerturbedModel(perturbed.convert(net, directions, LowRank(1)), directions)
        self.x = torch.randn(20, 16)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        self.nes = NES(self.pm, optimizer, max_memory=limit, **options)
        self.shown = []

    def loss(self):
        self.shown.append(self.pm.directions)
        return self.pm(self.pm.replicate(self.x)).square().mean(1)

    def train(self, steps, closure=None):
        for _ in range(steps):
            self.nes.step(closure or self.loss)
        return self

    @property
    def parameters(self):
        return nn.utils.parameters_to_vector(self.pm.model.parameters()).detach()


def test_the_result_is_that_of_one_forward():
    one, run = Run(limit=None).train(5), Run().train(5)
    assert max(run.shown) < 48
    assert torch.equal(run.parameters, one.parameters)


def test_forwards_settle_within_the_limit():
    run = Run().train(5)
    peaks = set()
    for _ in run.nes.windows():
        with PeakMemory(torch.device("cpu")) as memory, torch.no_grad():
            run.loss()
        peaks.add(memory.peak)
    assert max(peaks) <= MB / 2 < 48 * max(peaks) / run.nes.evaluation.chunk
    assert run.shown[-5:] == run.shown[-10:-5]


def test_ask_windows_tell_learns_as_step_does():
    run, other = Run().train(4), Run()
    for _ in range(4):
        other.nes.ask()
        with torch.no_grad():
            parts = [other.pm.member_mean(other.loss()) for _ in other.nes.windows()]
        other.nes.tell(torch.cat(parts, 1))
    assert run.shown == other.shown
    assert torch.equal(run.parameters, other.parameters)


def test_measuring_ends(monkeypatch):
    measured = []

    class Counted(PeakMemory):
        def __enter__(self):
            measured.append(1)
            return super().__enter__()

    monkeypatch.setattr(budget_module, "PeakMemory", Counted)
    monkeypatch.setattr(budget_module, "EVERY", 10)
    run = Run().train(2)
    settled, forwards = len(measured), len(run.shown)
    assert settled < 6
    run.train(10)
    assert len(run.shown) - forwards >= 40
    assert settled + 3 <= len(measured) <= settled + 1 + (len(run.shown) - forwards) // 10


def test_longer_inputs_are_noticed(monkeypatch):
    monkeypatch.setattr(budget_module, "EVERY", 5)
    run = Run().train(3)
    before = run.nes.evaluation.chunk
    run.x = torch.randn(60, 16)
    run.train(4)
    assert run.nes.evaluation.chunk <= -(-before // 2)


@pytest.mark.filterwarnings("ignore:a forward of")
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_forward_that_runs_out_of_memory_is_repeated_with_half(kind):
    one, run = Run(limit=None).train(4), Run(limit="1 GB")
    failed = []

    def closure():
        if run.pm.directions > 7:
            failed.append(run.pm.directions)
            if kind == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            torch.empty(1 << 60)
        return run.loss()

    run.train(4, closure)
    assert failed == [16, 8]  # after 2; then 4, and no more than 4
    assert torch.equal(run.parameters, one.parameters)


def test_memory_that_even_one_direction_does_not_find():
    run = Run(limit="1 GB")
    before = run.parameters

    def closure():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with (
        pytest.warns(UserWarning, match="ran out of memory though max_memory"),
        pytest.raises(torch.OutOfMemoryError, match=r"1 directions? in a forward"),
    ):
        run.nes.step(closure)
    assert torch.equal(run.parameters, before)


def test_a_resumed_run_has_the_same_forwards():
    straight = Run().train(6)
    stopped, resumed = Run().train(3), Run()
    resumed.pm.load_state_dict(copy.deepcopy(stopped.pm.state_dict()))
    resumed.nes.load_state_dict(copy.deepcopy(stopped.nes.state_dict()))
    resumed.train(3)
    assert stopped.shown + resumed.shown == straight.shown
    assert torch.equal(resumed.parameters, straight.parameters)


# ---- what the operating system says --------------------------------------------------------------

PEAK = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    import perturbed

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    torch.manual_seed(0)
    directions = 512
    net = nn.Sequential(nn.Linear(32, 1024), nn.Tanh(), nn.Linear(1024, 8))
    net = perturbed.convert(net, directions, perturbed.LowRank(1))
    pm = perturbed.PerturbedModel(net, directions)
    x = torch.randn(16, 32)
    closure = lambda: pm(pm.replicate(x)).square().mean(1)

    def nes(**options):
        return perturbed.NES(pm, torch.optim.SGD(net.parameters(), 0.1), **options)

    nes(chunk=32).step(closure)  # gradients, thread pools, buffers of the BLAS
    for limit in (sys.argv[1], None):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status("VmRSS")
        optimizer = nes(max_memory=limit and int(limit))
        for _ in range(2):
            optimizer.step(closure)
        print(status("VmHWM") - before, optimizer.evaluation.chunk)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the resident set of Linux"
)
def test_the_process_stays_below_the_limit():
    """glibc's malloc is told to give freed tensors back at once; else it keeps twice as much."""
    limit, slack = 12 * MB, 6 * MB
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(limit)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, chunk, whole, _ = map(int, done.stdout.split())
    assert whole > 10 * limit
    assert taken < limit + slack
    assert 32 <= chunk <= 64


@pytest.mark.parametrize("optimizer", [perturbed.SNES, perturbed.PGPE, perturbed.PSO])
def test_a_resumed_swarm_has_the_same_forwards(optimizer):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
        pm = PerturbedModel(perturbed.convert(net, 48, perturbed.Explicit()), 48)
        return pm, optimizer(pm, max_memory="100 KB")

    def train(pm, swarm, steps):
        x, shown = torch.ones(5, 16), []

        def loss():
            shown.append(pm.directions)
            return pm(pm.replicate(x)).square().mean(1)

        for _ in range(steps):
            swarm.step(loss)
        return shown

    pm, swarm = make()
    train(pm, swarm, 3)
    state = copy.deepcopy((pm.model.state_dict(), swarm.state_dict()))
    again, resumed = make()
    again.model.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    shown = train(pm, swarm, 2)
    assert 2 < max(shown) < 48  # the first forwards have 2: what was learnt matters
    assert train(again, resumed, 2) == shown
    for one, other in zip(pm.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
