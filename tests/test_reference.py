"""The reference twins themselves, against loops over rows that spell the definitions out.

test_ops_dense.py has the dense family's. Permutations: test_noise_selection.py.
"""

import dataclasses
import inspect

import pytest
import torch
from ops import SIGMA, each_distribution, make_key
from test_ops_low_rank import BIAS, A, B, LowRankCase
from test_ops_selection import IN as SELECT_IN
from test_ops_selection import AddCase as SelectAddCase
from test_ops_selection import SelectCase, each_mode, each_way
from test_ops_selection import estimate_arguments as permuted_estimate_arguments
from test_ops_sign_flip import SIGNS, FlipCase
from test_ops_sign_flip import AddCase as FlipAddCase
from test_ops_sparse import COLUMNS, VALUES, SparseCase
from test_ops_sparse import estimate_arguments as sparse_estimate_arguments

from perturbed import _ops, reference
from perturbed.testing import assert_bitwise_equal


def operators():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("perturbed::") for n in names if n.startswith("perturbed::"))


@pytest.mark.parametrize("name", operators())
def test_operator_wrapper_and_twin_take_the_same_arguments(name):
    """In the order of the schema; `exact` is the only one that a twin has besides."""
    arguments = [a.name for a in getattr(torch.ops.perturbed, name).default._schema.arguments]
    assert list(inspect.signature(getattr(_ops, name)).parameters) == arguments
    twin = inspect.signature(getattr(reference, name.removesuffix("_"))).parameters
    by_position = [n for n, p in twin.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == arguments
    assert set(twin) - set(by_position) <= {"exact"}
    assert {*_ops.__all__} == set(operators())


@each_distribution
@pytest.mark.parametrize("projected", [False, True])
def test_low_rank_linear(rademacher, projected):
    case = LowRankCase(4, 3, 2, 5, 6, antithetic=True, rank=2, shared=0 if projected else 2)
    if projected:
        case = dataclasses.replace(case, projected=2)
    arguments = case.arguments(torch.float64, rademacher)
    y, x, key = arguments["y"], arguments["x"], arguments["key"]
    draw = (rademacher, torch.float64)
    a = reference.dense_materialise(key, A, 0, 3, 2, 5, *draw)
    b = reference.dense_materialise(key, B, 0, 3, 2, 6, *draw)
    bias = reference.dense_materialise(key, BIAS, 0, 3, 1, 5, *draw)
    got = reference.low_rank_linear(**arguments)
    for row in range(12):
        repeat, d = divmod(row, 3)
        sign = 1 if repeat < 2 else -1
        for t in range(2):
            products = x[row % 6, t] if projected else b[d] @ x[repeat % 2, t]
            delta = a[d].T @ products / 2**0.5 + bias[d, 0]
            torch.testing.assert_close(got[row, t], y[row, t] + sign * SIGMA * delta)


@each_distribution
def test_sparse_linear_and_estimate(rademacher):
    case = SparseCase(4, 3, 2, 5, 6, antithetic=True, shared=2, count=4)
    arguments = case.arguments(torch.float64, rademacher)
    y, x, key = arguments["y"], arguments["x"], arguments["key"]
    draw = (rademacher, torch.float64)
    values = reference.dense_materialise(key, VALUES, 0, 3, 4, 5, *draw)
    bias = reference.dense_materialise(key, BIAS, 0, 3, 1, 5, *draw)
    index = reference.permutation(key, COLUMNS, 0, 3, 6, 4)
    noise = torch.zeros(3, 5, 6, dtype=torch.float64)
    for d in range(3):
        for j in range(4):
            noise[d, :, index[d, j]] = (6 / 4) ** 0.5 * values[d, j]
    got = reference.sparse_linear(**arguments)
    for row in range(12):
        repeat, d = divmod(row, 3)
        sign = 1 if repeat < 2 else -1
        for t in range(2):
            delta = noise[d] @ x[repeat % 2, t] + bias[d, 0]
            torch.testing.assert_close(got[row, t], y[row, t] + sign * SIGMA * delta)
    arguments = sparse_estimate_arguments(3, 5, 6, 4, torch.float64, rademacher) | {"key": key}
    expected = SIGMA * torch.einsum("d,dij->ij", arguments["weights"], noise)
    torch.testing.assert_close(reference.sparse_estimate(**arguments), arguments["grad"] + expected)


@each_way
def test_selections_of_rows(replace):
    d, size = 3, 7
    key = make_key()
    index = reference.selections(key, SELECT_IN, 0, d, size, size, replace).tolist()
    case = SelectCase(2, d, 2, 4, size, antithetic=True)
    x = (arguments := case.arguments(torch.float64, replace))["x"]
    got = reference.select(**arguments)
    shared = SelectCase(2, d, 2, 4, size, shared=2).arguments(torch.float64, replace)
    spread = reference.select(**shared)
    for row in range(2 * d):
        for j in range(4):
            picked = index[row % d][j]
            assert_bitwise_equal(got[row, :, j], (1 if row < d else -1) * x[row, :, picked])
            assert_bitwise_equal(spread[row, :, j], shared["x"][row // d, :, picked])

    arguments = SelectAddCase(4, d, 2, size, 5, antithetic=True, copies=2).arguments(
        torch.float64, replace
    ) | {"stream": SELECT_IN}
    y, z = arguments["y"], arguments["z"]
    got = reference.select_add(**arguments)
    for row in range(4 * d):
        for i in range(size):
            picked = index[row % d][i]
            added = z[row % (2 * d), :, picked] if picked < 5 else 0.0
            sign = 1 if row < 2 * d else -1
            assert_bitwise_equal(got[row, :, i], y[row, :, i] + sign * added)

    weights = torch.randn(d, dtype=torch.float64)
    got = reference.selection_sum(weights, key, SELECT_IN, 2, 4, size, replace)
    expected = torch.zeros(4, size, dtype=torch.float64)
    for w, entries in zip(weights, index, strict=True):
        for j in range(4):
            expected[j, entries[2 + j]] += w
    assert_bitwise_equal(got, expected)


@each_mode
def test_permuted_estimate(mode):
    arguments = permuted_estimate_arguments((3, 6, 7, 4, 5), mode, torch.float64)
    key, base, expected = arguments["key"], arguments["base"], arguments["grad"].clone()
    rows, columns = (
        reference.permutation(key, stream, 0, 3, size, size)
        if stream >= 0
        else torch.arange(size).expand(3, size)
        for stream, size in ((arguments["out_stream"], 6), (arguments["in_stream"], 7))
    )
    for d, w in enumerate(arguments["weights"]):
        for i in range(6):
            if rows[d, i] < 4:
                for j in range(5):
                    expected[i, columns[d, j]] += w * base[rows[d, i], j]
    torch.testing.assert_close(reference.permuted_estimate(**arguments), expected)


def test_flips():
    d, size = 3, 37
    signs = reference.dense_materialise(make_key(), SIGNS, 0, d, 1, size, True, torch.float64)
    x = (arguments := FlipCase(2, d, 2, size, size, antithetic=True).arguments(torch.float64))["x"]
    shared = FlipCase(2, d, 2, size, size, shared=2).arguments(torch.float64)
    add = FlipAddCase(4, d, 2, size, size, antithetic=True, copies=2).arguments(torch.float64)
    moved, spread = reference.flip(**arguments), reference.flip(**shared)
    added = reference.flip_add(**add)
    for row in range(2 * d):
        assert_bitwise_equal(moved[row], (1 if row < d else -1) * signs[row % d] * x[row])
        assert_bitwise_equal(spread[row], signs[row % d] * shared["x"][row // d])
    for row in range(4 * d):
        delta = (1 if row < 2 * d else -1) * signs[row % d] * add["z"][row % (2 * d)]
        assert_bitwise_equal(added[row], add["y"][row] + delta)
