"""What the processes of test_distributed.py run: small trainings, by name.

A training is a function of (start, stop, checkpoints) that returns plain values and tensors; the
same one is run alone and by every process of a group. As a program, under torchrun, it is a process
of the elastic run, which kills itself at two of its steps.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import perturbed
from perturbed import ARS, NES, PGPE, PSO, SNES, PerturbedModel, distributed
from perturbed.checkpoint import Checkpoints
from perturbed.distributed import ProcessError, init
from perturbed.rl import ObservationNorm, Pendulum, rollout

STEPS = 20
D = 7  # over 4 processes: 1, 2, 2 and 2


def network(noise: Any, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    return perturbed.convert(net, D, noise)


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def result(losses: list[torch.Tensor], module: nn.Module, **more: Any) -> dict[str, Any]:
    parameters = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    return {"losses": torch.stack(losses), "parameters": parameters, **more}


class Training:
    """A module, its optimizer, what else is saved, and a step."""

    def __init__(self, step: Callable[[], torch.Tensor], net: nn.Module, **parts: Any) -> None:
        self.step, self.net, self.parts = step, net, parts

    def run(self, start: int = 0, stop: int = STEPS, folder: Path | None = None) -> dict[str, Any]:
        """Train from one step to another; with a folder, into a checkpoint or from one."""
        if folder is not None:
            saved = Checkpoints(folder, every=stop, net=self.net, **self.parts)
            if start:
                assert saved.resume() == start
        losses = [self.step().clone() for _ in range(start, stop)]
        if folder is not None and not start:
            saved.after(stop - 1)
        return result(losses, self.net, **self.extra())

    def extra(self) -> dict[str, Any]:
        norm = self.parts.get("norm")
        return {} if norm is None else {n: getattr(norm, n) for n in ("count", "mean", "m2")}


# ---- trainings -----------------------------------------------------------------------------------


def evolution(noise: Any, **options: Any) -> Training:
    """NES on classes, from their number of errors and the entropy; Adam and a schedule."""
    net = network(noise)
    pm = PerturbedModel(net, D, sigma=0.1, seed=3)
    adam = torch.optim.Adam(net.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.95)
    nes = NES(pm, adam, **options)
    x, y = data(5, 6), torch.tensor([0, 1, 2, 0, 1])

    def closure() -> torch.Tensor:
        labels = y.repeat_interleave(pm.directions).repeat(2)
        return nn.functional.cross_entropy(pm(pm.replicate(x)), labels, reduction="none")

    def step() -> torch.Tensor:
        loss = nes.step(closure)
        schedule.step()
        return loss

    return Training(step, net, nes=nes, schedule=schedule)


def convolution(**options: Any) -> Training:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    pm = PerturbedModel(perturbed.convert(net, D), D, antithetic=True, sigma=0.1)
    nes = NES(pm, torch.optim.SGD(net.parameters(), 0.005, momentum=0.9), **options)
    x = data(3, 2, 6, 6)
    return Training(
        lambda: nes.step(lambda: (pm(pm.replicate(x)) - 1).square().mean(1)), net, nes=nes
    )


def search(seeds: str = "members", **options: Any) -> Training:
    """ARS V2-t on pendulums; actions, and so returns, depend on statistics of observations."""
    torch.manual_seed(1)
    net = perturbed.convert(nn.Linear(3, 1), D)
    pm = PerturbedModel(net, D, antithetic=True, sigma=0.3)
    norm = ObservationNorm(3)
    ars = ARS(pm, top=4, lr=0.1, maximize=True, normalizer=norm, **options)

    def returns() -> torch.Tensor:
        env = Pendulum(lanes=2 * 2 * pm.directions)  # 2 lanes a member, which share 3 episodes
        return rollout(pm, env, 3, seeds=seeds, norm=norm, max_steps=7).returns

    return Training(lambda: ars.step(returns), net, ars=ars, norm=norm)


def by_hand() -> Training:
    """Ask, windows and tell; a member whose loss is NaN; noise that serves two steps."""
    net = network(FAMILIES["low_rank"])
    pm = PerturbedModel(net, D, antithetic=True, sigma=0.1)
    nes = NES(pm, torch.optim.SGD(net.parameters(), 0.5), chunk=2, reuse=2)
    x = data(5, 6)

    def step() -> torch.Tensor:
        nes.ask()
        values = []
        with torch.no_grad():
            for shown in nes.windows():
                value = pm.member_mean(shown(shown.replicate(x)).square().mean(1))
                broken = torch.arange(D) == nes.steps % D
                value[0, broken[pm.state.first_direction :][: pm.directions]] = torch.nan
                values.append(value)
        return nes.tell(torch.cat(values, 1))

    return Training(step, net, nes=nes)


def swarm(kind: Callable[..., Any], **options: Any) -> Training:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    perturbed.convert(net, 10, perturbed.Explicit())
    pm = PerturbedModel(net, 10)
    optimizer = kind(pm, **options)
    x = data(5, 6)
    closure = lambda: (pm(pm.replicate(x)) - 1).square().mean(1)  # noqa: E731
    return Training(lambda: optimizer.step(closure), net, optimizer=optimizer)


def one_by_one(kind: Callable[..., Any]) -> Training:
    """A swarm of a plain module, scored by a function of it."""
    torch.manual_seed(1)
    net = nn.Linear(3, 1)
    optimizer = kind(net, 6)
    return Training(
        lambda: optimizer.step(lambda net: float((net.weight.abs().sum() - 2) ** 2)), net,
        optimizer=optimizer,
    )  # fmt: skip


FAMILIES = {
    "dense": perturbed.Dense(),
    "low_rank": perturbed.LowRank(2),
    "sparse": perturbed.Sparse("auto"),
    "sign_flip": perturbed.SignFlip(bases=3),
    "permuted": perturbed.Permuted(),
}
# Forwards of the same directions, whatever the number of processes: bit for bit the same. D = 7 in
# chunks of 2 is 4 forwards, which 4 processes have one each of.
EXACT: dict[str, Callable[[], Training]] = {
    **{f"nes {name}": lambda f=f: evolution(f, chunk=2) for name, f in FAMILIES.items()},
    "nes stored": lambda: evolution(perturbed.Dense(storage="stored"), chunk=2),
    "nes convolution": lambda: convolution(chunk=2),
    "nes by hand": by_hand,
    "ars, members' episodes": lambda: search(seeds="members", chunk=2),
    "ars, pairs' episodes": lambda: search(seeds="pairs", chunk=1),
    "pso": lambda: swarm(PSO, reevaluate=True, chunk=2),
    "snes": lambda: swarm(SNES, chunk=2),
    "pgpe": lambda: swarm(PGPE, chunk=2),
    "pso of a plain module": lambda: one_by_one(PSO),
    "snes of a plain module": lambda: one_by_one(SNES),
}
# Forwards of other shapes, whose products torch sums in another order; or estimates that are sums
# over processes. Shaped so that no rank depends on a last bit.
CLOSE: dict[str, Callable[[], Training]] = {
    **{
        f"nes {name} sharded": lambda f=f: evolution(f, estimate="sharded", shaping="zscore")
        for name, f in FAMILIES.items()
    },
    "nes auto": lambda: evolution(perturbed.Dense(), estimate="auto", shaping="zscore"),
    "nes whole": lambda: evolution(perturbed.Sparse(), shaping="zscore"),
    "nes in little memory": lambda: evolution(perturbed.Dense(), max_memory=4000, shaping="zscore"),
    "nes convolution sharded": lambda: convolution(estimate="sharded", shaping="zscore", chunk=2),
    "ars sharded": lambda: search("common", chunk=2, estimate="sharded"),
}
RESUMED = ("nes sign_flip", "nes low_rank", "ars, members' episodes", "pso", "pgpe")


# ---- jobs: what all processes of a group do ------------------------------------------------------


def train(folder: Path) -> dict[str, Any]:
    """Run every training; go on with those that twice as many processes have begun, begin some."""
    joined = torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if joined else 1
    results = {name: make().run() for name, make in {**EXACT, **CLOSE}.items()}
    for name in RESUMED:
        begun = folder / str(2 * size) / name
        if begun.exists():
            results[f"{name} resumed"] = EXACT[name]().run(STEPS // 2, STEPS, begun)
        EXACT[name]().run(0, STEPS // 2, folder / str(size) / name)
    if joined:
        results["sums"] = add_up(torch.distributed.get_rank())
    return results


def summands(rank: int) -> list[torch.Tensor]:
    """Tensors of many kinds and sizes: of several blocks, narrow, transposed, integers, empty."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(3, 5, generator=generator)
    narrow = torch.randn(4, generator=generator).bfloat16()
    turned = torch.randn(2, 6, generator=generator, dtype=torch.float64).t()
    return [wide, narrow, turned, torch.arange(9) * (rank + 1), torch.zeros(0)]


def add_up(rank: int) -> list[torch.Tensor]:
    """Add the tensors of all processes up, a few elements at a time."""
    tensors, elements = summands(rank), distributed.BLOCK_ELEMENTS
    distributed.BLOCK_ELEMENTS = 7
    try:
        distributed.Processes().add_up(tensors)
    finally:
        distributed.BLOCK_ELEMENTS = elements
    return tensors


def caught(function: Callable[[], Any], kind: type[BaseException]) -> str:
    """Return the text of the error that function must raise."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def disagree(folder: Path) -> dict[str, str]:
    """Start trainings that differ on the last process; return what each says, by name."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def make(
        seed: int = 3, sigma: float = 0.1, values: int = 1, lr: float = 0.1, steps: int = 0,
        directions: int = D, noise: str = "dense", extra: bool = False, kind: Any = None,
        **options: Any,
    ) -> NES:  # fmt: skip
        torch.manual_seed(values)
        net = nn.Sequential(nn.Linear(6, 3), *([nn.Linear(3, 3)] if extra else []))
        perturbed.convert(net, directions, FAMILIES[noise])
        pm = PerturbedModel(net, directions, sigma=sigma, seed=seed)
        kind = torch.optim.SGD if kind is None else kind
        nes = NES(pm, kind(net.parameters(), lr), **options)
        nes.steps = steps
        return nes

    def step(nes: NES) -> None:
        nes.step(lambda: nes.pm(nes.pm.replicate(data(2, 6))).square().mean(1))

    norm = ObservationNorm(2)
    norm.update(data(4, 2))
    norm.sync()
    other = {
        "seed": {"seed": 4}, "sigma": {"sigma": 0.2}, "values": {"values": 2}, "lr": {"lr": 0.2},
        "optimizer": {"kind": torch.optim.Adam}, "steps": {"steps": 5},
        "population": {"directions": 9}, "family": {"noise": "low_rank"},
        "architecture": {"extra": True}, "shaping": {"shaping": "zscore"},
        "estimate": {"estimate": "sharded"}, "maximize": {"maximize": True},
        "decay": {"weight_decay": 0.1}, "chunk": {"chunk": 3},
    }  # fmt: skip
    found = {}
    for name, options in other.items():
        nes = make(**(options if last else {}))
        found[name] = caught(lambda nes=nes: step(nes), ProcessError)
        assert nes.pm.state.generation == -1, "nothing was drawn"
    nes = make(normalizer=norm if last else ObservationNorm(2))
    found["normalizer"] = caught(lambda: step(nes), ProcessError)
    particles = PSO(nn.Linear(2, 1), 4, seed=int(last))
    found["swarm"] = caught(lambda: particles.step(lambda net: 1.0), ProcessError)
    # A process that resumes another checkpoint than the others is found too.
    nes = make()
    step(nes)
    state = nes.state_dict()
    step(nes)
    if last:
        nes.load_state_dict(state)
    else:
        nes.load_state_dict(nes.state_dict())
    found["checkpoint"] = caught(lambda: step(nes), ProcessError)
    small = torch.distributed.get_world_size() - 1
    pm = PerturbedModel(perturbed.convert(nn.Linear(2, 2), small), small)
    sgd = torch.optim.SGD(pm.model.parameters())
    found["too many"] = caught(lambda: NES(pm, sgd), ValueError)
    found["too many for a swarm"] = caught(lambda: PSO(nn.Linear(2, 1), small), ValueError)
    NES(pm, sgd, distributed=False)
    found["no group"] = caught(lambda: NES(pm, sgd, distributed=3), TypeError)  # type: ignore[arg-type]
    # Statistics of a share must not be taken for those of the population.
    nes = make()
    env = Pendulum(lanes=2 * nes.pm.directions)
    nes.pm.set_noise()
    policy = lambda x: torch.zeros(len(x), 1)  # noqa: E731
    found["norm"] = caught(
        lambda: rollout(policy, env, pm=nes.pm, norm=ObservationNorm(3), max_steps=3), ValueError
    )
    # After all of that the group still works.
    nes = make()
    step(nes)
    found["values after"] = str(nes.stats["mean"])
    return found


def lose(folder: Path, how: signal.Signals) -> dict[str, Any]:
    """Have the last process die or stop in its third step; return when and how others notice."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    net = network(FAMILIES["dense"])
    pm = PerturbedModel(net, D, sigma=0.1)
    nes = NES(pm, torch.optim.SGD(net.parameters(), 0.1))

    def closure() -> torch.Tensor:
        if rank == size - 1 and nes.steps == 2:
            os.kill(os.getpid(), how)
        return pm(pm.replicate(data(5, 6))).square().mean(1)

    nes.step(closure)
    nes.step(closure)
    before = pm.state.generation, [p.clone() for p in net.parameters()]
    start = time.perf_counter()
    message = caught(lambda: nes.step(closure), ProcessError)
    seconds = time.perf_counter() - start
    same = all(torch.equal(a, b) for a, b in zip(before[1], net.parameters(), strict=True))
    unchanged = same and before[0] == pm.state.generation and nes.steps == 2
    return {"message": message, "seconds": seconds, "unchanged": unchanged}


def die(folder: Path) -> dict[str, Any]:
    return lose(folder, signal.SIGKILL)


def hang(folder: Path) -> dict[str, Any]:
    return lose(folder, signal.SIGSTOP)


JOBS = {job.__name__: job for job in (train, disagree, die, hang)}


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(job: str, variables: dict[str, str], folder: Path, timeout: float) -> None:
    """Be one process of a group, with what torchrun would put into the environment."""
    torch.set_num_threads(1)
    with environment(variables):
        rank = variables["RANK"]
        try:
            assert init(timeout)
            assert init(timeout)  # once is enough
            found = JOBS[job](folder)
            torch.save(found, folder / f"{job}-{rank}.pt")
        except BaseException:
            (folder / f"{job}-{rank}.txt").write_text(traceback.format_exc())
            raise
        if job in ("train", "disagree"):
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        os._exit(0)  # destructors of a group that has lost a process would wait for it


# ---- the elastic run -----------------------------------------------------------------------------

LONG = 14
DEATHS = {0: (1, 5), 1: (0, 9)}  # restart: (rank, step) at which that process kills itself


def elastic(folder: Path) -> None:
    """Train to the end, from the last checkpoint, as often as torchrun starts it."""
    torch.set_num_threads(1)
    init(timeout=60)
    training = search(chunk=2)
    saved = Checkpoints(folder / "saved", every=2, net=training.net, **training.parts)
    start = saved.resume()
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank = torch.distributed.get_rank()
    with open(folder / f"starts-{rank}.txt", "a") as file:
        file.write(f"{restart} {start}\n")
    for step in range(start, LONG):
        if DEATHS.get(restart) == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        training.step()
        saved.after(step)
    torch.save(outcome(training), folder / f"elastic-{rank}.pt")


def outcome(training: Training) -> dict[str, torch.Tensor]:
    return {**training.net.state_dict(), **training.extra()}


if __name__ == "__main__":
    elastic(Path(sys.argv[1]))
