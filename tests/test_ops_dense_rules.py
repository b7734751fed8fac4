"""Rules that every operator of the dense family keeps, besides being right (test_ops_dense.py).

Registration and derivatives, statistics, one error for each wrong argument, empty problems.
"""

import pytest
import torch

from perturbed import _C, _ops, reference
from perturbed.testing import assert_bitwise_equal, devices

WEIGHT, BIAS = 2 << 8, 2 << 8 | 1  # streams of layer 2
SIGMA = 0.3

each_distribution = pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "signs"])
each_device = pytest.mark.parametrize("device", devices())


def make_key(device="cpu", first=0):
    return torch.tensor([_C.splitmix64(99), 3, first], device=device)


def linear_arguments(device="cpu", **changes):
    """R = 2, D = 3, T = 2, out = 5, in = 6, antithetic; by name, so that a test can change one."""
    arguments = {
        "y": torch.randn(6, 2, 5, device=device),
        "x": torch.randn(6, 2, 6, device=device),
        "key": make_key(device),
        "sigma": torch.tensor(SIGMA, dtype=torch.float64, device=device),
        "weight_stream": WEIGHT,
        "bias_stream": BIAS,
        "directions": 3,
        "antithetic": True,
        "rademacher": False,
    }
    return arguments | changes


def estimate_arguments(device="cpu", **changes):
    arguments = {
        "grad": torch.randn(5, 6, device=device),
        "weights": torch.randn(3, device=device),
        "key": make_key(device),
        "sigma": torch.tensor(SIGMA, dtype=torch.float64, device=device),
        "stream": WEIGHT,
        "rademacher": False,
        "accumulate": True,
    }
    return arguments | changes


def materialise_arguments(device="cpu", **changes):
    arguments = {
        "key": make_key(device),
        "stream": WEIGHT,
        "first": 0,
        "count": 3,
        "rows": 5,
        "cols": 6,
        "rademacher": False,
        "dtype": torch.float32,
    }
    return arguments | changes


OPERATORS = {
    "dense_linear_": linear_arguments,
    "dense_linear": linear_arguments,
    "dense_estimate_": estimate_arguments,
    "dense_materialise": materialise_arguments,
}

# ---- registration and derivatives --------------------------------------------------------------

SAMPLES = {
    "default": {},
    "signs": {"rademacher": True},
    "shared": {"x": torch.randn(1, 2, 6)},
    "strided": {"x": torch.randn(6, 4, 9)[:, ::2, 1:7]},
    "bias only": {"weight_stream": -1},
    "weight only": {"bias_stream": -1, "antithetic": False},
    "half": {"y": torch.randn(6, 2, 5).half(), "x": torch.randn(6, 2, 6).half()},
    "set": {"accumulate": False},
    "float64": {"grad": torch.randn(5, 6).double(), "weights": torch.randn(3).double()},
    "bfloat16": {"dtype": torch.bfloat16, "first": 2},
    "empty": {"count": 0},
}


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        (name, sample)
        for name, make in OPERATORS.items()
        for sample, changes in SAMPLES.items()
        if changes.keys() <= make().keys()
    ],
)
@each_device
def test_opcheck(device, name, sample):
    changes = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in SAMPLES[sample].items()
    }
    arguments = OPERATORS[name](device, **changes)
    operator = getattr(torch.ops.perturbed, name).default
    torch.library.opcheck(operator, tuple(arguments.values()))


@each_device
def test_opcheck_with_gradients(device):
    arguments = linear_arguments(device)
    arguments["y"].requires_grad_()
    arguments["x"].requires_grad_()
    torch.library.opcheck(torch.ops.perturbed.dense_linear.default, tuple(arguments.values()))


@each_distribution
@pytest.mark.parametrize("antithetic", [False, True], ids=["plain", "antithetic"])
@pytest.mark.parametrize("rows_of_x", [12, 2, 1], ids=["own", "shared2", "shared1"])
def test_gradients_of_the_linear(rademacher, antithetic, rows_of_x):
    arguments = linear_arguments(rademacher=rademacher, antithetic=antithetic)
    y = torch.randn(12, 2, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(rows_of_x, 2, 6, dtype=torch.float64, requires_grad=True)
    rest = tuple(arguments.values())[2:]
    assert torch.autograd.gradcheck(lambda y, x: _ops.dense_linear(y, x, *rest), (y, x))
    weights = torch.randn(12, 2, 5, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad((function(y, x, *rest) * weights).sum(), (y, x))
        for function in (_ops.dense_linear, reference.dense_linear)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("dense_linear_", "y"), ("dense_linear_", "x"), ("dense_estimate_", "weights")],
)
def test_in_place_operators_refuse_gradients(name, argument):
    arguments = OPERATORS[name]()
    arguments[argument] = arguments[argument].clone().requires_grad_() * 1.0
    with pytest.raises(RuntimeError, match=rf"perturbed::{name} is not differentiable"):
        getattr(_ops, name)(**arguments)
    with torch.no_grad():
        getattr(_ops, name)(**arguments)


@each_distribution
def test_one_compilation_for_changing_seeds_and_sigma(rademacher):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(y, x, key, sigma):
        return _ops.dense_linear(y, x, key, sigma, WEIGHT, BIAS, 3, True, rademacher)

    arguments = linear_arguments(rademacher=rademacher)
    for generation in range(8):
        arguments["key"] = torch.tensor([_C.splitmix64(generation), generation, 3 * generation])
        arguments["sigma"] = torch.tensor(0.1 * generation, dtype=torch.float64)
        y, x, key, sigma, *_ = arguments.values()
        assert_bitwise_equal(step(y, x, key, sigma), _ops.dense_linear(**arguments))
    assert counter.frame_count == 1


# ---- statistics --------------------------------------------------------------------------------


@each_distribution
def test_perturbation_has_the_promised_variance(rademacher):
    """Every output of row b is y + sigma N(0, |x|^2 + 1), within 5 standard errors."""
    directions, out, inputs = 4000, 16, 50
    x = torch.randn(1, 1, inputs, dtype=torch.float64)
    y = torch.zeros(directions, 1, out, dtype=torch.float64)
    sigma = torch.tensor(SIGMA, dtype=torch.float64)
    _ops.dense_linear_(y, x, make_key(), sigma, WEIGHT, BIAS, directions, False, rademacher)
    variance = SIGMA**2 * (x.square().sum() + 1)
    count = y.numel()
    assert y.mean().abs() <= 5 * (variance / count).sqrt()
    # The fourth moment of a sum of signs is below that of a normal, so 2 / count is a bound.
    assert (y.square().mean() / variance - 1).abs() <= 5 * (2 / count) ** 0.5


@each_distribution
def test_estimate_recovers_a_direction(rademacher):
    """With w_d = <V, E_d> the estimate is sigma D V, up to sampling error."""
    directions, rows, cols = 20000, 8, 12
    target = torch.randn(rows, cols, dtype=torch.float64)
    noise = _ops.dense_materialise(
        make_key(), WEIGHT, 0, directions, rows, cols, rademacher, torch.float64
    )
    weights = torch.einsum("dij,ij->d", noise, target)
    sigma = torch.tensor(SIGMA, dtype=torch.float64)
    grad = torch.empty_like(target)
    _ops.dense_estimate_(grad, weights, make_key(), sigma, WEIGHT, rademacher, False)
    # Elementwise variance of <V, E> E_ij is at most |V|^2 + V_ij^2.
    error = (grad / (SIGMA * directions) - target).abs()
    assert (error <= 5 * ((target.square().sum() + target.square()) / directions).sqrt()).all()


# ---- errors ------------------------------------------------------------------------------------


def float32(*shape):
    return torch.zeros(shape)


LINEAR_ERRORS = [
    ("y", float32(6, 5), "y must have 3 dimensions, got shape (6, 5)"),
    ("y", float32(6, 5, 2).mT, "y must be contiguous"),
    ("y", float32(7, 2, 5), "y must have a multiple of directions = 3 rows, got 7"),
    ("y", torch.zeros(6, 2, 5, dtype=torch.int64), "x must have dtype"),
    ("x", float32(6, 6), "x must have 3 dimensions, got shape (6, 6)"),
    ("x", float32(6, 2, 6).double(), "x must have dtype Float, got Double"),
    ("x", float32(4, 2, 6), "x must have as many rows as y (6) or a divisor of the repeats (2)"),
    ("x", float32(0, 2, 6), "x must have as many rows as y (6) or a divisor of the repeats (2)"),
    ("x", float32(6, 3, 6), "x must have y's 2 tokens, got 3"),
    ("x", float32(6, 2, 12)[..., ::2], "x must be contiguous in its last dimension"),
    ("key", torch.zeros(2, dtype=torch.int64), "key must have shape (3,), got (2)"),
    ("key", torch.zeros(3), "key must have dtype Long, got Float"),
    ("key", torch.zeros(6, dtype=torch.int64)[::2], "key must be contiguous"),
    ("sigma", torch.zeros(2, dtype=torch.float64), "sigma must have one element, got shape (2)"),
    ("sigma", torch.tensor(0.1), "sigma must have dtype Double, got Float"),
    ("weight_stream", -2, "weight_stream must be -1 or a 32-bit counter word, got -2"),
    ("weight_stream", 2**32, "weight_stream must be -1 or a 32-bit counter word, got 4294967296"),
    ("bias_stream", -2, "bias_stream must be -1 or a 32-bit counter word, got -2"),
    ("directions", 0, "directions must be positive, got 0"),
    ("directions", -3, "directions must be positive, got -3"),
    ("directions", 4, "y must have a multiple of directions = 4 rows, got 6"),
    ("directions", 2, "antithetic needs an even number of repeats, got 3"),
]
ESTIMATE_ERRORS = [
    ("grad", float32(5), "grad must have 2 dimensions, got shape (5)"),
    ("grad", float32(6, 5).mT, "grad must be contiguous"),
    ("grad", float32(5, 6).double(), "weights must have dtype Double, got Float"),
    ("grad", torch.zeros(5, 6, dtype=torch.int64), "grad must be float32, float64, bfloat16 or"),
    ("weights", float32(3, 1), "weights must have 1 dimensions, got shape (3, 1)"),
    ("weights", float32(6)[::2], "weights must be contiguous"),
    ("weights", float32(3).bfloat16(), "weights must have dtype Float, got BFloat16"),
    ("key", torch.zeros(4, dtype=torch.int64), "key must have shape (3,), got (4)"),
    ("sigma", torch.tensor(1), "sigma must have dtype Double, got Long"),
    ("stream", -1, "stream must be a counter word, got -1"),
    ("stream", 2**32, "stream must be -1 or a 32-bit counter word, got 4294967296"),
]
MATERIALISE_ERRORS = [
    ("key", torch.zeros(3), "key must have dtype Long, got Float"),
    ("stream", -1, "stream must be a counter word, got -1"),
    ("first", -1, "first must not be negative, got -1"),
    ("count", -1, "count must not be negative, got -1"),
    ("rows", -1, "rows and cols must not be negative, got -1 and 6"),
    ("cols", -2, "rows and cols must not be negative, got 5 and -2"),
    ("rows", 2**32, "has more than 2^32 noise blocks"),
    ("dtype", torch.int32, "dtype must be float32, float64, bfloat16 or float16, got Int"),
]
ERRORS = [
    *(("dense_linear_", *error) for error in LINEAR_ERRORS),
    *(("dense_linear", *error) for error in LINEAR_ERRORS),
    *(("dense_estimate_", *error) for error in ESTIMATE_ERRORS),
    *(("dense_materialise", *error) for error in MATERIALISE_ERRORS),
]


@pytest.mark.parametrize(("name", "argument", "value", "message"), ERRORS)
def test_wrong_arguments_are_named(name, argument, value, message):
    arguments = OPERATORS[name](**{argument: value})
    with pytest.raises((RuntimeError, ValueError, TypeError)) as failure:
        getattr(_ops, name)(**arguments)
    text = str(failure.value)
    assert f"perturbed::{name.removesuffix('_')}" in text
    assert message in text


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "argument"),
    [("dense_linear_", "x"), ("dense_linear", "sigma"), ("dense_linear_", "key")]
    + [("dense_estimate_", "weights"), ("dense_estimate_", "key")],
)
def test_mixed_devices_are_named(name, argument):
    arguments = OPERATORS[name]("cuda")
    arguments[argument] = arguments[argument].cpu()
    with pytest.raises(RuntimeError, match=f"{argument} must be on the same device"):
        getattr(_ops, name)(**arguments)


# ---- empty problems ----------------------------------------------------------------------------


@each_distribution
@each_device
@pytest.mark.parametrize(
    ("rows", "tokens", "out", "inputs"),
    [(0, 2, 5, 6), (6, 0, 5, 6), (6, 2, 0, 6), (0, 0, 0, 0)],
    ids=["no rows", "no tokens", "no outputs", "nothing"],
)
def test_empty_linear(device, rows, tokens, out, inputs, rademacher):
    y = torch.zeros(rows, tokens, out, device=device)
    x = torch.zeros(rows, tokens, inputs, device=device)
    arguments = linear_arguments(device, y=y, x=x, rademacher=rademacher)
    assert_bitwise_equal(_ops.dense_linear(**arguments), y)
    _ops.dense_linear_(**arguments)


@each_distribution
@each_device
def test_linear_without_inputs_adds_only_the_bias_noise(device, rademacher):
    arguments = linear_arguments(device, x=torch.zeros(6, 2, 0, device=device))
    arguments["rademacher"] = rademacher
    bias_only = arguments | {"weight_stream": -1}
    assert_bitwise_equal(_ops.dense_linear(**arguments), _ops.dense_linear(**bias_only))
    assert (_ops.dense_linear(**arguments) != arguments["y"]).any()


@each_distribution
@each_device
def test_estimate_of_no_directions(device, rademacher):
    none = torch.zeros(0, device=device)
    arguments = estimate_arguments(device, weights=none, rademacher=rademacher)
    before = arguments["grad"].clone()
    _ops.dense_estimate_(**arguments)
    assert_bitwise_equal(arguments["grad"], before)
    _ops.dense_estimate_(**arguments | {"accumulate": False})
    assert (arguments["grad"] == 0).all()
    _ops.dense_estimate_(**arguments | {"grad": torch.zeros(5, 0, device=device)})


@each_distribution
@each_device
@pytest.mark.parametrize("changes", [{"count": 0}, {"rows": 0}, {"cols": 0}], ids=str)
def test_empty_materialise(device, changes, rademacher):
    arguments = materialise_arguments(device, rademacher=rademacher, **changes)
    noise = _ops.dense_materialise(**arguments)
    assert noise.shape == (arguments["count"], arguments["rows"], arguments["cols"])


# ---- sizes beyond 32 bits ------------------------------------------------------------------------


@pytest.mark.slow
@each_distribution
def test_more_than_2_31_elements(rademacher):
    """Offsets are 64-bit: the last row of 2^31 + 2^16 elements is the noise it should be (4 GB)."""
    rows, cols = (1 << 15) + 1, 1 << 16
    key, sigma = make_key(), torch.tensor(1.0, dtype=torch.float64)
    last = reference.dense_materialise(key, WEIGHT, 0, 1, 4, cols, rademacher, torch.float16)[0, 3]
    noise = _ops.dense_materialise(key, WEIGHT, 0, 1, rows, cols, rademacher, torch.float16)
    assert noise.numel() > 2**31
    assert_bitwise_equal(noise[0, 3], last)
    if rademacher:
        words = _C.words(int(key[0]), 3, WEIGHT, 0, (rows - 1) // 4 * (cols // 32), cols // 32)
        bits = words[:, 0, None] >> torch.arange(32).numpy().astype("uint32") & 1
        expected = torch.from_numpy(2.0 * bits - 1).flatten()
    else:
        normals = _C.normals(int(key[0]), 3, WEIGHT, 0, (rows - 1) * (cols // 4), cols // 4)
        expected = torch.from_numpy(normals).flatten()
    assert_bitwise_equal(noise[0, -1], expected.half())
    twice = torch.full((1,), 2.0)
    _ops.dense_estimate_(noise[0], twice, key, sigma, WEIGHT, rademacher, False)
    assert_bitwise_equal(noise[0, -1], (2 * expected).half())
