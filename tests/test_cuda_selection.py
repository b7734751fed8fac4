"""What only a GPU can show of the selections, the permuted and the sign-flip operators.

Permutations, signs and moved rows are the same bits as on a CPU; so are additions of one number and
the sums of ``selection_sum``, which have an order. The tests of every device are in
test_ops_selection.py and test_ops_sign_flip.py.
"""

import pytest
import torch

from perturbed import _C, _ops
from perturbed.testing import DTYPES, assert_bitwise_equal, dtype_id

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
IN, OUT = 4 << 8 | 7, 4 << 8 | 8  # streams of layer 4

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_replace = pytest.mark.parametrize("replace", [False, True], ids=["permutation", "replace"])


def make_key(device=DEVICE, generation=2, first=0):
    return torch.tensor([_C.splitmix64(5), generation, first], device=device)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_both(op, *arguments):
    """Run an operator on the CPU and on the GPU; return the GPU's and the CPU's result."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    return op(*moved).cpu(), op(*arguments)


@each_replace
@pytest.mark.parametrize(
    ("directions", "size", "count"),
    [(1, 1, 1), (1000, 10, 7), (64, 784, 784), (3, 70000, 70000), (2, 2**20 + 7, 5000)],
)
def test_selections_are_the_cpus(directions, size, count, replace):
    assert_bitwise_equal(
        *on_both(_ops.selections, make_key("cpu"), IN, 3, directions, size, count, replace)
    )


# (R, D, T, n, columns of the result or of z)
ROWS = [
    (1, 1, 1, 1, 1),
    (2, 37, 1, 127, 127),
    (4, 9, 3, 64, 20),
    (1, 1024, 1, 256, 256),
    (8, 3, 2, 2050, 1500),
    (2, 2, 700, 12, 12),
]


@each_dtype
@each_replace
@pytest.mark.parametrize("sizes", ROWS, ids=str)
def test_select_is_the_cpus(sizes, replace, dtype):
    repeats, directions, tokens, n, count = sizes
    x = torch.randn(repeats * directions, tokens, n).to(dtype)
    key, antithetic = make_key("cpu"), repeats % 2 == 0
    options = (key, IN, directions, count)
    assert_bitwise_equal(*on_both(_ops.select, x, *options, antithetic, False, replace))
    assert_bitwise_equal(*on_both(_ops.select, x[:3], *options, False, True, replace))


@each_dtype
@each_replace
@pytest.mark.parametrize("sizes", ROWS, ids=str)
def test_select_add_is_the_cpus(sizes, replace, dtype):
    repeats, directions, tokens, m, q = sizes
    y = torch.randn(repeats * directions, tokens, m).to(dtype)
    antithetic = repeats % 2 == 0
    for rows in {repeats * directions, directions}:
        z = torch.randn(rows, tokens, q).to(dtype)
        options = (make_key("cpu"), OUT, directions, antithetic, replace)
        assert_bitwise_equal(*on_both(_ops.select_add, y, z, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@each_replace
@pytest.mark.parametrize(
    ("directions", "first", "rows", "size"),
    [(1, 0, 1, 1), (1000, 0, 10, 10), (513, 3, 97, 100), (2048, 100, 50, 1024), (70, 0, 9, 5000)],
)
def test_selection_sum_is_the_cpus(directions, first, rows, size, replace, dtype):
    weights = torch.randn(directions, dtype=dtype)
    options = (make_key("cpu"), IN, first, rows, size, replace)
    assert_bitwise_equal(*on_both(_ops.selection_sum, weights, *options))


@each_dtype
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("streams", [(IN, OUT), (IN, -1), (-1, OUT), (-1, -1)], ids=str)
@pytest.mark.parametrize(
    ("directions", "m", "n", "q", "p"),
    [(1, 1, 1, 1, 1), (1000, 10, 64, 10, 64), (37, 130, 257, 100, 30), (5, 9, 20000, 9, 9000)],
)
def test_permuted_estimate_matches_the_cpu(directions, m, n, q, p, streams, accumulate, dtype):
    grad = torch.randn(m, n).to(dtype)
    weights = torch.randn(directions, dtype=accumulator(dtype))
    base = torch.randn(q, p, dtype=accumulator(dtype))
    exact = grad.double().clone()  # of float64 too
    options = (*streams, accumulate)
    _ops.permuted_estimate_(exact, base.double(), weights.double(), make_key("cpu"), *options)
    results = []
    for _ in range(2):
        got = grad.to(DEVICE, copy=True)
        _ops.permuted_estimate_(got, base.to(DEVICE), weights.to(DEVICE), make_key(), *options)
        results.append(got.cpu())
    assert_bitwise_equal(*results)
    eps = torch.finfo(accumulator(dtype)).eps
    magnitude = weights.double().abs().sum() * base.double().abs().max() + 1
    allowed = torch.finfo(dtype).eps * exact.abs() + eps * (2 + directions / 16) * magnitude
    assert ((results[0].double() - exact).abs() <= allowed).all()


@each_dtype
@pytest.mark.parametrize("sizes", ROWS, ids=str)
def test_flips_are_the_cpus(sizes, dtype):
    repeats, directions, tokens, n, _ = sizes
    rows, antithetic = repeats * directions, repeats % 2 == 0
    x, key = torch.randn(rows, tokens, n).to(dtype), make_key("cpu")
    strided = torch.randn(rows, tokens, n + 3).to(dtype)[..., 1 : n + 1]
    for z in (x, strided):
        assert_bitwise_equal(*on_both(_ops.flip, z, key, IN, directions, antithetic, False))
        assert_bitwise_equal(*on_both(_ops.flip, z[:3], key, IN, directions, False, True))
        for part in (z, z[:directions]):
            options = (key, OUT, directions, antithetic)
            assert_bitwise_equal(*on_both(_ops.flip_add, x, part, *options))


def test_more_directions_than_the_grid_holds():
    """grid.y ends at 65,535 and a block has two directions of 300 columns; kernels loop beyond."""
    directions = 2 * 65535 + 100
    x = torch.randn(directions, 1, 300).bfloat16()
    key = make_key("cpu")
    assert_bitwise_equal(*on_both(_ops.select, x, key, IN, directions, 300, False, False, False))
    assert_bitwise_equal(*on_both(_ops.select_add, x, x, key, IN, directions, False, False))
    assert_bitwise_equal(*on_both(_ops.flip, x, key, IN, directions, False, False))
    assert_bitwise_equal(*on_both(_ops.flip_add, x, x, key, IN, directions, False))


def test_more_passes_than_the_grid_holds():
    """grid.z ends at 65,535 passes of 16 rows of one direction."""
    x, key = torch.randn(1, 16 * 65535 + 50, 3), make_key("cpu")
    assert_bitwise_equal(*on_both(_ops.select, x, key, IN, 1, 3, False, False, False))
    assert_bitwise_equal(*on_both(_ops.flip_add, x, x, key, IN, 1, False))


# ---- streams, graphs ---------------------------------------------------------------------------


def every_op(x, weights, base, key):
    """Run all of them once; the results depend on every argument."""
    directions = weights.shape[0]
    y, grad = torch.zeros_like(x), torch.zeros_like(base)
    selected = _ops.select(x, key, IN, directions, x.shape[-1], True, False, False)
    _ops.select_add_(y, selected, key, OUT, directions, True, False)
    flipped = _ops.flip(selected, key, IN, directions, True, False)
    _ops.flip_add_(y, flipped, key, OUT, directions, True)
    _ops.permuted_estimate_(grad, base, weights, key, IN, OUT, False)
    sums = _ops.selection_sum(weights, key, IN, 0, 12, 20, False)
    entries = _ops.selections(key, IN, 0, directions, 20, 20, False)
    return y, grad, sums, entries


def tensors():
    x = torch.randn(128, 1, 48, device=DEVICE)
    return x, torch.randn(64, device=DEVICE), torch.randn(40, 48, device=DEVICE)


def test_no_op_synchronises():
    arguments = (*tensors(), make_key())
    every_op(*arguments)  # the first call loads the module, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_graph_draws_what_the_key_holds():
    arguments, key = tensors(), make_key()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        every_op(*arguments, key)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_op(*arguments, key)
    seen = []
    for generation in (7, 8):
        key[1].fill_(generation)
        graph.replay()
        for result, eager in zip(results, every_op(*arguments, key), strict=True):
            assert_bitwise_equal(result, eager)
        seen.append([result.clone() for result in results])
    assert all((a != b).any() for a, b in zip(*seen, strict=True))


def test_the_current_stream_is_used():
    """A kernel on the default stream would not wait for the slow producer on this one."""
    x, *others = tensors()
    expected = every_op(x, *others, make_key())
    key, late = make_key(), torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        late.copy_(x)
        results = every_op(late, *others, key)
    stream.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert_bitwise_equal(result, wanted)
