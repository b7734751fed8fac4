"""Suite ``memory``: a generation in one forward and in several, its time and its peak memory.

A call is a step of perturbed.NES (noise, forwards, centred ranks, estimate, SGD) with noise of rank
1. Base is all directions in one forward; the other rows evaluate a quarter or a sixteenth of them
at a time (``chunk=``), or what fits into an eighth of Base's memory (``max_memory=``). Losses are
checked against Base's.

Peak memory is that of two steps in a process of its own, beyond what it has before them: model and
gradients (CPU: resident set, with freed tensors given back at once; CUDA: allocator).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import report
from bench.common import ROOT, Options, Result, Row, assert_close, rtol
from bench.models import transformer
from bench.network import mlp
from bench.ours import SIGMA
from bench.timing import measure
from perturbed import NES, LowRank, PerturbedModel, convert

# Name -> network, rows that every member sees, directions.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 64-1024-1024-10, 32 rows": (
        lambda: mlp((64, 1024, 1024, 10), torch.device("cpu")),
        (32, 64),
        256,
    ),
    "transformer, 4 layers, 64 tokens of 256": (transformer, (1, 64, 256), 64),
}
PARTS = (4, 16)
LIMIT = 8  # max_memory is Base's peak divided by this


class Problem:
    """A population and the rows that its members see."""

    def __init__(self, case: str, device: torch.device) -> None:
        make, shape, self.directions = CASES[case]
        torch.manual_seed(0)
        self.net = make().to(device).eval()
        self.x = torch.randn(shape).to(device)

    def options(self) -> dict[str, dict[str, Any]]:
        """Name of a row -> what NES is given; the limit is filled in when it is known."""
        chunks = {f"chunk = D / {n}": {"chunk": -(-self.directions // n)} for n in PARTS}
        return {"Base": {}, **chunks, f"max_memory = peak / {LIMIT}": {"max_memory": None}}

    def trainer(self, options: dict[str, Any]) -> Trainer:
        return Trainer(copy.deepcopy(self.net), self.x, self.directions, options)


class Trainer:
    """NES on one network; a step keeps the losses of its members."""

    def __init__(self, net: nn.Module, x: Tensor, directions: int, options: dict[str, Any]) -> None:
        self.pm = PerturbedModel(convert(net, directions, LowRank(1)), directions, sigma=SIGMA)
        self.x = x
        self.losses = x.new_zeros(0)
        # lr 0: every step of a row, and every row, is the same work on the same numbers.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        self.nes = NES(self.pm, optimizer, shaping=self._shape, **options)

    def _shape(self, losses: Tensor) -> Tensor:
        self.losses = losses
        return losses - losses.mean()

    def loss(self) -> Tensor:
        return self.pm(self.pm.replicate(self.x)).square().flatten(1).mean(1)

    def step(self) -> Tensor:
        self.pm.set_seed(0)
        return self.nes.step(self.loss)


def run(options: Options, memory: bool = True) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    results: list[Result] = []
    notes: list[str] = []
    for name in CASES if options.chosen(("step",)) else ():
        options.progress(f"memory: {name}")
        problem = Problem(name, options.device)
        peaks: dict[str, int] = {}
        rows = []
        base = problem.trainer({})
        base.step()
        for row, given in problem.options().items():
            if "max_memory" in given:
                given = {"max_memory": max(1, peaks.get("Base", 1 << 20) // LIMIT)}
            if memory:
                peaks[row] = peak_bytes(name, given, options.device)
            rows.append(_row(row, problem.trainer(given), base.losses))
        case = f"{name}, D = {problem.directions}"
        measured = measure("memory", "step", case, rows, options.device, options.seconds)
        for result in measured:
            result.peak_bytes = peaks.get(result.method, float("nan"))
        results += measured
        if "Base" in peaks:
            limit = report.size(peaks["Base"] // LIMIT)
            notes.append(f"memory: max_memory is {limit} for {name}.")
    return results, notes


def _row(name: str, trainer: Trainer, expected: Tensor) -> Row:
    def check() -> None:
        for _ in range(3):  # forwards under a limit find their size
            trainer.step()
        assert_close(trainer.losses, expected, name, rtol(expected))

    return Row(name, trainer.step, check, 0)


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes(case: str, options: dict[str, Any], device: torch.device) -> int:
    """Peak memory of a process that makes some steps."""
    command = [sys.executable, "-m", "bench.memory", case, json.dumps(options), str(device)]
    # glibc would keep up to twice as much of tensors that are gone, whatever the row.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(name)).split()[1])


def main() -> None:
    """The child of :func:`peak_bytes`: prints its own peak."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("device", type=torch.device)
    chosen = parser.parse_args()
    problem = Problem(chosen.case, chosen.device)
    # Thread pools and the libraries' buffers come with a first step, of few directions a forward.
    problem.trainer({"chunk": -(-problem.directions // max(PARTS))}).step()
    trainer = problem.trainer(chosen.options)
    trainer.pm.set_noise()
    trainer.pm.set_grad(problem.x.new_zeros(problem.directions))
    gc.collect()  # of the first trainer
    if chosen.device.type == "cuda":
        before = torch.cuda.memory_allocated(chosen.device)
        torch.cuda.reset_peak_memory_stats(chosen.device)
        for _ in range(2):
            trainer.step()
        print(torch.cuda.max_memory_allocated(chosen.device) - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _resident("VmRSS")
    for _ in range(2):
        trainer.step()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main()
