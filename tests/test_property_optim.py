"""Random optimizers: a generation in chunks is the whole one, a saved run goes on bit for bit.

And of random layers: conversion leaves no trace, a saved draw is drawn again.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from searches import METHODS, make, parameters, quadratic
from strategies import LAYERS, Case, cases, examine, families, few_and_many
from test_property_layers import fitting
from torch import Tensor, nn

import perturbed
from perturbed import ARS, NES, PGPE, PSO, SNES, Explicit, PerturbedModel
from perturbed.noise import NoiseFamily
from perturbed.optim import RDSA, SHAPINGS, VARIANTS
from perturbed.testing import assert_bitwise_equal

STEPS = 4


def saved(state: Any) -> Any:
    """A state as a file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(*parts: Any) -> list[Any]:
    return copy.deepcopy([part.state_dict() for part in parts])


# ---- populations ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """An optimizer of a population with options, which `start` makes."""

    kind: type
    options: tuple[tuple[str, Any], ...]
    noise: NoiseFamily
    directions: int
    antithetic: bool | None
    hidden: int
    seed: int

    def start(self, **more: Any) -> tuple[nn.Module, Any, Any]:
        """Make the network, its optimizer and a step."""
        torch.manual_seed(self.seed)
        net = nn.Sequential(nn.Linear(4, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 2))
        x = torch.randn(3, 4, dtype=torch.float64)
        perturbed.convert(net.double(), self.directions, self.noise)
        pm = PerturbedModel(net, self.directions, self.antithetic, sigma=0.1, seed=self.seed)
        options = {**dict(self.options), **more}
        if self.kind in (NES, RDSA):
            name = "optimizer" if self.kind is NES else "opt"
            options[name] = torch.optim.Adam(net.parameters(), 0.03)
        optimizer = self.kind(pm, **options)
        return net, optimizer, lambda: optimizer.step(lambda: self.loss(pm, x))

    def loss(self, pm: PerturbedModel, x: Tensor) -> Tensor:
        return (pm(pm.replicate(x)) - 1).square().mean(1)


maximize = st.sampled_from([("maximize", True), ("maximize", False)])
OPTIONS: dict[type, st.SearchStrategy[tuple]] = {
    NES: st.tuples(
        st.sampled_from([("shaping", name) for name in SHAPINGS]),
        st.sampled_from([("weight_decay", 0.0), ("weight_decay", 0.1)]),
        st.sampled_from([("reuse", 1), ("reuse", 2)]),
        maximize,
    ),
    ARS: st.tuples(st.sampled_from([("top", None), ("top", 1), ("top", 2)]), maximize),
    SNES: st.tuples(st.sampled_from([("mirrored", True), ("mirrored", False)]), maximize),
    PGPE: st.tuples(st.sampled_from([("shaping", name) for name in SHAPINGS]), maximize),
    PSO: st.tuples(
        st.sampled_from([("variant", name) for name in VARIANTS]),
        st.sampled_from([("bounds", None), ("bounds", (-2, 2))]),
        st.sampled_from([("reevaluate", True), ("reevaluate", False)]),
        maximize,
    ),
    RDSA: st.just(()),
}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from(list(OPTIONS)))
    sampled = kind in (NES, ARS, RDSA)
    pairs = kind in (ARS, RDSA) or (kind is NES and draw(st.booleans()))
    return Plan(
        kind,
        draw(OPTIONS[kind]),
        draw(families) if sampled else Explicit(),
        2 * draw(st.integers(1, 4)),
        (True if pairs else None) if sampled else None,
        draw(st.integers(2, 6)),
        draw(st.integers(0, 2**16)),
    )


def started(plan: Plan, **more: Any) -> tuple[nn.Module, Any, Any]:
    """Start a plan, or drop it if its family does not fit the network."""
    return fitting(lambda: plan.start(**more))


def check_chunks(plan: Plan, chunk: int) -> None:
    net, _, step = started(plan)
    other, _, other_step = started(plan, chunk=chunk)
    for _ in range(STEPS):
        torch.testing.assert_close(other_step(), step(), rtol=1e-9, atol=1e-9)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@few_and_many(6, 500)
def test_chunks_give_what_the_whole_gives(examples):
    examine(check_chunks, examples, plan=plans(), chunk=st.integers(1, 9))


def check_resumed(plan: Plan, at: int, chunk: int | None) -> None:
    net, optimizer, step = started(plan, chunk=chunk)
    for _ in range(at):
        step()
    states = saved(state_of(net, optimizer))
    expected = [step() for _ in range(STEPS - at)]
    again, other, other_step = started(plan, chunk=chunk)
    for part, state in zip((again, other), states, strict=True):
        part.load_state_dict(state)
    for value in expected:
        assert_bitwise_equal(other_step(), value)
    for p, q in zip(again.parameters(), net.parameters(), strict=True):
        assert_bitwise_equal(p, q)


@few_and_many(6, 500)
def test_a_saved_run_goes_on_bit_for_bit(examples):
    chunk = st.none() | st.integers(1, 9)
    examine(check_resumed, examples, plan=plans(), at=st.integers(0, STEPS), chunk=chunk)


# ---- searches of one loss ------------------------------------------------------------------------


def check_search(name: str, seed: int, at: int, half: bool) -> None:
    dtype = torch.float32 if half else torch.float64
    points, again = parameters(dtype), parameters(dtype)
    search = make(name, points, seed=seed)
    for _ in range(at):
        search.step(lambda: quadratic(points))
    states = saved([search.state_dict(), [p.detach() for p in points]])
    inner = saved(search.opt.state_dict()) if getattr(search, "opt", None) else None
    other = make(name, again, seed=seed + 1)
    with torch.no_grad():
        for p, q in zip(again, states[1], strict=True):
            p.copy_(q)
    other.load_state_dict(states[0])
    if inner is not None and "opt" not in states[0]:
        other.opt.load_state_dict(inner)
    for _ in range(3):
        expected = float(search.step(lambda: quadratic(points)))
        assert float(other.step(lambda: quadratic(again))) == expected
    for p, q in zip(again, points, strict=True):
        assert_bitwise_equal(p, q)


@pytest.mark.parametrize("name", METHODS)
@few_and_many(2, 40)
def test_a_saved_search_goes_on_bit_for_bit(name, examples):
    def check(seed: int, at: int, half: bool) -> None:
        check_search(name, seed, at, half)

    seeds, steps = st.integers(-(2**63), 2**63 - 2), st.integers(0, 9)
    examine(check, examples, seed=seeds, at=steps, half=st.booleans())


# ---- conversion and draws ------------------------------------------------------------------------


def check_reverted(case: Case) -> None:
    net, _ = fitting(case.population)
    plain = case.layer.kind(*case.layer.arguments, **case.layer.options).eval().to(case.dtype)
    parts = {name: id(p) for name, p in net.named_parameters()}
    perturbed.revert(net)
    assert {name: id(p) for name, p in net.named_parameters()} == parts
    for ours, theirs in zip(net[0].modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))


def check_saved_draw(case: Case) -> None:
    _, pm = fitting(case.population)
    for _ in range(case.seed % 3):
        pm.set_noise()
    torch.manual_seed(case.seed)
    inputs = case.batch()
    _, other = dataclasses.replace(case, seed=case.seed + 1).population()
    other.load_state_dict(saved(pm.state_dict()))
    with torch.no_grad():
        results = [case.layer.results(model(*inputs)) for model in (pm, other)]
    for ours, theirs in zip(*results, strict=True):
        assert_bitwise_equal(theirs, ours)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("check", [check_reverted, check_saved_draw])
@few_and_many(2, 40)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conversion_leaves_no_trace_and_draws_come_back(check, layers, examples):
    examine(check, examples, case=cases(layers))
