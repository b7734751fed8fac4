"""Suite ``models``: converted networks that are more than one layer, forward alone.

ResNet-18 (He et al., 2016) on small images and a 4-layer transformer encoder, each as torch would
build it, converted as it is: convolutions, normalisations, attention and all. 32 members in
antithetic pairs, one input each. Base is the plain forward of the same 32 rows.

Loop     what one does without: draw with torch, W + E, a forward, W - E, a forward, back to W
vmap     torch.func.vmap over the members' parameters, stacked beforehand: noise given

Peak memory is that of a process of its own which runs a row once, less that of one which runs Base
(CPU: resident set; CUDA: allocator), and stands in the notes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from bench import report
from bench.common import ROOT, Options, Result, Row, assert_close
from bench.ours import SIGMA, held_bytes
from bench.timing import measure
from perturbed import Dense, LowRank, PerturbedModel, SignFlip, convert

MEMBERS = 32
RTOL = 1e-3  # of 20 layers in float32


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 with the stem that is usual for images of 32 x 32."""
    stages: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        stages += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def transformer(width: int = 256) -> nn.Module:
    """Four encoder layers of torch."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


# Name -> network and one input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18, 3x32x32": (resnet18, (3, 32, 32)),
    "transformer, 4 layers, 64 tokens of 256": (transformer, (64, 256)),
}
FAMILIES = (Dense(), Dense("rademacher"), LowRank(1), SignFlip())


class Problem:
    """A network, its inputs, and its members' outputs."""

    def __init__(self, name: str, device: torch.device) -> None:
        make, shape = MODELS[name]
        torch.manual_seed(0)
        self.net = make().to(device).eval().requires_grad_(True)
        self.x = torch.randn(MEMBERS, *shape).to(device)

    def base(self) -> Row:
        return Row("Base", lambda: self.net(self.x), lambda: None, 0)

    def perturbed(self, noise) -> Row:
        pm = self.population(noise)

        def call() -> Tensor:
            pm.set_noise()
            return pm(self.x)

        def check() -> None:
            y = call()
            for b in (3, MEMBERS - 2):
                member = pm.member(b % (MEMBERS // 2), 1 if 2 * b < MEMBERS else -1)
                assert_close(y[b], member(self.x[b : b + 1])[0], f"{noise!r}, row {b}", RTOL)

        return Row(repr(noise), call, check, held_bytes(pm))

    def population(self, noise) -> PerturbedModel:
        net = convert(copy.deepcopy(self.net), MEMBERS // 2, noise)
        pm = PerturbedModel(net, MEMBERS // 2, sigma=SIGMA)
        pm.set_noise()
        return pm

    def loop(self) -> Row:
        net = copy.deepcopy(self.net)
        parameters = list(net.parameters())
        rows = self.x.split(1)

        def call() -> Tensor:
            plus, minus = [], []
            for d in range(MEMBERS // 2):
                noise = [SIGMA * torch.randn_like(p) for p in parameters]
                torch._foreach_add_(parameters, noise)
                plus.append(net(rows[d]))
                torch._foreach_sub_(parameters, noise, alpha=2)
                minus.append(net(rows[MEMBERS // 2 + d]))
                torch._foreach_add_(parameters, noise)
            return torch.cat(plus + minus)

        def check() -> None:
            call()
            flat = torch.nn.utils.parameters_to_vector
            assert_close(flat(parameters), flat(self.net.parameters()), "Loop: weights", RTOL)

        return Row("Loop over members", call, check, sum(p.nbytes for p in parameters))

    def vmap(self) -> Row:
        pm = self.population(LowRank(1))
        half = MEMBERS // 2
        members = [pm.member(b % half, 1 if b < half else -1) for b in range(MEMBERS)]
        stacked = stack_module_state(members)
        frozen = copy.deepcopy(members[0]).to("meta")

        def one(state, row: Tensor) -> Tensor:
            return functional_call(frozen, state, (row[None],))[0]

        call = functools.partial(vmap(one), stacked, self.x)

        def check() -> None:
            assert_close(call()[3], members[3](self.x[3:4])[0], "vmap", RTOL)

        stacked_bytes = MEMBERS * sum(p.nbytes for p in self.net.parameters())
        return Row("vmap", call, check, stacked_bytes)

    def rows(self) -> dict[str, Callable[[], Row]]:
        """Name of a row -> how to make it."""
        ours = {repr(noise): functools.partial(self.perturbed, noise) for noise in FAMILIES}
        return {"Base": self.base, **ours, "Loop over members": self.loop, "vmap": self.vmap}


@torch.no_grad()
def run(options: Options, memory: bool = True) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks (on memory, if asked for)."""
    results: list[Result] = []
    notes: list[str] = []
    if not options.chosen(("forward",)):
        return results, notes
    for name in MODELS:
        options.progress(f"models: {name}")
        problem = Problem(name, options.device)
        rows = [make() for make in problem.rows().values()]
        case = f"{name}, {MEMBERS} members"
        results += measure("models", "forward", case, rows, options.device, options.seconds)
        if not memory:
            continue
        peaks = {row.name: peak_bytes(name, row.name, options.device) for row in rows}
        base = peaks.pop("Base")
        over = ", ".join(f"{row} {report.size(max(0, b - base))}" for row, b in peaks.items())
        notes.append(f"Peak memory of {name} over Base: {over}.")
    return results, notes


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes(model: str, row: str, device: torch.device) -> int:
    """Peak memory of a process that makes one row and runs it twice."""
    command = [sys.executable, "-m", "bench.models", model, row, str(device)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def main() -> None:
    """The child of :func:`peak_bytes`: prints its own peak."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("row")
    parser.add_argument("device", type=torch.device)
    chosen = parser.parse_args()
    row = Problem(chosen.model, chosen.device).rows()[chosen.row]()
    row.call()
    row.call()
    if chosen.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(chosen.device))
        return
    # Not getrusage: its peak starts at the parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    print(1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1]))


if __name__ == "__main__":
    main()
