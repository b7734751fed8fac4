"""Random layers with random noise: every row is its member, every estimate the members' sum.

`pm.member(d, sign)` is an ordinary module, so that plain torch is the reference of a forward, and
what members differ by is that of an estimate. The strategies are in strategies.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st
from strategies import LAYERS, SIGMA, Case, cases, examine, few_and_many
from torch import Tensor, nn

import perturbed
from perturbed.testing import assert_bitwise_equal

# What families say of a weight that they do not fit, and variants of an option.
MISFITS = ("permutation", "sparsity", "rank must be at most", "remember no bests")
TOLERANCE = 1e-11  # of float64 sums of numbers of about 1

each_layer = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def fitting(make: Callable[[], Any]) -> Any:
    """Make a population, or drop the case if the family refuses the sizes of a layer."""
    try:
        return make()
    except ValueError as error:
        if not any(words in str(error) for words in MISFITS):
            raise
        reject()


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def members_of(case: Case) -> dict[tuple[int, int], list[int]]:
    """Some members and their rows: those of the first and last row, and of one in between."""
    chosen = {0, case.rows - 1, case.seed % case.rows} if case.rows else set()
    keys = {(b % case.directions, case.sign(b)) for b in chosen}
    rows: dict[tuple[int, int], list[int]] = {key: [] for key in keys}
    for b in range(case.rows):
        key = b % case.directions, case.sign(b)
        if key in rows:
            rows[key].append(b)
    return rows


# ---- forward -------------------------------------------------------------------------------------


@torch.no_grad()
def check_rows(case: Case) -> None:
    _, pm = fitting(case.population)
    inputs = case.batch()
    before = [x.clone() for x in inputs]
    together = case.layer.results(pm(*inputs))
    for x, old in zip(inputs, before, strict=True):
        assert_bitwise_equal(x, old)
    for (d, sign), rows in members_of(case).items():
        alone = case.layer.results(pm.member(d, sign)(*(x[rows] for x in inputs)))
        for got, expected in zip(together, alone, strict=True):
            close(got[rows], expected)


@each_layer
@few_and_many(8, 700)
def test_rows_are_their_members(layers, examples):
    examine(check_rows, examples, case=cases(layers))


@torch.no_grad()
def check_replicated(case: Case, n: int) -> None:
    _, pm = fitting(case.population)
    inputs = case.batch(n)
    short = case.layer.results(pm(*(pm.replicate(x) for x in inputs)))
    full = case.layer.results(pm(*(pm.replicate(x).full() for x in inputs)))
    for got, expected in zip(short, full, strict=True):
        close(got, expected)


@each_layer
@few_and_many(2, 150)
def test_replicated_rows_are_rows(layers, examples):
    even = cases(layers).filter(lambda case: case.antithetic is not True)
    examine(check_replicated, examples, case=even, n=st.sampled_from([0, 1, 2, 5]))


@torch.no_grad()
def check_order(case: Case) -> None:
    """Repeats of one sign may change places, and those of a batch without signs may come apart."""
    _, pm = fitting(case.population)
    inputs = case.batch()
    whole = case.layer.results(pm(*inputs))
    repeats = torch.arange(case.rows).view(case.repeats, case.directions)
    halves = repeats.chunk(2) if case.negated else (repeats,)
    order = torch.cat([half[torch.randperm(len(half))] for half in halves]).flatten()
    moved = case.layer.results(pm(*(x[order] for x in inputs)))
    for got, expected in zip(moved, whole, strict=True):
        close(got, expected[order])
    if case.antithetic is False and case.repeats:
        rows = case.directions * (case.seed % case.repeats + 1)
        part = case.layer.results(pm(*(x[:rows] for x in inputs)))
        for got, expected in zip(part, whole, strict=True):
            close(got, expected[:rows])


@each_layer
@few_and_many(2, 100)
def test_order_and_number_of_repeats_do_not_matter(layers, examples):
    examine(check_order, examples, case=cases(layers))


# ---- estimates -----------------------------------------------------------------------------------


def check_estimate(case: Case) -> None:
    net, pm = fitting(case.population)
    with torch.no_grad():
        pm(*case.batch())  # noise with storage="stored" is now held
    weights = torch.randn(case.directions, dtype=torch.float64)
    expected = {name: torch.zeros_like(p) for name, p in net[0].named_parameters()}
    for d, weight in enumerate(weights):
        for name, p in pm.member(d).named_parameters():
            expected[name] += weight * (p - net[0].get_parameter(name)).detach()
    pm.set_grad(weights)
    for name, p in net[0].named_parameters():
        close(p.grad, expected[name])
    # Once more, in two windows.
    cut = case.seed % case.directions
    for first, last in ((0, cut), (cut, case.directions)):
        if first < last:
            with pm.window(first, last - first):
                pm.set_grad(weights[first:last], accumulate=True)
    for name, p in net[0].named_parameters():
        close(p.grad, 2 * expected[name])


@each_layer
@few_and_many(2, 150)
def test_estimates_are_weighted_sums_of_what_members_differ_by(layers, examples):
    examine(check_estimate, examples, case=cases(layers))


@torch.no_grad()
def check_window(case: Case, first: int, count: int) -> None:
    _, pm = fitting(case.population)
    inputs = case.batch()
    whole = case.layer.results(pm(*inputs))
    first, count = first % case.directions, count % case.directions + 1
    count = min(count, case.directions - first)
    with pm.window(first, count):
        part = case.layer.results(pm(*(pm.window_rows(x) for x in inputs)))
    for got, all_rows in zip(part, whole, strict=True):
        rows = all_rows.unflatten(0, (case.repeats, case.directions))[:, first : first + count]
        close(got, rows.flatten(0, 1))
    for got, same in zip(case.layer.results(pm(*inputs)), whole, strict=True):
        assert_bitwise_equal(got, same)


@each_layer
@few_and_many(2, 100)
def test_windows_see_the_noise_of_the_whole_population(layers, examples):
    number = st.integers(0, 16)
    examine(check_window, examples, case=cases(layers), first=number, count=number)


# ---- dtypes --------------------------------------------------------------------------------------


def perturbed_copy(case: Case, net: nn.Module, d: int, sign: int, dtype: torch.dtype) -> nn.Module:
    """The torch layer of a member from the definition, W + s sigma E_d in `dtype`."""
    plain = perturbed.revert(copy.deepcopy(net[0])).double()
    for name, parameter in plain.named_parameters():
        module, _, own = name.rpartition(".")
        noise = net[0].get_submodule(module).parameter_noise(own, d, 1)[0]
        parameter.add_(sign * SIGMA * noise.double())
    return plain.to(dtype)


@torch.no_grad()
def check_dtype(case: Case) -> None:
    """Errors are at most four times plain torch's, or of as many units in the last place."""
    net, pm = fitting(case.population)
    inputs = case.batch()
    together = case.layer.results(pm(*inputs))
    for (d, sign), rows in members_of(case).items():
        here = [x[rows] for x in inputs]
        wide = [x.double() if x.is_floating_point() else x for x in here]
        plain = case.layer.results(perturbed_copy(case, net, d, sign, case.dtype)(*here))
        exact = case.layer.results(perturbed_copy(case, net, d, sign, torch.float64)(*wide))
        for got, same, expected in zip(together, plain, exact, strict=True):
            assert got.dtype == same.dtype
            if got.numel() == 0 or not rows:
                continue
            ulp = torch.finfo(case.dtype).eps * max(1.0, float(expected.abs().max()))
            limit = 4 * float((same - expected).abs().max()) + 4 * ulp
            assert float((got[rows] - expected).abs().max()) <= limit


@each_layer
@few_and_many(2, 100)
def test_every_dtype_is_about_as_accurate_as_plain_torch(layers, examples):
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    examine(check_dtype, examples, case=cases(layers, dtypes))
