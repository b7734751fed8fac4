"""What only a GPU can show: CUDA operators against the CPU's, captured graphs, streams, huge grids.

Most tests of the operators run on every device where they stand (test_ops_dense.py,
test_noise_layout.py); here is the rest. Signs are the same bits on both devices. Fast normals may
differ from the CPU's by 4e-6 (99.98 % of elements) and 5e-4 (always), see docs/conventions.md.
"""

import pytest
import torch

import perturbed
from perturbed import _C, _ops
from perturbed.testing import DTYPES, assert_bitwise_equal, dtype_id

pytestmark = pytest.mark.cuda

WEIGHT, BIAS = 4 << 8, 4 << 8 | 1  # streams of layer 4
FACTOR_A, FACTOR_B, COLUMNS, VALUES = (4 << 8 | stream for stream in (2, 3, 9, 10))
SIGMA = 0.3

each_distribution = pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "signs"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def make_key(device="cuda", generation=2, first=0):
    return torch.tensor([_C.splitmix64(5), generation, first], device=device)


def make_sigma(device="cuda", sigma=SIGMA):
    return torch.tensor(sigma, dtype=torch.float64, device=device)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(cuda, cpu, magnitude, largest, terms, rademacher):
    """Compare a sum over noise with the CPU's.

    Args:
        cuda: result of the kernel.
        cpu: the CPU's result in float64.
        magnitude: sigma times the sum of |factors|, which summation errors scale with.
        largest: sigma times the largest |factor|.
        terms: number of terms of a sum.
        rademacher: whether the noise was signs.
    """
    eps = torch.finfo(accumulator(cuda.dtype)).eps
    allowed = torch.finfo(cuda.dtype).eps * cpu.abs() + eps * (4 + terms / 16) * magnitude
    if not rademacher:
        # Up to 4e-6 in every term, and one term in 5,000 up to 5e-4 where |E| is tiny.
        allowed = allowed + 4e-6 * magnitude + 5e-4 * largest * (1 + terms / 1000)
    error = (cuda.cpu().double() - cpu).abs()
    worst = (error / allowed).max()
    assert worst <= 1, f"largest error is {worst:.3g} of what is allowed"


# (R, D, T, out, in, shared rows)
LINEARS = [
    (1, 1, 1, 1, 1, 0),
    (1, 1024, 1, 64, 256, 0),
    (2, 37, 1, 65, 127, 0),
    (2, 64, 1, 128, 784, 1),
    (4, 9, 3, 10, 64, 2),
    (8, 5, 1, 33, 130, 0),
    (11, 3, 1, 7, 1000, 0),
    (23, 2, 1, 40, 96, 0),
]


@each_distribution
@each_dtype
@pytest.mark.parametrize("sizes", LINEARS, ids=str)
def test_linear_matches_the_cpu(sizes, dtype, rademacher):
    repeats, directions, tokens, out, inputs, shared = sizes
    antithetic = repeats % 2 == 0
    rows = repeats * directions
    y = torch.randn(rows, tokens, out).to(dtype)
    x = torch.randn(shared or rows, tokens, inputs).to(dtype)
    options = (WEIGHT, BIAS, directions, antithetic, rademacher)
    expected = _ops.dense_linear(
        y.double(), x.double(), make_key("cpu"), make_sigma("cpu"), *options
    )
    got = _ops.dense_linear(y.cuda(), x.cuda(), make_key(), make_sigma(), *options)
    magnitude = SIGMA * (x.double().abs().sum(-1).max() + 1) * 2
    largest = SIGMA * max(1.0, float(x.double().abs().max()))
    assert_close(got, expected, magnitude, largest, inputs + 1, rademacher)


@each_distribution
@each_dtype
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (1024, 64, 256), (37, 65, 127), (1000, 9, 130), (300, 1024, 1025)],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
def test_estimate_matches_the_cpu(sizes, dtype, rademacher, accumulate):
    directions, rows, cols = sizes
    grad = torch.randn(rows, cols).to(dtype)
    weights = torch.randn(directions, dtype=accumulator(dtype))
    expected = grad.double().clone()  # grad itself is what the kernel starts from
    options = (WEIGHT, rademacher, accumulate)
    _ops.dense_estimate_(expected, weights.double(), make_key("cpu"), make_sigma("cpu"), *options)
    results = []
    for _ in range(2):
        got = grad.cuda()
        _ops.dense_estimate_(got, weights.cuda(), make_key(), make_sigma(), *options)
        results.append(got)
    assert_bitwise_equal(*results)
    magnitude = SIGMA * weights.double().abs().sum() + 1
    largest = SIGMA * float(weights.abs().max())
    assert_close(got, expected, magnitude, largest, directions, rademacher)


each_family = pytest.mark.parametrize("family", ["low_rank", "sparse"])


def check_thin_noise(family, sizes, rank, dtype, rademacher):
    """Compare y += s sigma (scale F^T t + e), F of ``rank`` rows, with the CPU's.

    t is B x for low rank, and elements of x for sparse noise.
    """
    repeats, directions, tokens, out, inputs, shared = sizes
    rows = repeats * directions
    y = torch.randn(rows, tokens, out).to(dtype)
    x = torch.randn(shared or rows, tokens, inputs).to(dtype)

    def size(stream, cols):
        noise = (stream, 0, directions, rank, cols, rademacher, torch.float64)
        return _ops.dense_materialise(make_key("cpu"), *noise).abs()

    largest_x = x.double().abs().amax((0, 1))
    if family == "low_rank":
        op, streams, scale = _ops.low_rank_linear, (FACTOR_A, FACTOR_B, BIAS), rank**-0.5
        factor, products = size(FACTOR_A, out), size(FACTOR_B, inputs) @ largest_x
    else:
        op, streams, scale = _ops.sparse_linear, (COLUMNS, VALUES, BIAS), (inputs / rank) ** 0.5
        factor, products = size(VALUES, out), largest_x.max().expand(directions, rank)
    options = (*streams, directions, rank, repeats % 2 == 0, rademacher)
    expected = op(y.double(), x.double(), make_key("cpu"), make_sigma("cpu"), *options)
    got = op(y.cuda(), x.cuda(), make_key(), make_sigma(), *options)
    magnitude = SIGMA * (scale * torch.einsum("dqo,dq->do", factor, products).max() + 6)
    # An error of F meets t, one of B meets F and x.
    largest = SIGMA * (1 + scale * float(max(products.max(), factor.max() * largest_x.max())))
    assert_close(got, expected, 2 * magnitude, largest, rank * (inputs + 1), rademacher)


@each_family
@each_distribution
@each_dtype
@pytest.mark.parametrize("sizes", LINEARS, ids=str)
def test_thin_noise_matches_the_cpu(sizes, dtype, rademacher, family):
    for rank in (1, 2, 7):
        check_thin_noise(family, sizes, min(rank, sizes[4]), dtype, rademacher)


@each_family
@each_distribution
def test_more_thin_noise_than_shared_memory_holds(rademacher, family):
    check_thin_noise(family, (2, 3, 1, 5000, 700, 0), 600, torch.float32, rademacher)
    check_thin_noise(family, (2, 1000, 1, 4, 70, 0), 70, torch.float32, rademacher)


@each_distribution
@each_dtype
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (1024, 64, 256, 1), (37, 65, 127, 127), (1000, 9, 130, 7), (300, 700, 65, 3)],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
def test_sparse_estimate_matches_the_cpu(sizes, dtype, rademacher, accumulate):
    directions, rows, cols, count = sizes
    grad = torch.randn(rows, cols).to(dtype)
    weights = torch.randn(directions, dtype=accumulator(dtype))
    expected = grad.double().clone()  # grad itself is what the kernel starts from
    options = (COLUMNS, VALUES, count, rademacher, accumulate)
    _ops.sparse_estimate_(expected, weights.double(), make_key("cpu"), make_sigma("cpu"), *options)
    results = []
    for _ in range(2):
        got = grad.cuda()
        _ops.sparse_estimate_(got, weights.cuda(), make_key(), make_sigma(), *options)
        results.append(got)
    assert_bitwise_equal(*results)
    scale = SIGMA * (cols / count) ** 0.5
    magnitude = scale * weights.double().abs().sum() + 1
    largest = scale * float(weights.abs().max())
    assert_close(got, expected, magnitude, largest, directions, rademacher)


def test_more_directions_than_the_grid_holds():
    """grid.y ends at 65,535; kernels loop beyond it."""
    directions = 8 * 65535 + 100  # eight directions a block
    y, x = torch.zeros(directions, 1, 4), torch.randn(directions, 1, 5)
    options = (WEIGHT, -1, directions, False, True)
    expected = _ops.dense_linear(
        y.double(), x.double(), make_key("cpu"), make_sigma("cpu"), *options
    )
    got = _ops.dense_linear(y.cuda(), x.cuda(), make_key(), make_sigma(), *options)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    noise = (WEIGHT, 0, 65535 + 100, 2, 9, True, torch.float32)
    assert_bitwise_equal(
        _ops.dense_materialise(make_key(), *noise).cpu(),
        _ops.dense_materialise(make_key("cpu"), *noise),
    )


@pytest.mark.slow
def test_more_elements_than_an_int_counts():
    count, rows, cols = 513, 2048, 2048  # 2^31 + 2^22
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count * rows * cols:
        pytest.skip("needs 13 GB of device memory")
    noise = _ops.dense_materialise(make_key(), WEIGHT, 0, count, rows, cols, True, torch.bfloat16)
    last = _ops.dense_materialise(
        make_key(), WEIGHT, count - 1, 1, rows, cols, True, torch.bfloat16
    )
    assert_bitwise_equal(noise[-1:], last)
    x = noise.view(count * rows, 1, cols)
    y = torch.zeros(count * rows, 1, 4, device="cuda", dtype=torch.bfloat16)
    directions = count * rows
    _ops.dense_linear_(y, x, make_key(), make_sigma(), WEIGHT, -1, directions, False, True)
    tail = torch.zeros_like(y[-3:])
    key = make_key(first=directions - 3)
    _ops.dense_linear_(tail, x[-3:].contiguous(), key, make_sigma(), WEIGHT, -1, 3, False, True)
    assert_bitwise_equal(y[-3:], tail)


# ---- streams, graphs, devices ------------------------------------------------------------------


def every_op(y, x, grad, weights, key, sigma, rademacher):
    _ops.dense_linear_(y, x, key, sigma, WEIGHT, BIAS, weights.shape[0], False, rademacher)
    _ops.dense_estimate_(grad, weights, key, sigma, WEIGHT, rademacher, False)
    options = (weights.shape[0], 3, False, rademacher)
    _ops.low_rank_linear_(y, x, key, sigma, FACTOR_A, FACTOR_B, BIAS, *options)
    _ops.sparse_linear_(y, x, key, sigma, COLUMNS, VALUES, BIAS, *options)
    _ops.sparse_estimate_(grad, weights, key, sigma, COLUMNS, VALUES, 3, rademacher, True)
    return _ops.dense_materialise(key, BIAS, 0, 3, 4, 5, rademacher, torch.float32)


def tensors():
    y, x = torch.zeros(64, 1, 40, device="cuda"), torch.randn(64, 1, 48, device="cuda")
    return y, x, torch.zeros(40, 48, device="cuda"), torch.randn(64, device="cuda")


@each_distribution
def test_no_op_synchronises(rademacher):
    arguments = (*tensors(), make_key(), make_sigma(), rademacher)
    every_op(*arguments)  # the first call loads the module, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_distribution
def test_replayed_graph_draws_what_the_key_holds(rademacher):
    y, x, grad, weights = tensors()
    key, sigma = make_key(), make_sigma()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        every_op(y, x, grad, weights, key, sigma, rademacher)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.zero_()
        noise = every_op(y, x, grad, weights, key, sigma, rademacher)
    draws = []
    for generation, scale in ((7, 0.5), (8, 0.25)):
        key[1].fill_(generation)
        sigma.fill_(scale)
        graph.replay()
        eager_y, eager_grad = torch.zeros_like(y), torch.zeros_like(grad)
        eager_noise = every_op(eager_y, x, eager_grad, weights, key, sigma, rademacher)
        assert_bitwise_equal(y, eager_y)
        assert_bitwise_equal(grad, eager_grad)
        assert_bitwise_equal(noise, eager_noise)
        draws.append(noise.clone())
    assert (draws[0] != draws[1]).double().mean() > 0.3


@each_distribution
def test_the_current_stream_is_used(rademacher):
    """A kernel on the default stream would not wait for the slow producer on this one."""
    y, x, grad, weights = tensors()
    expected = torch.zeros_like(y)
    every_op(expected, x, grad, weights, make_key(), make_sigma(), rademacher)
    key, sigma, late = make_key(), make_sigma(), torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        late.copy_(x)
        every_op(y, late, grad, weights, key, sigma, rademacher)
    stream.synchronize()
    assert_bitwise_equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one():
    arguments = [t.to("cuda:1") for t in (*tensors(), make_key(), make_sigma())]
    expected = every_op(*tensors(), make_key(), make_sigma(), True)
    with torch.cuda.device(0):
        assert_bitwise_equal(every_op(*arguments, True).cpu(), expected.cpu())


def test_tensors_on_two_devices_are_an_error():
    y, x, grad, weights = tensors()
    options = (WEIGHT, BIAS, 64, False, False)
    with pytest.raises(RuntimeError, match="x must be on the same device"):
        _ops.dense_linear_(y, x.cpu(), make_key(), make_sigma(), *options)
    with pytest.raises(RuntimeError, match="key must be on the same device"):
        _ops.dense_linear_(y, x, make_key("cpu"), make_sigma(), *options)
    with pytest.raises(RuntimeError, match="sigma must be on the same device"):
        _ops.dense_linear_(y, x, make_key(), make_sigma("cpu"), *options)
    with pytest.raises(RuntimeError, match="weights must be on the same device"):
        _ops.dense_estimate_(grad, weights.cpu(), make_key(), make_sigma(), WEIGHT, False, False)


# ---- the whole model ---------------------------------------------------------------------------


def make_model(noise):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 6))
    return perturbed.convert(net, 16, noise=perturbed.Dense(noise))


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_model_agrees_with_the_cpu(noise):
    """Noise differs by 5e-4 at most, in few elements; sigma and two layers make 1e-4 of that."""
    models = [perturbed.PerturbedModel(make_model(noise).to(d), 16) for d in ("cpu", "cuda")]
    x, weights = torch.randn(32, 20), torch.randn(16)
    for model in models:
        model.set_noise(sigma=0.1)
    outputs = [model(x.to(d)).cpu() for model, d in zip(models, ("cpu", "cuda"), strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        model.set_grad(weights.to(device))
    for ours, cpus in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), cpus.grad, rtol=1e-4, atol=3e-4)


def test_captured_model_draws_fresh_noise():
    model = perturbed.PerturbedModel(make_model("normal").cuda(), 16)
    model.set_noise(sigma=0.1)
    x = torch.randn(32, 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(x)
    seen = []
    for _ in range(2):
        model.set_noise()
        graph.replay()
        assert_bitwise_equal(output, model(x))
        seen.append(output.clone())
    assert (seen[0] != seen[1]).all(-1).all()
