"""Suite ``pso``: a step of a particle swarm, and its update alone.

Two networks: the 51 parameters of PyTorch-PSO's demo, with 20 to 4096 particles on 100 points, and
1,050,112 parameters with 16 and 64 particles on 8. All rows have constriction coefficients for
every element, the best of all as guide, and a largest velocity. Rows of the tables:

Base       of view "step": the forward of all particles alone, as ours has it
PSO        perturbed.PSO: losses in, bests kept, particles moved, module and records up to date
operator   of view "update": swarm_move_ alone
Naive      torch._foreach_* over parameters stacked by particle, in place; bmm for the forward
Loop       a module for each particle (small cases only)
EvoX PSO   of view "update", where evox is installed: bench/peers.py

Peak memory is that of a process of its own which makes a row and runs it twice, less that of one
which imports only, and stands in the notes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers, report
from bench.common import ROOT, Options, Result, Row, rtol
from bench.timing import measure
from perturbed import PSO, Explicit, PerturbedModel, _ops, convert
from perturbed.optim import Constriction

W, C1, C2 = Constriction().numbers(0)
LIMIT = 0.3
EVOX = "EvoX PSO"
LOOP_PARTICLES = 256  # and more would take minutes
LOOP_PARAMETERS = 1000

NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "51 parameters": (
        lambda: nn.Sequential(
            nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1)
        ),
        100,
    ),
    "1M parameters": (
        lambda: nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 512)),
        8,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a number of particles."""

    network: str
    particles: int

    def __str__(self) -> str:
        return f"{self.network}, {self.particles} particles"


def cases(options: Options) -> list[Case]:
    small = (20, 64, 256, 1024, 4096) if options.full else (20, 256, 4096)
    found = [Case("51 parameters", p) for p in small]
    return found + [Case("1M parameters", p) for p in (16, 64)]


class Swarm:
    """What rows have in common: start, losses in turn, inputs; and what an update must satisfy."""

    def __init__(self, case: Case, device: torch.device) -> None:
        make, points = NETWORKS[case.network]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = make().to(device)
            self.size = sum(p.numel() for p in self.net.parameters())
            self.start = 0.1 * torch.randn(case.particles, self.size)
            self.losses = torch.rand(16, case.particles).to(device)
            self.x = torch.randn(points, self.net[0].in_features).to(device)
            self.y = torch.randn(points, self.net[-1].out_features).to(device)
        self.start = self.start.to(device)
        self.particles, self.device = case.particles, device
        self.calls = 0

    def next_losses(self) -> Tensor:
        self.calls += 1
        return self.losses[self.calls % len(self.losses)]

    def check(self, before: list[Tensor], after: list[Tensor], losses: Tensor, what: str) -> None:
        """Hold a first update to the formula: every coefficient lies between 0 and c.

        Args:
            before: positions and velocities, (P, N) each; bests are the positions.
            after: positions and velocities.
            losses: (P,), all of them bests.
            what: the row, for the message.
        """
        x, v = before
        pull = C2 * (x[losses.argmin()] - x)  # the own best is the position
        low = (W * v + pull.clamp(max=0)).clamp(-LIMIT, LIMIT)
        high = (W * v + pull.clamp(min=0)).clamp(-LIMIT, LIMIT)
        slack = rtol(x) * 10
        if not ((after[1] >= low - slack) & (after[1] <= high + slack)).all():
            raise AssertionError(f"{what}: velocities are not between those of r = 0 and r = 1")
        if not torch.allclose(after[0], x + after[1], rtol=slack, atol=slack):
            raise AssertionError(f"{what}: positions are not the old ones and the velocities")
        share = ((after[1] - W * v) / pull)[pull.abs() > 0.1 * pull.abs().max()]
        inside = share[(share > 0.01) & (share < 0.99)]
        if len(inside) > 1000 and not 0.1 < inside.std() < 0.4:
            raise AssertionError(f"{what}: coefficients vary by {inside.std():.2f}, 0.29 expected")


# ---- rows --------------------------------------------------------------------------------------


class Ours:
    """perturbed.PSO on a PerturbedModel."""

    name = "PSO"

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        net = convert(copy.deepcopy(swarm.net), swarm.particles, Explicit())
        self.pm = PerturbedModel(net, swarm.particles)
        self.pso = PSO(self.pm, start=swarm.start, max_velocity=LIMIT)
        self.rows = self.pm.replicate(swarm.x)
        self.targets = swarm.y.repeat_interleave(swarm.particles, 0)

    def state(self) -> list[Tensor]:
        return [self.pso.flight.positions.clone(), self.pso.flight.velocities.clone()]

    def held(self) -> int:
        flight = self.pso.flight
        return flight.positions.nbytes + flight.velocities.nbytes + flight.bests.nbytes

    def update(self, losses: Tensor) -> None:
        self.pso.ask()
        self.pso.tell(losses)

    def forward(self) -> Tensor:
        return self.pm(self.rows)

    def loss(self) -> Tensor:
        return (self.forward() - self.targets).square().mean(1)

    def step(self) -> None:
        self.pso.step(self.loss)

    def operator(self) -> None:
        flight = self.pso.flight
        if "coefficients" not in flight.extra or not flight.extra["coefficients"].any():
            self.update(self.swarm.next_losses())
        _ops.swarm_move_(
            flight.positions,
            flight.velocities,
            flight.bests,
            flight.improved,
            flight.guides().contiguous(),
            flight.key,
            flight.extra["coefficients"],
            flight.space.limit,
            None,
            None,
            0,
            True,
            False,
            0,
        )


class Stacked:
    """The same on torch._foreach_*, parameters stacked by particle, everything in place."""

    name = "Naive"

    def __init__(self, swarm: Swarm) -> None:
        self.swarm, p = swarm, swarm.particles
        shapes = [q.shape for q in swarm.net.parameters()]
        parts = swarm.start.split([s.numel() for s in shapes], 1)
        self.x = [t.reshape(p, *s).clone() for t, s in zip(parts, shapes, strict=True)]
        self.v = [torch.zeros_like(t) for t in self.x]
        self.bests = [t.clone() for t in self.x]
        self.values = torch.full((p,), torch.inf, device=swarm.device)

    def state(self) -> list[Tensor]:
        return [torch.cat([t.flatten(1) for t in parts], 1) for parts in (self.x, self.v)]

    def held(self) -> int:
        return 3 * sum(t.nbytes for t in self.x)

    def update(self, losses: Tensor) -> None:
        improved = losses < self.values
        torch.minimum(losses, self.values, out=self.values)
        guide = self.values.argmin()[None]
        for best, x in zip(self.bests, self.x, strict=True):
            torch.where(improved.view(-1, *[1] * (x.dim() - 1)), x, best, out=best)
        torch._foreach_mul_(self.v, W)
        attracted = ((self.bests, C1), ([b.index_select(0, guide) for b in self.bests], C2))
        for places, c in attracted:
            pull = torch._foreach_sub(places, self.x)
            torch._foreach_mul_(pull, [torch.rand_like(x) for x in self.x])
            torch._foreach_add_(self.v, pull, alpha=c)
            del pull
        torch._foreach_clamp_min_(self.v, -LIMIT)
        torch._foreach_clamp_max_(self.v, LIMIT)
        torch._foreach_add_(self.x, self.v)

    def forward(self) -> Tensor:
        """Scores of all particles, (P, points, out)."""
        h, parameters = self.swarm.x.expand(self.swarm.particles, -1, -1), iter(self.x)
        for layer in self.swarm.net:
            if isinstance(layer, nn.Linear):
                weight, bias = next(parameters), next(parameters)
                h = torch.baddbmm(bias[:, None], h, weight.mT)
            else:
                h = layer(h)
        return h

    def step(self) -> None:
        self.update((self.forward() - self.swarm.y).square().mean((1, 2)))


class Loop:
    """A module for every particle."""

    name = "Loop"

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.nets = [copy.deepcopy(swarm.net) for _ in range(swarm.particles)]
        for net, vector in zip(self.nets, swarm.start, strict=True):
            nn.utils.vector_to_parameters(vector.clone(), net.parameters())
        self.x = [list(net.parameters()) for net in self.nets]
        self.v = [[torch.zeros_like(x) for x in xs] for xs in self.x]
        self.bests = [[x.clone() for x in xs] for xs in self.x]
        self.values = torch.full((swarm.particles,), torch.inf, device=swarm.device)

    def state(self) -> list[Tensor]:
        return [
            torch.stack([torch.cat([t.detach().flatten() for t in ts]) for ts in parts])
            for parts in (self.x, self.v)
        ]

    def held(self) -> int:
        return 3 * self.swarm.start.nbytes

    def update(self, losses: Tensor) -> None:
        for p, improved in enumerate((losses < self.values).tolist()):
            if improved:
                for best, x in zip(self.bests[p], self.x[p], strict=True):
                    best.copy_(x)
        torch.minimum(losses, self.values, out=self.values)
        guide = self.bests[int(self.values.argmin())]
        for xs, vs, bests in zip(self.x, self.v, self.bests, strict=True):
            for x, v, best, g in zip(xs, vs, bests, guide, strict=True):
                v.mul_(W).addcmul_(torch.rand_like(x), best - x, value=C1)
                v.addcmul_(torch.rand_like(x), g - x, value=C2).clamp_(-LIMIT, LIMIT)
                x.add_(v)

    def step(self) -> None:
        x, y = self.swarm.x, self.swarm.y
        self.update(torch.stack([F.mse_loss(net(x), y) for net in self.nets]))


def evox(swarm: Swarm) -> Row:
    """EvoX's PSO, its losses given; it has walls where ours has a largest velocity."""
    from evox.algorithms import PSO as EvoxPSO

    walls = torch.full((swarm.size,), LIMIT, device=swarm.device)
    pso = EvoxPSO(swarm.particles, -walls, walls, device=swarm.device)
    pso.evaluate = lambda positions: swarm.next_losses()
    pso.init_step()

    def check() -> None:
        before = pso.pop.clone()
        pso.step()
        if torch.equal(before, pso.pop) or not (pso.pop.abs() <= LIMIT).all():
            raise AssertionError("EvoX: particles stand still, or outside")

    return Row(EVOX, pso.step, check, 3 * swarm.start.nbytes)


KINDS: dict[str, type] = {kind.name: kind for kind in (Ours, Stacked, Loop)}


def make_row(view: str, kind: type, swarm: Swarm) -> Row:
    """A row of a view, "step" or "update"."""
    method = kind(swarm)

    def check() -> None:
        fresh, losses = kind(swarm), swarm.losses[0]
        before = fresh.state()
        fresh.update(losses)
        swarm.check(before, fresh.state(), losses, kind.name)

    calls = {"step": method.step, "update": lambda: method.update(swarm.next_losses())}
    return Row(kind.name, calls[view], check, method.held())


def rows_of(view: str, case: Case, options: Options) -> list[Row]:
    swarm = Swarm(case, options.device)
    others = peers.optional("evox", [EVOX], lambda: [evox(swarm)]) if view == "update" else []
    if options.only_peers:
        return others
    looped = swarm.particles <= LOOP_PARTICLES and swarm.size <= LOOP_PARAMETERS
    rows = [make_row(view, kind, swarm) for kind in (Ours, Stacked, *([Loop] if looped else []))]
    ours = Ours(swarm)
    if view == "step":
        return [Row("Base", ours.forward, lambda: None, 0), *rows]
    return [*rows, Row("operator", ours.operator, lambda: None, ours.held()), *others]


@torch.no_grad()
def run(
    options: Options, chosen: list[Case] | None = None, memory: bool = True
) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks (on memory, if asked for)."""
    results: list[Result] = []
    notes: list[str] = []
    for case in cases(options) if chosen is None else chosen:
        for view in options.chosen(("step", "update")):
            options.progress(f"pso, {view}: {case}")
            rows = rows_of(view, case, options)
            results += measure("pso", view, str(case), rows, options.device, options.seconds)
            del rows
        if memory and not options.only_peers and case.network == "1M parameters":
            nothing = peak_bytes(case, "", options.device)
            peaks = {n: peak_bytes(case, n, options.device) - nothing for n in ("PSO", "Naive")}
            over = ", ".join(f"{name} {report.size(max(0, b))}" for name, b in peaks.items())
            notes.append(f"Peak memory of {case}, two steps: {over}.")
    return results, notes


# ---- memory ------------------------------------------------------------------------------------


def peak_bytes(case: Case, row: str, device: torch.device) -> int:
    """Peak memory of a process that makes one row and runs it twice; of none, for no row."""
    arguments = [case.network, str(case.particles), row, str(device)]
    command = [sys.executable, "-m", "bench.pso", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def main() -> None:
    """The child of :func:`peak_bytes`: prints its own peak."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("particles", type=int)
    parser.add_argument("row")
    parser.add_argument("device", type=torch.device)
    chosen = parser.parse_args()
    if chosen.row:
        method = KINDS[chosen.row](Swarm(Case(chosen.network, chosen.particles), chosen.device))
        method.step()
        method.step()
    if chosen.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(chosen.device))
        return
    # Not getrusage: its peak starts at the parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    print(1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1]))


if __name__ == "__main__":
    main()
