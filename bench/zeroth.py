"""Suite ``zeroth``: searches with one loss, after equally many evaluations of three real problems.

digits     scikit-learn's 8 x 8 digits, 512 of them, a network 64-16-10 with tanh; cross entropy
cancer     scikit-learn's breast cancer data, 569 x 30, logistic regression; cross entropy
cartpole   a linear policy of CartPole's 4 observations; minus the mean return of 4 episodes,
           of 200 steps at most

Time is that of an evaluation, everything else of the step included: on a CPU processor time, of all
threads, which other programs do not disturb; the suite runs on one. Rows:

Base       a loss alone, of the parameters as they are
a method   one candidate after the other; gradients are followed by Adam
..., one forward   the same with all candidates of a step in one forward of a PerturbedModel

Losses are of the same data or episodes at every evaluation. ``loss`` is the best that a method saw
within the evaluations of its problem; the start's is in the notes. Settings are those that did well
on digits in a few tries, and the same for all problems: a table of costs, not a ranking.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Options, Result
from bench.timing import Clock
from perturbed import Dense, PerturbedModel, convert
from perturbed.optim import (
    RDSA,
    SPSA,
    GridSearch,
    RandomBestGrad,
    RandomGrad,
    RandomSearch,
    RandomWalk,
    SequentialSearch,
    ShrinkingRandomSearch,
    SimulatedAnnealing,
    ThresholdAccepting,
)
from perturbed.rl import CartPole, rollout

COUNT = 16  # candidates of a step; pairs of SPSA and RDSA
PARTS = 8  # a run is timed in so many parts
EPISODES, MAX_STEPS = 4, 200  # of cartpole

Loss = Callable[[Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, and its loss.

    Attributes:
        name: what tables call it.
        net: at its start.
        loss: of a module, one number; of a PerturbedModel, one for each row or member.
        evaluations: of every method, at most and but for a last step.
    """

    name: str
    net: nn.Module
    loss: Loss
    evaluations: int


# ---- problems ----------------------------------------------------------------------------------


def _classify(x: Tensor, y: Tensor) -> Loss:
    """Cross entropy of a module, or of each row of a PerturbedModel."""

    def loss(net: Any) -> Tensor:
        if isinstance(net, PerturbedModel):
            scores = net(net.replicate(x))
            return F.cross_entropy(scores, net.replicate(y).full(), reduction="none")
        return F.cross_entropy(net(x), y)

    return loss


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def digits(full: bool) -> Problem:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.data[:512]).float() / 16
    loss = _classify(x, torch.from_numpy(data.target[:512]).long())
    net = _seeded(lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
    return Problem("digits", net, loss, 20_000 if full else 3000)


def cancer(full: bool) -> Problem:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.from_numpy(data.data)
    x = ((x - x.mean(0)) / x.std(0)).float()
    loss = _classify(x, torch.from_numpy(data.target).long())
    return Problem("cancer", _seeded(lambda: nn.Linear(30, 2)), loss, 20_000 if full else 3000)


def cartpole(full: bool) -> Problem:
    environments: dict[int, CartPole] = {}

    def loss(net: Any) -> Tensor:
        members = net.directions * net.signs if isinstance(net, PerturbedModel) else 1
        if members not in environments:
            environments[members] = CartPole(members * EPISODES, max_steps=MAX_STEPS)
        returns = rollout(net, environments[members], EPISODES, generation=0).returns
        return -returns if isinstance(net, PerturbedModel) else -returns.mean()

    net = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(net.weight)  # always to the left: the pole falls after 9 steps
    return Problem("cartpole", net, loss, 2000 if full else 200)


PROBLEMS: dict[str, Callable[[bool], Problem]] = {
    "digits": digits,
    "cancer": cancer,
    "cartpole": cartpole,
}

# ---- methods -----------------------------------------------------------------------------------

Make = Callable[[Any, int], Any]  # parameters or a PerturbedModel, steps -> optimizer


def _adam(target: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The target again, which may be an iterator, and Adam on its parameters."""
    if isinstance(target, PerturbedModel):
        return target, torch.optim.Adam(target.model.parameters(), 0.02)
    parameters = list(target)
    return parameters, torch.optim.Adam(parameters, 0.02)


def _best_grad(target: Any, steps: int) -> Any:
    target, adam = _adam(target)
    return RandomBestGrad(target, 1e-2, adam, _count(target))


def _spsa(target: Any, steps: int) -> Any:
    target, adam = _adam(target)
    return SPSA(target, magn=1e-2, n=_count(target), opt=adam)


def _rdsa(target: Any, steps: int) -> Any:
    target, adam = _adam(target)
    return RDSA(target, magn=1e-2, n=_count(target), opt=adam)


def _walk(target: Any, steps: int) -> Any:
    return RandomWalk(target, 0.05, best_of=_count(target), stochastic=False)


def _random_grad(target: Any, steps: int) -> Any:
    target, adam = _adam(target)
    return RandomGrad(target, 1e-2, adam)


def _count(target: Any) -> int | None:
    return None if isinstance(target, PerturbedModel) else COUNT


@dataclasses.dataclass(frozen=True)
class Method:
    """A search.

    Attributes:
        make: parameters or a PerturbedModel, and the steps of the run -> the search.
        cost: evaluations of a step.
        noise: of the layers, for one forward a step; None where there is no such form.
        antithetic: of their sampling.
    """

    make: Make
    cost: int = 1
    noise: Dense | None = None
    antithetic: bool = False


METHODS: dict[str, Method] = {
    "RandomSearch": Method(lambda p, n: RandomSearch(p)),
    "ShrinkingRandomSearch": Method(lambda p, n: ShrinkingRandomSearch(p, 0.3, n)),
    "GridSearch": Method(lambda p, n: GridSearch(p, (-1, 1), 0.5)),
    "SequentialSearch": Method(lambda p, n: SequentialSearch(p, 0.5, (-2, 2))),
    "SimulatedAnnealing": Method(lambda p, n: SimulatedAnnealing(p, 0.03, 0.01)),
    "ThresholdAccepting": Method(lambda p, n: ThresholdAccepting(p, 0.03, 0.01)),
    "RandomWalk, order 2": Method(
        lambda p, n: RandomWalk(p, 0.03, 2, best_of=3, stochastic=False), 4
    ),
    "RandomGrad": Method(_random_grad, 2),
    f"RandomWalk, best of {COUNT}": Method(_walk, COUNT + 1, Dense()),
    f"RandomBestGrad {COUNT}": Method(_best_grad, COUNT + 1, Dense()),
    f"SPSA, {COUNT} pairs": Method(_spsa, 2 * COUNT, Dense("rademacher"), True),
    f"RDSA, {COUNT} pairs": Method(_rdsa, 2 * COUNT, Dense(), True),
}
BATCHED = ", one forward"


# ---- runs --------------------------------------------------------------------------------------


def make_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of one call, of the processor's time where that is what works."""
    if device.type != "cpu":
        return Clock(device)

    def clock(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return clock


def run_method(problem: Problem, name: str, batched: bool, device: torch.device) -> Result:
    """Run one method on one problem, from its start."""
    method = METHODS[name]
    net = copy.deepcopy(problem.net).to(device)
    steps = max(1, problem.evaluations // method.cost)
    if batched:
        if method.noise is None:
            raise ValueError(f"{name} has no form of one forward")
        pm = PerturbedModel(convert(net, COUNT, method.noise), COUNT, method.antithetic)
        search = method.make(pm, steps)
    else:
        search = method.make(net.parameters(), steps)
    target: Any = pm if batched else net
    clock, seconds = make_clock(device), []

    def advance(until: int) -> None:
        while search.evaluations < until:
            search.step(lambda: problem.loss(target))

    # The first steps warm up, and count as evaluations all the same.
    for part in range(PARTS + 1):
        before = search.evaluations
        until = max(before + 1, problem.evaluations * (part + 1) // (PARTS + 1))
        taken = clock(lambda until=until: advance(until))
        if part:
            seconds.append(taken / (search.evaluations - before))
    _check_best(problem, search, net)
    return Result(
        suite="zeroth",
        view="evaluation",
        case=f"{problem.name}, {problem.evaluations:,} evaluations",
        method=name + (BATCHED if batched else ""),
        median_s=statistics.median(seconds),
        min_s=min(seconds),
        max_s=max(seconds),
        repeats=PARTS,
        noise_bytes=0,
        best_loss=search.best_loss,
    )


@torch.no_grad()
def _check_best(problem: Problem, search: Any, net: nn.Module) -> None:
    """Hold the best loss to what the best parameters have."""
    search.load_best()
    again = float(problem.loss(net))
    # A pole that falls a step earlier is what rounding in another order may do.
    near = 1e-4 if problem.name != "cartpole" else 0.3
    if not math.isclose(again, search.best_loss, rel_tol=near, abs_tol=near / 10):
        raise AssertionError(
            f"{type(search).__name__} on {problem.name}: the best point has a loss of {again}, "
            f"not the recorded {search.best_loss}"
        )


def run_base(problem: Problem, device: torch.device) -> Result:
    """The loss alone."""
    net, clock = copy.deepcopy(problem.net).to(device), make_clock(device)
    calls = max(1, problem.evaluations // (PARTS * 10))

    def evaluate() -> None:
        for _ in range(calls):
            float(problem.loss(net))

    with torch.no_grad():
        evaluate()
        seconds = [clock(evaluate) / calls for _ in range(PARTS)]
        start = float(problem.loss(net))
    return Result(
        suite="zeroth",
        view="evaluation",
        case=f"{problem.name}, {problem.evaluations:,} evaluations",
        method="Base",
        median_s=statistics.median(seconds),
        min_s=min(seconds),
        max_s=max(seconds),
        repeats=PARTS,
        noise_bytes=0,
        best_loss=start,
    )


def run(options: Options, problems: list[Problem] | None = None) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    notes = ["zeroth: the loss of row Base is that of the start, of others the best that was seen."]
    if problems is None:
        problems = [make(options.full) for make in PROBLEMS.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(options, problems), notes
    finally:
        torch.set_num_threads(threads)


def _run(options: Options, problems: list[Problem]) -> list[Result]:
    results: list[Result] = []
    for problem in problems:
        options.progress(f"zeroth: {problem.name}")
        of_problem = [run_base(problem, options.device)]
        for name, method in METHODS.items():
            for batched in (False, True) if method.noise is not None else (False,):
                of_problem.append(run_method(problem, name, batched, options.device))
        for result in of_problem:
            result.times_base = result.median_s / of_problem[0].median_s
        results += of_problem
    return results
