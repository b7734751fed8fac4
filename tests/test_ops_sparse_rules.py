"""Rules that the sparse family's operators keep, besides being right (test_ops_sparse.py).

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
    run,
)
from ops_errors import (
    ESTIMATE_ERRORS,
    LINEAR_ERRORS,
    SIGMA_ERRORS,
    parametrize_errors,
    word_errors,
    zeros,
)
from test_ops_sparse import SparseCase, estimate_arguments

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal

LINEAR = ("sparse_linear_", "sparse_linear")


def linear(**changes):
    """R = 2, D = 3, T = 2, out = 5, in = 6, two columns, antithetic."""
    return SparseCase(2, 3, 2, 5, 6, antithetic=True, count=2).arguments() | changes


def estimate(**changes):
    return estimate_arguments(3, 5, 6, 2) | changes


# ---- registration and derivatives ----------------------------------------------------------------

LINEAR_SAMPLES = {
    "default": {},
    "signs": {"rademacher": True},
    "shared": {"x": torch.randn(1, 2, 6)},
    "strided": {"x": torch.randn(6, 4, 9)[:, ::2, 1:7]},
    "no bias": {"bias_stream": -1, "antithetic": False},
    "half": {"y": torch.randn(6, 2, 5).half(), "x": torch.randn(6, 2, 6).half()},
}
ESTIMATE_SAMPLES = {
    "default": {},
    "signs": {"rademacher": True},
    "set": {"accumulate": False},
    "float64": {"grad": torch.randn(5, 6).double(), "weights": torch.randn(3).double()},
    "bfloat16": {"grad": torch.randn(5, 6).bfloat16()},
}


@pytest.mark.parametrize("sample", LINEAR_SAMPLES)
@pytest.mark.parametrize("name", LINEAR)
def test_registration_of_the_linear(name, sample):
    differentiable = () if name.endswith("_") or sample == "half" else ("y", "x")
    check_registration(name, linear(**LINEAR_SAMPLES[sample]), differentiable)


@pytest.mark.parametrize("sample", ESTIMATE_SAMPLES)
def test_registration_of_the_estimate(sample):
    check_registration("sparse_estimate_", estimate(**ESTIMATE_SAMPLES[sample]))


@each_distribution
@pytest.mark.parametrize(
    "changes",
    [{}, {"antithetic": False}, {"x": torch.randn(2, 2, 6)}, {"x": torch.randn(1, 2, 6)}],
    ids=["own rows", "one sign", "two shared", "one shared"],
)
def test_gradients(rademacher, changes):
    check_gradients("sparse_linear", linear(rademacher=rademacher, **changes), ("y", "x"))


@pytest.mark.parametrize("argument", ["y", "x"])
def test_in_place_linear_refuses_gradients(argument):
    check_refuses_gradients("sparse_linear_", linear(), argument)


def test_estimate_refuses_gradients():
    check_refuses_gradients("sparse_estimate_", estimate(), "weights")


# ---- errors and empty problems -------------------------------------------------------------------

COUNT_ERRORS = [
    ("count", 0, "count must be positive, got 0"),
    ("count", -1, "count must be positive, got -1"),
    ("count", 7, "count must be at most 6 elements to select from, got 7"),
]
WORD_ERRORS = word_errors("column_stream", "value_stream")


@parametrize_errors((LINEAR, [*LINEAR_ERRORS, *WORD_ERRORS, *COUNT_ERRORS]))
def test_wrong_arguments_of_the_linear_are_named(name, argument, value, message):
    check_error(name, linear(**{argument: value}), message)


@parametrize_errors(
    (("sparse_estimate_",), [*ESTIMATE_ERRORS, *SIGMA_ERRORS, *WORD_ERRORS, *COUNT_ERRORS])
)
def test_wrong_arguments_of_the_estimate_are_named(name, argument, value, message):
    check_error(name, estimate(**{argument: value}), message)


@pytest.mark.parametrize("name", LINEAR)
def test_there_must_be_a_column_to_perturb(name):
    message = "count must be at most 0 elements to select from, got 2"
    check_error(name, linear(x=zeros(6, 2, 0)), message)


@each_distribution
@each_device
@pytest.mark.parametrize(
    ("rows", "tokens", "out"),
    [(0, 2, 5), (6, 0, 5), (6, 2, 0), (0, 0, 0)],
    ids=["no rows", "no tokens", "no outputs", "nothing"],
)
def test_empty_linear(device, rows, tokens, out, rademacher):
    y = torch.zeros(rows, tokens, out, device=device)
    x = torch.zeros(rows, tokens, 6, device=device)
    arguments = linear(key=make_key(device), sigma=make_sigma(device), rademacher=rademacher)
    check_empty("sparse_linear", arguments | {"y": y, "x": x}, ("y", "x"))


@each_distribution
@each_device
def test_estimate_of_no_directions(device, rademacher):
    arguments = estimate_arguments(0, 5, 6, 2, rademacher=rademacher, device=device)
    assert_bitwise_equal(run("sparse_estimate_", arguments), arguments["grad"])
    none = run("sparse_estimate_", arguments | {"accumulate": False})
    assert_bitwise_equal(none, torch.zeros_like(none))
    _ops.sparse_estimate_(**arguments | {"grad": torch.zeros(0, 6, device=device)})
