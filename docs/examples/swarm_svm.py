"""Tune two numbers of a support vector machine that nobody can differentiate: ``swarm_svm.py``.

log C and log gamma of scikit-learn's SVC on the breast cancer data, scored by the accuracy of a
5-fold cross-validation, which is flat where the machine predicts one class for all. Every method
has 80 evaluations: a swarm of 10 particles in 8 steps, as many uniform draws, and two local methods
of scipy, Nelder-Mead and Powell, from a uniform start of each seed. Local methods see no way out
of the plain, where the accuracy is the share of the larger class, 0.627. That is the point; a
difference of 0.002 between methods that get away from it is one patient in 569 and means nothing.

The search space is a module with two parameters and bounds. PSO needs no more than a Python
function of it; ``--workers`` evaluates particles in as many processes.

    python docs/examples/swarm_svm.py --seeds 3 --workers 2
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from perturbed import PSO
from perturbed.pool import WorkerPool

PARTICLES, STEPS = 10, 8
EVALUATIONS = PARTICLES * STEPS
LOWER, UPPER = (math.log(1e-3), math.log(1e-6)), (math.log(1e3), math.log(1e1))
GOOD = 0.975  # what the machine reaches as it comes, 0.977, rounded down

Score = Callable[[np.ndarray], float]


class Machine(nn.Module):
    """The search space: two numbers."""

    def __init__(self) -> None:
        super().__init__()
        # The centre of the box.
        self.log_c = nn.Parameter(torch.tensor((LOWER[0] + UPPER[0]) / 2, dtype=torch.float64))
        self.log_gamma = nn.Parameter(torch.tensor((LOWER[1] + UPPER[1]) / 2, dtype=torch.float64))


@functools.cache
def load_data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(return_X_y=True)


def accuracy(machine: Machine) -> float:
    """Mean accuracy of five folds."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    svc = SVC(C=math.exp(machine.log_c.item()), gamma=math.exp(machine.log_gamma.item()))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return cross_val_score(make_pipeline(StandardScaler(), svc), *load_data(), cv=folds).mean()


# ---- methods: each returns the score of every evaluation, in order -----------------------------


def swarm(score: Score, seed: int, workers: int = 0) -> list[float]:
    """10 particles, 8 steps, uniform start between the bounds."""
    machine, found = Machine(), []
    bounds = {"log_c": (LOWER[0], UPPER[0]), "log_gamma": (LOWER[1], UPPER[1])}
    pso = PSO(machine, PARTICLES, bounds=bounds, start="uniform", maximize=True, seed=seed)

    def steps(evaluate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _ in range(STEPS):
            values = evaluate(pso.ask())
            pso.tell(values)
            found.extend(values.tolist())

    if workers:
        with WorkerPool(accuracy, machine, workers=workers) as pool:
            steps(pool.evaluate)
    else:
        steps(
            lambda members: torch.tensor([score(m.numpy()) for m in members], dtype=torch.float64)
        )
    return found


def random_search(score: Score, seed: int) -> list[float]:
    draw = np.random.default_rng(seed).uniform(LOWER, UPPER, (EVALUATIONS, 2))
    return [score(point) for point in draw]


def local_search(score: Score, seed: int, method: str) -> list[float]:
    """One of scipy's, held to the box, started anywhere in it."""
    from scipy.optimize import minimize

    found: list[float] = []

    def loss(point: np.ndarray) -> float:
        if len(found) == EVALUATIONS:  # Powell finishes its line searches otherwise
            raise StopIteration
        found.append(score(point))
        return -found[-1]

    start = np.random.default_rng(seed).uniform(LOWER, UPPER)
    try:
        minimize(
            loss,
            start,
            method=method,
            bounds=list(zip(LOWER, UPPER, strict=True)),
            options={"maxfev": EVALUATIONS},
        )
    except StopIteration:
        pass
    return found


METHODS: dict[str, Callable[..., list[float]]] = {
    "PSO 10 x 8": swarm,
    "random search": random_search,
    "Nelder-Mead": functools.partial(local_search, method="Nelder-Mead"),
    "Powell": functools.partial(local_search, method="Powell"),
}


def score_of(point: np.ndarray) -> float:
    machine = Machine()
    with torch.no_grad():
        machine.log_c.fill_(float(point[0]))
        machine.log_gamma.fill_(float(point[1]))
    return accuracy(machine)


# ---- report ------------------------------------------------------------------------------------


def table(results: dict[str, list[list[float]]], seconds: dict[str, float]) -> str:
    """A row for each method: the best of every seed, and how many are good."""
    rows = []
    for name, runs in results.items():
        best = [max(run) for run in runs]
        good = sum(value >= GOOD for value in best)
        cells = [f"{value:.4f}" for value in best]
        median = f"{statistics.median(best):.4f}"
        rows.append((name, *cells, median, f"{good} of {len(best)}", f"{seconds[name]:.0f} s"))
    seeds = [f"seed {seed}" for seed in range(len(next(iter(results.values()))))]
    headers = ["method", *seeds, "median", f">= {GOOD}", "time"]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def plot(results: dict[str, list[list[float]]], file: Path) -> None:
    """Draw the best accuracy so far, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, runs in results.items():
        # Who stops early keeps what he has.
        full = [run + [max(run)] * (EVALUATIONS - len(run)) for run in runs]
        axis.plot(np.maximum.accumulate(full, 1).mean(0), label=name)
    axis.set(xlabel="evaluations", ylabel="best accuracy so far, mean of seeds")
    axis.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Search, report and return the scores by method and seed."""
    parser = argparse.ArgumentParser(description="Tune a support vector machine with a swarm.")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--workers", type=int, default=0, help="processes of the swarm (0: none)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.workers < 0:
        parser.error("--seeds must be at least 1, --workers at least 0")
    results: dict[str, list[list[float]]] = {}
    seconds = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        extra = {"workers": options.workers} if method is swarm else {}
        results[name] = [method(score_of, seed, **extra) for seed in range(options.seeds)]
        seconds[name] = time.perf_counter() - started
    print(table(results, seconds))
    options.out.mkdir(parents=True, exist_ok=True)
    plot(results, options.out / "swarm_svm.png")
    print(f"{EVALUATIONS} evaluations each; {options.out}/swarm_svm.png")
    return results


if __name__ == "__main__":
    main()
