"""The sparse family's operators, E_d[:, pi_d(j)] = sqrt(n / count) V_d[j]: what they compute.

Registration, derivatives, argument errors and empty problems: test_ops_sparse_rules.py.
"""

import dataclasses

import pytest
import torch
from ops import (
    SIGMA,
    Case,
    accumulator,
    check_overwrites,
    check_reference,
    check_shards,
    check_threads,
    check_weights_of_shards,
    each_accumulator,
    each_device,
    each_distribution,
    each_dtype,
    make_key,
    make_sigma,
    run,
    stream,
)

from perturbed import _ops, reference
from perturbed.testing import assert_bitwise_equal

BIAS, COLUMNS, VALUES = stream(1), stream(9), stream(10)


@dataclasses.dataclass(frozen=True)
class SparseCase(Case):
    count: int = 1

    def arguments(self, dtype=torch.float32, rademacher=False, device="cpu"):
        return {
            "y": self.outputs(dtype, device),
            "x": self.activations(self.shared or self.rows, self.inputs, dtype, device),
            "key": make_key(device),
            "sigma": make_sigma(device),
            "column_stream": COLUMNS,
            "value_stream": VALUES,
            "bias_stream": BIAS if self.bias else -1,
            "directions": self.directions,
            "count": self.count,
            "antithetic": self.antithetic,
            "rademacher": rademacher,
        }


CASES = [
    SparseCase(1, 1, 1, 1, 1),
    SparseCase(1, 7, 1, 3, 5, count=5),
    SparseCase(2, 16, 1, 5, 2, antithetic=True),
    SparseCase(3, 17, 3, 64, 65, strided=True, count=3),
    SparseCase(4, 7, 1, 65, 63, antithetic=True, count=2),
    SparseCase(5, 1, 1, 100, 31, count=31),
    SparseCase(8, 16, 3, 31, 33, antithetic=True, count=4),
    SparseCase(33, 7, 1, 3, 257, count=100),
    SparseCase(33, 1, 3, 257, 1),
    SparseCase(1, 17, 1, 257, 100, count=7),
    SparseCase(1, 100, 1, 257, 64),
    SparseCase(2, 7, 1, 63, 100, count=5, bias=False),
    SparseCase(1, 3, 1, 2, 70_000, count=300),  # more columns than 2^16
    SparseCase(8, 17, 1, 10, 257, antithetic=True, shared=4, count=2),
    SparseCase(4, 16, 3, 65, 10, antithetic=True, shared=2, strided=True, count=3),
    SparseCase(5, 7, 1, 2, 127, shared=1),
    SparseCase(3, 16, 1, 64, 64, shared=3, bias=False, count=64),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def estimate_arguments(
    directions,
    rows,
    cols,
    count,
    dtype=torch.float32,
    rademacher=False,
    accumulate=True,
    device="cpu",
):
    return {
        "grad": torch.randn(rows, cols).to(device, dtype),
        "weights": torch.randn(directions, dtype=accumulator(dtype)).to(device),
        "key": make_key(device, first=5),
        "sigma": make_sigma(device),
        "column_stream": COLUMNS,
        "value_stream": VALUES,
        "count": count,
        "rademacher": rademacher,
        "accumulate": accumulate,
    }


# (D, out, in, count)
ESTIMATES = [
    (1, 1, 1, 1),
    (7, 3, 5, 2),
    (16, 5, 3, 3),
    (17, 65, 64, 1),
    (33, 64, 100, 31),
    (200, 10, 257, 2),
    (1000, 9, 63, 1),
    (65, 1, 200, 5),
    (100, 257, 2, 1),
    (5, 2, 70_000, 3),
]
each_estimate = pytest.mark.parametrize(("directions", "rows", "cols", "count"), ESTIMATES)


# ---- reference -----------------------------------------------------------------------------------


@each_distribution
@each_dtype
@each_device
@each_case
def test_linear_matches_plain_torch(case, device, dtype, rademacher, fast_noise):
    check_reference("sparse_linear", case.arguments(dtype, rademacher, device))


@each_distribution
@each_accumulator
@each_case
def test_linear_matches_plain_torch_on_other_capabilities(
    other_capability, case, dtype, rademacher, fast_noise
):
    check_reference("sparse_linear", case.arguments(dtype, rademacher))


@each_distribution
@pytest.mark.parametrize("case", [c for c in CASES if c.inputs <= 65], ids=str)
def test_linear_matches_the_untouched_reference(case, rademacher):
    check_reference("sparse_linear", case.arguments(rademacher=rademacher))


@each_distribution
@each_dtype
@each_device
@each_estimate
def test_estimate_matches_plain_torch(
    device, directions, rows, cols, count, dtype, rademacher, fast_noise
):
    sizes = (directions, rows, cols, count)
    arguments = estimate_arguments(*sizes, dtype, rademacher, device=device)
    check_reference("sparse_estimate_", arguments)
    check_overwrites("sparse_estimate_", arguments)


@each_distribution
@each_accumulator
@each_estimate
def test_estimate_matches_plain_torch_on_other_capabilities(
    other_capability, directions, rows, cols, count, dtype, rademacher, fast_noise
):
    arguments = estimate_arguments(directions, rows, cols, count, dtype, rademacher)
    check_reference("sparse_estimate_", arguments)


@each_distribution
@each_device
@pytest.mark.parametrize("count", [1, 2, 9])
def test_unit_inputs_read_off_what_one_hot_weights_estimate(device, count, rademacher):
    """Forward and estimate draw the same E_d: `count` columns at pi_d of sqrt(n / count) V_d."""
    case = SparseCase(9, 4, 1, 7, 9, shared=9, bias=False, count=count)
    arguments = case.arguments(torch.float64, rademacher, device)
    arguments["y"].zero_()
    arguments["x"] = torch.eye(9, dtype=torch.float64, device=device)[:, None]
    noise = _ops.sparse_linear(**arguments).view(9, 4, 7).permute(1, 2, 0)
    key, sigma = arguments["key"], arguments["sigma"]
    index = reference.permutation(key, COLUMNS, 0, 4, 9, count)
    values = _ops.dense_materialise(key, VALUES, 0, 4, count, 7, rademacher, torch.float64)
    for d, one_hot in enumerate(torch.eye(4, dtype=torch.float64, device=device)):
        columns = (noise[d] != 0).any(0).nonzero().flatten()
        assert columns.tolist() == index[d].sort().values.tolist()
        expected = SIGMA * (9 / count) ** 0.5 * values[d].T
        torch.testing.assert_close(noise[d][:, index[d]], expected)
        grad = torch.empty(7, 9, dtype=torch.float64, device=device)
        streams = (COLUMNS, VALUES, count, rademacher, False)
        _ops.sparse_estimate_(grad, one_hot, key, sigma, *streams)
        torch.testing.assert_close(grad, noise[d])


# ---- bitwise -------------------------------------------------------------------------------------


@each_distribution
@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.out >= 31], ids=str)
def test_threads_do_not_change_the_linear(case, dtype, rademacher):
    check_threads("sparse_linear", case.arguments(dtype, rademacher))


@each_distribution
@each_dtype
def test_threads_do_not_change_the_estimate(dtype, rademacher):
    check_threads("sparse_estimate_", estimate_arguments(300, 131, 257, 3, dtype, rademacher))


@each_distribution
@each_device
@pytest.mark.parametrize("case", [c for c in CASES if c.directions >= 7], ids=str)
def test_shards_of_directions_are_slices_of_the_whole(case, device, rademacher):
    arguments = case.arguments(rademacher=rademacher, device=device)
    check_shards("sparse_linear", arguments, ["y"] if case.shared else ["y", "x"])


@each_distribution
@each_accumulator
@each_device
def test_estimate_of_a_shard_is_the_whole_with_other_weights_zero(device, dtype, rademacher):
    arguments = estimate_arguments(40, 67, 130, 3, dtype, rademacher, False, device)
    check_weights_of_shards("sparse_estimate_", arguments)


@each_distribution
@each_dtype
@each_device
@pytest.mark.parametrize("case", [c for c in CASES if c.antithetic], ids=str)
def test_antithetic_partners_cancel_exactly(case, device, dtype, rademacher):
    arguments = case.arguments(dtype, rademacher, device)
    arguments["y"].zero_()
    rows = 1 if case.shared else case.directions
    arguments["x"] = arguments["x"][:rows].repeat(1 if case.shared else case.repeats, 1, 1)
    plus, minus = _ops.sparse_linear(**arguments).chunk(2)
    assert plus.abs().max() > 0
    assert_bitwise_equal(minus, -plus)


# ---- statistics ----------------------------------------------------------------------------------


@each_distribution
@pytest.mark.parametrize("count", [1, 5, 20])
def test_perturbation_has_the_promised_variance(count, rademacher):
    """Outputs have mean 0 and variance sigma^2 (|x|^2 + 1), for every count: within 5 errors.

    Outputs of one direction share their columns, so the sample is its directions.
    """
    directions, out, inputs = 20_000, 8, 20
    x = torch.randn(1, 1, inputs, dtype=torch.float64)
    y = torch.zeros(directions, 1, out, dtype=torch.float64)
    rest = (COLUMNS, VALUES, BIAS, directions, count, False, rademacher)
    _ops.sparse_linear_(y, x, make_key(), make_sigma(), *rest)
    for sample, expected in (
        (y.mean((1, 2)), 0.0),
        (y.square().mean((1, 2)), float(SIGMA**2 * (x.square().sum() + 1))),
        (y[:, 0, 0] * y[:, 0, 1], 0.0),
    ):
        assert abs(sample.mean() - expected) <= 5 * sample.std() / directions**0.5


@each_distribution
def test_estimate_recovers_a_direction(rademacher):
    """With w_d = <V, E_d> the estimate is sigma D V, up to sampling error.

    E_d[i, j] has fourth moment (n / count) E z^4, so <V, E_d> E_d[i, j] has at most that
    multiple of the dense family's variance, |V|^2 + 2 V_ij^2.
    """
    directions, rows, cols, count = 20_000, 8, 12, 3
    sizes = (directions, rows, cols, count)
    arguments = estimate_arguments(*sizes, torch.float64, rademacher, False)
    target = torch.randn(rows, cols, dtype=torch.float64)
    key, draw = arguments["key"], (rademacher, torch.float64)
    values = _ops.dense_materialise(key, VALUES, 0, directions, count, rows, *draw)
    index = _ops.selections(key, COLUMNS, 0, directions, cols, count, False)
    scale = (cols / count) ** 0.5
    arguments["weights"] = scale * (values * target.T[index]).sum((1, 2))
    estimate = run("sparse_estimate_", arguments) / (SIGMA * directions)
    variance = cols / count * (target.square().sum() + 2 * target.square())
    assert ((estimate - target).abs() <= 5 * (variance / directions).sqrt()).all()
