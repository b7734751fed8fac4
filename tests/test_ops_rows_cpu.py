"""Low rank and sparse on the CPU: paths that only large shapes take, and bits they must share.

Noise is held 128 KiB at a time and a draw serves 128 rows of x (csrc/cpu/expansion.h): these shapes
need several pieces or several groups. What every device does: test_ops_low_rank.py,
test_ops_sparse.py.
"""

import pytest
import torch

from perturbed import _C, _ops, reference
from perturbed.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_close_to_reference,
    cpu_capability,
    dtype_id,
)

each_distribution = pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "signs"])
SIGMA = torch.tensor(0.3, dtype=torch.float64)

# R, D, T, out, in, antithetic, shared rows, rank or count
IN_PIECES = [(2, 2, 1, 3000, 70, True, 0, 13), (1, 1, 2, 2100, 2100, False, 1, 18)]
IN_GROUPS = [(300, 2, 1, 40, 64, True, 0, 4), (4, 1, 200, 17, 33, True, 2, 3)]
IN_BOTH = [(2, 1, 90, 2000, 130, True, 0, 18)]
CASES = IN_PIECES + IN_GROUPS + IN_BOTH


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request):
    with cpu_capability(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fast_noise(monkeypatch):
    """Let the reference draw through the operator, which test_noise_layout.py ties to it."""
    monkeypatch.setattr(
        reference.noise, "dense_materialise", lambda *args, exact: _ops.dense_materialise(*args)
    )


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_key(first=0):
    return torch.tensor([_C.splitmix64(7), 2, first])


def make_call(family, case, rademacher):
    """The operator's name, the reference twin, and the arguments behind y and x."""
    _, directions, *_, antithetic, _, number = case
    tail = (5 << 8 | 1, directions, number, antithetic, rademacher)
    streams = {"low_rank": (5 << 8 | 2, 5 << 8 | 3), "sparse": (5 << 8 | 9, 5 << 8 | 10)}[family]
    name = f"{family}_linear"
    return getattr(_ops, name), getattr(reference, name), (make_key(), SIGMA, *streams, *tail)


def make_rows(case, dtype):
    repeats, directions, tokens, out, inputs, _, shared, _ = case
    y = torch.randn(repeats * directions, tokens, out).to(dtype)
    x = torch.randn(shared or repeats * directions, tokens, inputs).to(dtype)
    return y, x


@each_distribution
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", ["low_rank", "sparse"])
def test_pieces_and_groups(family, case, dtype, rademacher):
    op, twin, arguments = make_call(family, case, rademacher)
    y, x = make_rows(case, dtype)
    actual = op(y, x, *arguments)
    expected = twin(y.double(), x.double(), *arguments)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * expected.abs().max())
    else:
        assert_close_to_reference(actual, twin(y, x, *arguments), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("family", ["low_rank", "sparse"])
def test_threads_give_the_same_bits(family, case, capability, one_thread):
    op, _, arguments = make_call(family, case, False)
    y, x = make_rows(case, torch.float32)
    one = op(y, x, *arguments)
    torch.set_num_threads(3)
    assert_bitwise_equal(op(y, x, *arguments), one)


@pytest.mark.parametrize("inputs", [64, 50], ids=["in_place", "packed"])
@pytest.mark.parametrize("family", ["low_rank", "sparse"])
def test_row_does_not_depend_on_its_company(family, inputs, capability):
    # One row of x is multiplied with several of B, several rows with one of B: the same bits.
    y, x = torch.randn(7, 1, 40), torch.randn(7, 1, inputs)
    op, _, arguments = make_call(family, (7, 1, 1, 40, inputs, False, 0, 5), False)
    together = op(y, x, *arguments)
    alone = [op(y[i : i + 1], x[i : i + 1], *arguments) for i in range(7)]
    assert_bitwise_equal(torch.cat(alone), together)
    as_tokens = op(y.transpose(0, 1).contiguous(), x.transpose(0, 1), *arguments)
    assert_bitwise_equal(as_tokens.transpose(0, 1), together)


@each_distribution
def test_antithetic_rows_are_exact_negatives(rademacher, capability):
    small, pieces = (2, 3, 1, 50, 70, True, 0, 4), (2, 2, 1, 3000, 70, True, 1, 13)
    for family, case in (("low_rank", small), ("sparse", small), ("low_rank", pieces)):
        op, _, arguments = make_call(family, case, rademacher)
        _, x = make_rows(case, torch.float32)
        if x.shape[0] > 1:
            x = torch.cat([x[: len(x) // 2]] * 2)
        out = op(torch.zeros(2 * case[1], 1, case[3]), x, *arguments)
        plus, minus = out.chunk(2)
        assert bool((plus != 0).any())
        assert_bitwise_equal(minus, -plus)


@each_distribution
@pytest.mark.parametrize(("rows", "cols", "count"), [(300, 40, 3), (520, 17, 17), (1, 900, 9)])
def test_sparse_estimate_of_many_tiles(rows, cols, count, rademacher, capability, one_thread):
    arguments = (make_key(), SIGMA, 5 << 8 | 9, 5 << 8 | 10, count, rademacher)
    weights, before = torch.randn(50), torch.randn(rows, cols)
    for accumulate in (False, True):
        torch.set_num_threads(1)
        grad = before.clone()
        _ops.sparse_estimate_(grad, weights, *arguments, accumulate)
        twin = reference.sparse_estimate
        assert_close_to_reference(
            grad,
            twin(before, weights, *arguments, accumulate),
            twin(before.double(), weights.double(), *arguments, accumulate),
        )
        again = before.clone()
        torch.set_num_threads(3)
        _ops.sparse_estimate_(again, weights, *arguments, accumulate)
        assert_bitwise_equal(again, grad)
