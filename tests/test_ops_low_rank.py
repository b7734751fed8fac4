"""The low-rank family's operators, E_d = A_d^T B_d / sqrt(rank): what they compute.

Registration, derivatives, argument errors and empty problems: test_ops_low_rank_rules.py.
"""

import dataclasses

import pytest
import torch
from ops import (
    SIGMA,
    Case,
    check_reference,
    check_shards,
    check_threads,
    each_accumulator,
    each_device,
    each_distribution,
    each_dtype,
    make_key,
    make_sigma,
    stream,
)

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal

BIAS, A, B = stream(1), stream(2), stream(3)


@dataclasses.dataclass(frozen=True)
class LowRankCase(Case):
    """`projected`: x holds the products B_d x of so many repeats; 0: x holds activations."""

    rank: int = 1
    projected: int = 0

    def arguments(self, dtype=torch.float32, rademacher=False, device="cpu"):
        columns = self.rank if self.projected else self.inputs
        rows = self.projected * self.directions or self.shared or self.rows
        return {
            "y": self.outputs(dtype, device),
            "x": self.activations(rows, columns, dtype, device),
            "key": make_key(device),
            "sigma": make_sigma(device),
            "a_stream": A,
            "b_stream": -1 if self.projected else B,
            "bias_stream": BIAS if self.bias else -1,
            "directions": self.directions,
            "rank": self.rank,
            "antithetic": self.antithetic,
            "rademacher": rademacher,
        }


CASES = [
    LowRankCase(1, 1, 1, 1, 1),
    LowRankCase(1, 7, 1, 3, 5, rank=3),
    LowRankCase(2, 16, 1, 5, 2, antithetic=True, rank=2),
    LowRankCase(3, 17, 3, 64, 65, strided=True, rank=4),
    LowRankCase(4, 7, 1, 65, 63, antithetic=True),
    LowRankCase(5, 1, 1, 100, 31, rank=8),
    LowRankCase(8, 16, 3, 31, 33, antithetic=True, rank=2),
    LowRankCase(33, 7, 1, 3, 257, rank=3),
    LowRankCase(33, 1, 3, 257, 1),
    LowRankCase(1, 17, 1, 257, 100, rank=31),
    LowRankCase(1, 100, 1, 257, 64),
    LowRankCase(2, 7, 1, 63, 100, rank=5, bias=False),
    LowRankCase(8, 17, 1, 10, 257, antithetic=True, shared=4),
    LowRankCase(4, 16, 3, 65, 10, antithetic=True, shared=2, strided=True, rank=5),
    LowRankCase(5, 7, 1, 2, 127, shared=1, rank=2),
    LowRankCase(3, 16, 1, 64, 64, shared=3, bias=False),
    LowRankCase(4, 7, 1, 33, 0, antithetic=True, projected=1, rank=3),
    LowRankCase(4, 7, 3, 100, 0, projected=4, rank=2, strided=True),
    LowRankCase(6, 16, 1, 65, 0, antithetic=True, projected=2),
    LowRankCase(2, 3, 1, 257, 0, projected=2, rank=33, bias=False),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


# ---- reference -----------------------------------------------------------------------------------


@each_distribution
@each_dtype
@each_device
@each_case
def test_linear_matches_plain_torch(case, device, dtype, rademacher, fast_noise):
    check_reference("low_rank_linear", case.arguments(dtype, rademacher, device))


@each_distribution
@each_accumulator
@each_case
def test_linear_matches_plain_torch_on_other_capabilities(
    other_capability, case, dtype, rademacher, fast_noise
):
    check_reference("low_rank_linear", case.arguments(dtype, rademacher))


@each_distribution
@pytest.mark.parametrize("case", [c for c in CASES if c.inputs <= 65], ids=str)
def test_linear_matches_the_untouched_reference(case, rademacher):
    check_reference("low_rank_linear", case.arguments(rademacher=rademacher))


@each_distribution
@each_device
def test_given_products_are_those_of_the_factor(device, rademacher, fast_noise):
    """b_stream = -1 with B_d x, computed outside, is the operator with b_stream."""
    case = LowRankCase(4, 5, 3, 33, 20, antithetic=True, rank=3)
    arguments = case.arguments(torch.float64, rademacher, device)
    b = _ops.dense_materialise(arguments["key"], B, 0, 5, 3, 20, rademacher, torch.float64)
    x = arguments["x"].unflatten(0, (4, 5))
    products = torch.einsum("dqi,rdti->rdtq", b, x).flatten(0, 1).contiguous()
    torch.testing.assert_close(
        _ops.low_rank_linear(**arguments | {"x": products, "b_stream": -1}),
        _ops.low_rank_linear(**arguments),
    )


def read_off(rank, rademacher, device="cpu"):
    """E_d without sigma, from the outputs of unit inputs: (D, out, in)."""
    case = LowRankCase(9, 4, 1, 7, 9, shared=9, bias=False, rank=rank)
    arguments = case.arguments(torch.float64, rademacher, device)
    arguments["y"].zero_()
    arguments["x"] = torch.eye(9, dtype=torch.float64, device=device)[:, None]
    columns = _ops.low_rank_linear(**arguments).view(9, 4, 7)
    return columns.permute(1, 2, 0) / SIGMA


@each_distribution
@each_device
@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_unit_inputs_read_off_the_product_of_the_factors(device, rank, rademacher):
    noise = read_off(rank, rademacher, device)
    key = make_key(device)
    a, b = (
        _ops.dense_materialise(key, factor, 0, 4, rank, size, rademacher, torch.float64)
        for factor, size in ((A, 7), (B, 9))
    )
    torch.testing.assert_close(noise, a.mT @ b / rank**0.5)
    if rademacher:  # rows of +-1 may be dependent
        assert (torch.linalg.matrix_rank(noise) <= rank).all()
    else:
        assert (torch.linalg.matrix_rank(noise) == rank).all()


# ---- bitwise -------------------------------------------------------------------------------------


@each_distribution
@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.out >= 31], ids=str)
def test_threads_do_not_change_bits(case, dtype, rademacher):
    check_threads("low_rank_linear", case.arguments(dtype, rademacher))


@each_distribution
@each_device
@pytest.mark.parametrize("case", [c for c in CASES if c.directions >= 7], ids=str)
def test_shards_of_directions_are_slices_of_the_whole(case, device, rademacher):
    arguments = case.arguments(rademacher=rademacher, device=device)
    check_shards("low_rank_linear", arguments, ["y"] if case.shared else ["y", "x"])


@each_distribution
@each_dtype
@each_device
@pytest.mark.parametrize("case", [c for c in CASES if c.antithetic], ids=str)
def test_antithetic_partners_cancel_exactly(case, device, dtype, rademacher):
    arguments = case.arguments(dtype, rademacher, device)
    arguments["y"].zero_()
    rows = 1 if case.shared else case.directions
    arguments["x"] = arguments["x"][:rows].repeat(1 if case.shared else case.repeats, 1, 1)
    plus, minus = _ops.low_rank_linear(**arguments).chunk(2)
    assert plus.abs().max() > 0
    assert_bitwise_equal(minus, -plus)


# ---- statistics ----------------------------------------------------------------------------------


@each_distribution
@pytest.mark.parametrize("rank", [1, 4])
def test_perturbation_has_the_promised_variance(rank, rademacher):
    """Outputs have mean 0 and variance sigma^2 (|x|^2 + 1), for every rank: within 5 errors.

    Outputs of one direction share B_d x, so the sample is its directions.
    """
    directions, out, inputs = 20_000, 8, 20
    x = torch.randn(1, 1, inputs, dtype=torch.float64)
    y = torch.zeros(directions, 1, out, dtype=torch.float64)
    sizes = (directions, rank, False, rademacher)
    _ops.low_rank_linear_(y, x, make_key(), make_sigma(), A, B, BIAS, *sizes)
    for sample, expected in (
        (y.mean((1, 2)), 0.0),
        (y.square().mean((1, 2)), float(SIGMA**2 * (x.square().sum() + 1))),
        ((y[:, 0, 0] * y[:, 0, 1]), 0.0),
    ):
        assert abs(sample.mean() - expected) <= 5 * sample.std() / directions**0.5
