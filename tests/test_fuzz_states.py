"""Damaged states and files: refused and nothing changed, or accepted and the next step works.

Of every state each leaf and each container is removed or replaced in turn. What a step of torch's
own optimizers makes of damage to their states, which they do not check, is theirs.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from searches import METHODS, make, parameters, quadratic
from strategies import few_and_many
from torch import Tensor
from trainers import TRAINERS, Run, network

import perturbed
from perturbed.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint
from perturbed.optim import (
    AlternatingOpt,
    GradChain,
    OptimizerAverage,
    RandomOpt,
    SequentialOpt,
    SwarmOfOptimizers,
)

REFUSALS = (ValueError, TypeError)  # CheckpointError is a ValueError
GONE = object()
Path = tuple[Any, ...]

# ---- everything with a state ---------------------------------------------------------------------


def search(name: str) -> Run:
    points = parameters()
    made = make(name, points, seed=3)
    return Run(lambda: made.step(lambda: quadratic(points)), search=made, points=Points(points))


class Points:
    """Parameters as a part of a run, so that a refusal that moved them is seen."""

    def __init__(self, points: list[Tensor]) -> None:
        self.points = points

    def state_dict(self) -> dict[str, Tensor]:
        return {str(i): p.detach() for i, p in enumerate(self.points)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for i, p in enumerate(self.points):
                p.copy_(state[str(i)])


def composite(kind: Callable[..., Any], chain: bool = False) -> Run:
    points = parameters()
    moving = [p for p in points if p.requires_grad]
    members = [torch.optim.SGD(moving, 0.1, momentum=0.9), torch.optim.Adam(moving, 0.05)]
    made = kind(moving, members) if chain else kind(members)

    def closure() -> Tensor:
        made.zero_grad()
        loss = quadratic(points)
        loss.backward()
        return loss

    return Run(lambda: made.step(closure), composite=made, points=Points(points))


def of_optimizers() -> Run:
    net = network(0)
    made = SwarmOfOptimizers(net, lambda p: torch.optim.Adam(p, 0.1), members=3, seed=3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))
    return Run(lambda: made.step(lambda: (net(x) - 1).square().mean()), net=net, trainer=made)


def minimize(**options: Any) -> Run:
    points = parameters(torch.float64)
    made = perturbed.Minimize(points, seed=3, **options)
    return Run(lambda: made.step(lambda: quadratic(points)), minimize=made, points=Points(points))


STATES: dict[str, Callable[[], Run]] = {
    **{name: lambda make=make: make(1) for name, make in TRAINERS.items()},
    **{name: lambda name=name: search(name) for name in METHODS},
    "alternating": lambda: composite(AlternatingOpt),
    "sequential": lambda: composite(SequentialOpt),
    "random-opt": lambda: composite(RandomOpt),
    "average": lambda: composite(OptimizerAverage),
    "chain": lambda: composite(GradChain, chain=True),
    "of-optimizers": of_optimizers,
    "minimize": minimize,
}

# ---- damage --------------------------------------------------------------------------------------

# Entries that are torch's own: its load_state_dict takes what it is given, and a step fails.
TORCHS = ("optimizer", "opt", "optimizers", "inner", "state", "param_groups")


def leaves(state: Any, path: Path = ()) -> Iterator[Path]:
    """Iterate over the places in a state, the containers' own included."""
    if path:
        yield path
    if isinstance(state, dict):
        items: Any = list(state.items())
    else:
        items = list(enumerate(state)) if isinstance(state, (list, tuple)) else []
    for key, value in items:
        yield from leaves(value, (*path, key))


def values_for(old: Any) -> dict[str, Callable[[], Any]]:
    """What takes the place of something in a state."""
    found: dict[str, Callable[[], Any]] = {
        "gone": lambda: GONE,
        "None": lambda: None,
        "text": lambda: "nonsense",
        "list": list,
        "dict": dict,
        "nan": lambda: math.nan,
        "-1": lambda: -1,
        "huge": lambda: 10**400,
        "object": object,
    }
    if isinstance(old, Tensor):
        found |= {
            "longer": lambda: torch.cat([old.flatten(), old.new_ones(1)]),
            "flat": lambda: old.flatten() if old.dim() != 1 else old[None],
            "empty": lambda: old.new_empty(0),
            "complex": lambda: old.to(torch.complex64),
            "meta": lambda: torch.empty_like(old, device="meta"),
            "sparse": lambda: old.clone().reshape(-1).to_sparse(),
        }
        if old.is_floating_point():
            found["nans"] = lambda: torch.full_like(old, math.nan)
    return found


def damaged(state: Any, path: Path, value: Any) -> Any:
    """A copy of a state with another value at a place."""
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner, tuple):
        return None
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def of_torch(path: Path) -> bool:
    return any(key in TORCHS for key in path)


def check(run: Run, name: str, state: Any, path: Path) -> str | None:
    """Load a damaged state; say what is not in order."""
    before = run.state()
    try:
        run.parts[name].load_state_dict(state)
    except Exception as error:
        if not isinstance(error, REFUSALS) and not of_torch(path):
            return f"{type(error).__name__}: {error}"
        try:
            return None if run.state() == before else f"refused by {error!r}, and changed something"
        except Exception as broken:
            return f"refused by {error!r}, and state_dict fails: {broken!r}"
    try:
        run.step()
        run.state()
    except Exception as error:
        return None if of_torch(path) else f"accepted, and the step fails: {error!r}"
    return None


def cases(run: Run) -> Iterator[tuple[str, Path, str, Any]]:
    """Iterate over all damage to all states: part, place, name of the value, damaged state."""
    for name, part in run.parts.items():
        if isinstance(part, (torch.Generator, torch.nn.Module, Points)) or name == "scheduler":
            continue  # torch's own, and the tests'
        state = part.state_dict()
        for path in leaves(state):
            old = state
            for key in path:
                old = old[key]
            for value, make_value in values_for(old).items():
                yield name, path, value, functools.partial(damaged, state, path, make_value())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STATES)
@few_and_many(12, 10_000)
def test_damaged_states_are_refused_whole_or_work(kind, examples):
    found = list(cases(STATES[kind]().steps(2)))
    chosen = random.Random(0).sample(found, min(examples, len(found)))
    wrong = {}
    for name, path, value, make_state in chosen:
        state = make_state()
        if state is None:
            continue
        result = check(STATES[kind]().steps(1), name, state, path)
        if result is not None:
            wrong[name, path, value] = result
    assert not wrong


# ---- files ---------------------------------------------------------------------------------------


class Forbidden:
    """What a pickle may hold and a checkpoint may not: its reading would run code."""

    def __reduce__(self) -> tuple:
        return print, ("code of the file runs",)


def contents(whole: bytes) -> Iterator[bytes]:
    """Iterate over what may be in a file instead of a checkpoint."""
    yield b""
    yield b"PK"
    yield whole[::-1]
    yield pickle.dumps({"format": "perturbed checkpoint", "parts": Forbidden()})
    for content in ({"format": "perturbed checkpoint"}, [1], Forbidden(), torch.ones(2)):
        file = io.BytesIO()
        torch.save(content, file)
        yield file.getvalue()


def flipped(whole: bytes, position: int, bit: int) -> bytes:
    return whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]


@pytest.mark.filterwarnings("ignore")
@few_and_many(60, 6000)
def test_damaged_files_are_refused_or_give_what_was_saved(tmp_path, examples, capsys):
    """A byte that nothing reads (padding, names, dates) may differ; nothing else."""
    path, run = tmp_path / "run.pt", TRAINERS["nes"](1).steps(2)
    save_checkpoint(path, **run.parts)
    whole, saved = path.read_bytes(), run.state()
    draw = random.Random(0)
    files = list(contents(whole))
    files += [whole[: draw.randrange(len(whole))] for _ in range(examples // 4)]
    files += [
        flipped(whole, draw.randrange(len(whole)), draw.randrange(8)) for _ in range(examples)
    ]
    other = TRAINERS["nes"](2).steps(1)
    before, refused = other.state(), 0
    for content in files:
        path.write_bytes(content)
        try:
            load_checkpoint(path, **other.parts)
        except DamagedCheckpointError:
            refused += 1
            assert other.state() == before
        else:
            assert other.state() == saved
            other = TRAINERS["nes"](2).steps(1)
    assert refused > len(files) / 3
    assert capsys.readouterr().out == ""


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        load_checkpoint(tmp_path)
