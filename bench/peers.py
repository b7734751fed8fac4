"""Other packages' evolution strategies, for the suite ``network``; its swarm is in bench/pso.py.

EvoX VirtualLoRA           VirtualLoRAES of EvoX, rank 1: noise of every member drawn twice a step
EvoX VirtualLoRA, rank 4   the same
EvoTorch PGPE              all perturbed networks in memory, evaluated by vmap

Both packages are optional. Both do what their own examples do, with the same population, learning
rate and loss. EvoX shows all members one input, since it has no inputs of their own; its rank-r
classes (version 1.4) are imported from their files, because ``evox.algorithms`` and
``evox.problems.neuroevolution`` export the full-rank ones under their names.

They are imported where they are installed beside this package. ``--peers PYTHON`` names another
interpreter that has them: it runs their rows alone (``--only-peers``), and :func:`merge` puts them
into the tables. It needs torch, tabulate and matplotlib, of the same Python version as ours, since
it imports this checkout and its compiled extension.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import files
from bench.common import ROOT, Options, Result, Row, assert_close
from bench.ours import SIGMA
from bench.plain import LR, Task

SUITES = ("network", "pso")  # with rows of others
EVOX = {1: "EvoX VirtualLoRA", 4: "EvoX VirtualLoRA, rank 4"}
EVOTORCH = "EvoTorch PGPE"
HOW = 'pip install "perturbed[bench-peers]", or name an interpreter that has it: --peers PYTHON'


def optional(package: str, names: Sequence[str], make: Callable[[], list[Row]]) -> list[Row]:
    """Rows of a package, or, where it cannot be imported, rows that say so."""
    try:
        return make()
    except ImportError as error:
        reason = f"{package} is not installed ({error}): {HOW}"
        return [Row.missing(name, reason) for name in names]


def _evox(view: str, net: nn.Sequential, task: Task, rank: int) -> Row:
    """EvoX's algorithm and problem, joined as its StdWorkflow does, but without its bookkeeping."""
    from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
    from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem

    device, parameters = task.x.device, list(net.parameters())
    members = 2 * task.directions
    problem = VirtualLoRAProblem(
        copy.deepcopy(net),
        [(task.x[:1], task.labels[:1])],
        nn.CrossEntropyLoss(reduction="none"),
        lora_rank=rank,
        device=device,
    )
    centre = torch.cat([p.flatten() for p in parameters])
    algorithm = VirtualLoRAES(
        [tuple(p.shape) for p in parameters],
        rank,
        members,
        centre.clone(),
        LR,
        SIGMA,
        "adam",
        device,
    )
    algorithm.evaluate = problem.evaluate

    def check() -> None:
        losses = problem.evaluate((centre, algorithm.seeds, 0.0))
        plain = F.cross_entropy(net(task.x[:1]), task.labels[:1])
        assert_close(losses, plain.expand(members), "EvoX without noise", 1e-4)
        before = algorithm.center.clone()
        algorithm.step()
        if torch.equal(before, algorithm.center):
            raise AssertionError("EvoX: the step changed nothing")

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: problem.evaluate((algorithm.center, algorithm.seeds, SIGMA)),
        "step": algorithm.step,
    }
    # Its factors, of all layers at once.
    held = 4 * members * rank * sum(sum(p.shape) for p in parameters)
    return Row(EVOX[rank], calls[view], check, held)


def _evotorch(view: str, net: nn.Sequential, task: Task) -> Row:
    from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell
    from evotorch.neuroevolution.net import ModuleExpectingFlatParameters

    function = ModuleExpectingFlatParameters(copy.deepcopy(net), disable_autograd_tracking=True)
    centre = torch.cat([p.flatten() for p in net.parameters()])
    state = pgpe(
        center_init=centre,
        center_learning_rate=LR,
        stdev_learning_rate=0.0,
        objective_sense="min",
        ranking_method="centered",
        optimizer="adam",
        stdev_init=SIGMA,
    )

    def forward() -> tuple[Tensor, Tensor]:
        members = pgpe_ask(state, popsize=2 * task.directions)
        return members, torch.func.vmap(function)(members, task.x)

    def step() -> None:
        nonlocal state
        members, scores = forward()
        state = pgpe_tell(state, members, task.loss(scores))

    def check() -> None:
        members, scores = forward()
        member = copy.deepcopy(net)
        torch.nn.utils.vector_to_parameters(members[-1], member.parameters())
        assert_close(scores[-1], member(task.x[-1]), "EvoTorch", 1e-4)
        step()

    held = 4 * 2 * task.directions * len(centre)
    return Row("EvoTorch PGPE", {"forward": forward, "step": step}[view], check, held)


def rows(view: str, net: nn.Sequential, task: Task) -> list[Row]:
    """Everybody's rows of a view, "forward" or "step"."""
    evox = optional(
        "evox", list(EVOX.values()), lambda: [_evox(view, net, task, rank) for rank in EVOX]
    )
    return evox + optional("evotorch", [EVOTORCH], lambda: [_evotorch(view, net, task)])


# ---- another interpreter -------------------------------------------------------------------------


def versions() -> str:
    """The packages of this interpreter."""
    found = []
    for name in ("evox", "evotorch", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def start(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Runs a command in this checkout until it ends."""
    return subprocess.run(command, cwd=ROOT, capture_output=True)


def run_elsewhere(python: Path, suite: str, options: Options) -> tuple[list[Result], str]:
    """Times the others' rows of a suite with another interpreter.

    Args:
        python: its path.
        suite: of SUITES.
        options: as here.

    Returns:
        Results, and the versions of its packages.

    Raises:
        RuntimeError: it cannot be started or does not finish; the message has its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "peers"
        command = [str(python), "-m", "bench", suite, "--only-peers", "--save", str(stem)]
        command += ["--seconds", str(options.seconds), "--device", str(options.device)]
        command += ["--full"] if options.full else []
        for view in options.views or ():
            command += ["--view", view]
        try:
            done = start(command)
        except OSError as error:
            raise RuntimeError(f"--peers {python.name} cannot be started: {error}") from None
        if not stem.with_suffix(".json").exists():
            last = (done.stderr.decode().strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"--peers {python.name} has no results; it said: {last}")
        run = files.read_json(stem.with_suffix(".json"))
    return run.results, run.machine["peers"]


def merge(own: list[Result], others: Sequence[Result]) -> list[Result]:
    """Puts others' results where rows here have no time, related to our Base and Naive."""
    by_key = {result.key: result for result in own}
    found = {result.key: copy.copy(result) for result in others if result.method != "Base"}
    for key, result in found.items():
        for field, name, upside_down in (
            ("times_base", "Base", False),
            ("over_naive", "Naive", True),
        ):
            other = by_key.get((*key[:3], name))
            if other is not None:
                share = result.median_s / other.median_s
                setattr(result, field, 1 / share if upside_down else share)
    return [found.get(r.key, r) if not r.timed else r for r in own]


def interpreter(text: str) -> Path:
    """Argparse type of --peers: a program that exists."""
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a Python interpreter, got {text!r}")
    return path
