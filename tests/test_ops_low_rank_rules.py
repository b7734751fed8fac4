"""Rules that the low-rank family's operators keep, besides being right (test_ops_low_rank.py).

Registration, derivatives, one error for each wrong argument, empty problems.
"""

import pytest
import torch
from ops import (
    check_empty,
    check_error,
    check_gradients,
    check_refuses_gradients,
    check_registration,
    each_device,
    each_distribution,
    make_key,
    make_sigma,
)
from ops_errors import LINEAR_ERRORS, parametrize_errors, word_errors, zeros
from test_ops_low_rank import BIAS, LowRankCase

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal

OPERATORS = ("low_rank_linear_", "low_rank_linear")


def small(**changes):
    """R = 2, D = 3, T = 2, out = 5, in = 6, rank 2, antithetic."""
    return LowRankCase(2, 3, 2, 5, 6, antithetic=True, rank=2).arguments() | changes


# ---- registration and derivatives ----------------------------------------------------------------

SAMPLES = {
    "default": {},
    "signs": {"rademacher": True},
    "shared": {"x": torch.randn(1, 2, 6)},
    "strided": {"x": torch.randn(6, 4, 9)[:, ::2, 1:7]},
    "products": {"x": torch.randn(3, 2, 2), "b_stream": -1},
    "no bias": {"bias_stream": -1, "antithetic": False},
    "half": {"y": torch.randn(6, 2, 5).half(), "x": torch.randn(6, 2, 6).half()},
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name, sample):
    differentiable = () if name.endswith("_") or sample == "half" else ("y", "x")
    check_registration(name, small(**SAMPLES[sample]), differentiable)


@each_distribution
@pytest.mark.parametrize(
    "changes",
    [{}, {"antithetic": False}, {"x": torch.randn(2, 2, 6)}, {"x": torch.randn(1, 2, 6)}]
    + [{"x": torch.randn(rows, 2, 2), "b_stream": -1} for rows in (6, 3)],
    ids=["own rows", "one sign", "two shared", "one shared", "products", "shared products"],
)
def test_gradients(rademacher, changes):
    arguments = small(rademacher=rademacher, **changes)
    check_gradients("low_rank_linear", arguments, ("y", "x"))


@pytest.mark.parametrize("argument", ["y", "x"])
def test_in_place_operator_refuses_gradients(argument):
    check_refuses_gradients("low_rank_linear_", small(), argument)


# ---- errors and empty problems -------------------------------------------------------------------

ERRORS = [
    *LINEAR_ERRORS,
    *word_errors("a_stream"),
    ("b_stream", -2, "b_stream must be -1 or a 32-bit counter word, got -2"),
    ("b_stream", 2**32, "b_stream must be -1 or a 32-bit counter word, got 4294967296"),
    ("b_stream", -1, "x must hold products of rank = 2 elements if b_stream is -1, got shape (6"),
    ("rank", 0, "rank must be positive, got 0"),
    ("rank", -1, "rank must be positive, got -1"),
    ("rank", 2**32, "has more than 2^32 noise blocks"),
    ("rank", 2**62, "has more than 2^32 noise blocks"),  # times the columns is nothing, in 64 bits
]
PRODUCT_ERRORS = [
    (
        "x",
        zeros(rows, 2, 2),
        f"x must have a multiple of directions = 3 rows that divides y's 6{end}",
    )
    for rows, end in ((0, ""), (2, " if b_stream is -1, got 2"), (9, ""))
]


@parametrize_errors((OPERATORS, ERRORS))
def test_wrong_arguments_are_named(name, argument, value, message):
    check_error(name, small(**{argument: value}), message)


@parametrize_errors((OPERATORS, PRODUCT_ERRORS))
def test_wrong_rows_of_products_are_named(name, argument, value, message):
    check_error(name, small(**{argument: value, "b_stream": -1}), message)


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
    arguments = small(key=make_key(device), sigma=make_sigma(device), rademacher=rademacher)
    check_empty("low_rank_linear", arguments | {"y": y, "x": x}, ("y", "x"))


@each_distribution
@each_device
def test_linear_without_inputs_adds_only_the_bias_noise(device, rademacher):
    case = LowRankCase(2, 3, 2, 5, 0, antithetic=True, rank=2)
    arguments = case.arguments(rademacher=rademacher, device=device)
    y, key, sigma = arguments["y"], arguments["key"], arguments["sigma"]
    bias_only = _ops.dense_linear(y, arguments["x"], key, sigma, -1, BIAS, 3, True, rademacher)
    assert_bitwise_equal(_ops.low_rank_linear(**arguments), bias_only)
