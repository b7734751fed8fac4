"""Rules that the operators on selections keep, besides being right (test_ops_selection.py).

Registration, derivatives, one error for each wrong argument, empty problems.
"""

import pytest
import torch
from ops import (
    check_bits,
    check_empty,
    check_error,
    check_gradients,
    check_reference,
    check_refuses_gradients,
    check_registration,
    each_device,
    make_key,
)
from ops_errors import (
    DIRECTION_ERRORS,
    ESTIMATE_ERRORS,
    KEY_ERRORS,
    MOVE_ERRORS,
    OUTPUT_ERRORS,
    SUMMAND_ERRORS,
    parametrize_errors,
    word_errors,
    zeros,
)
from test_ops_selection import (
    IN,
    AddCase,
    SelectCase,
    each_way,
    estimate_arguments,
    sum_arguments,
)

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal


def selections_arguments(**changes):
    arguments = {
        "key": make_key(),
        "stream": IN,
        "first": 2,
        "directions": 3,
        "size": 6,
        "count": 4,
        "replace": False,
    }
    return arguments | changes


def select_arguments(**changes):
    """R = 2, D = 3, T = 2, four of six columns, antithetic."""
    return SelectCase(2, 3, 2, 4, 6, antithetic=True).arguments() | changes


def add_arguments(**changes):
    return AddCase(2, 3, 2, 5, 4, antithetic=True).arguments() | changes


OPERATORS = {
    "selections": selections_arguments,
    "select": select_arguments,
    "select_add": add_arguments,
    "select_add_": add_arguments,
    "selection_sum": lambda **changes: sum_arguments(3, 1, 4, 6) | changes,
    "permuted_estimate_": lambda **changes: (
        estimate_arguments((3, 5, 6, 4, 5), (True, True)) | changes
    ),
}
INPUTS = {"select": ("x",), "select_add": ("y", "z")}  # of those that have a derivative


# ---- registration and derivatives ----------------------------------------------------------------

SAMPLES = {
    "default": {},
    "replace": {"replace": True},
    "shared": {"x": torch.randn(2, 2, 6), "antithetic": False, "shared": True},
    "strided": {"x": torch.randn(6, 4, 9)[:, ::2, 1:7]},
    "shared summands": {"z": torch.randn(3, 2, 4)},
    "half": {"y": torch.randn(6, 2, 5).half(), "z": torch.randn(6, 2, 4).half()},
    "float64": {"weights": torch.randn(3).double(), "rows": 3},
    "in": {"out_stream": -1},
    "out": {"in_stream": -1, "accumulate": False},
    "nothing": {"count": 0},
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
def test_registration(name, sample):
    differentiable = () if sample == "half" else INPUTS.get(name, ())
    check_registration(name, OPERATORS[name](**SAMPLES[sample]), differentiable)


@each_way
@pytest.mark.parametrize("antithetic", [False, True])
def test_gradients(antithetic, replace):
    changes = {"antithetic": antithetic, "replace": replace}
    check_gradients("select", select_arguments(**changes), ("x",))
    if not antithetic:
        check_gradients("select", select_arguments(**changes, shared=True), ("x",))
    check_gradients("select_add", add_arguments(**changes), ("y", "z"))
    shared = add_arguments(**changes, z=torch.randn(3, 2, 4))
    check_gradients("select_add", shared, ("y", "z"))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("select_add_", "y"),
        ("select_add_", "z"),
        ("selection_sum", "weights"),
        ("permuted_estimate_", "weights"),
        ("permuted_estimate_", "base"),
    ],
)
def test_operators_without_a_derivative_refuse_gradients(name, argument):
    check_refuses_gradients(name, OPERATORS[name](), argument)


# ---- errors --------------------------------------------------------------------------------------

SELECTIONS_ERRORS = [
    *KEY_ERRORS,
    *word_errors("stream"),
    ("first", -1, "first must not be negative, got -1"),
    ("directions", -1, "directions must not be negative, got -1"),
    ("size", -1, "selections are made from 0 to 2^32 - 2 elements, got -1"),
    ("size", 2**32 - 1, "selections are made from 0 to 2^32 - 2 elements, got 4294967295"),
    ("count", -1, "count must not be negative, got -1"),
    ("count", 7, "count must be at most 6 elements to select from, got 7"),
    ("size", 0, "count must be at most 0 elements to select from, got 4"),
]
SELECT_ERRORS = [
    *MOVE_ERRORS,
    *DIRECTION_ERRORS,
    *KEY_ERRORS,
    *word_errors("stream"),
    ("count", -1, "count must not be negative, got -1"),
    ("count", 7, "count must be at most 6 elements to select from, got 7"),
    ("x", zeros(6, 2, 0), "count must be at most 0 elements to select from, got 4"),
]
ADD_ERRORS = [
    *OUTPUT_ERRORS,
    *SUMMAND_ERRORS,
    *word_errors("stream"),
    ("z", zeros(6, 2, 6), "z must have at most y's 5 columns, got 6"),
]
SUM_ERRORS = [
    *KEY_ERRORS,
    *word_errors("stream"),
    ("weights", zeros(3, 1), "weights must have 1 dimensions, got shape (3, 1)"),
    ("weights", zeros(6)[::2], "weights must be contiguous"),
    ("weights", zeros(3, dtype=torch.bfloat16), "weights must have dtype Float or Double, got BF"),
    ("first", -1, "first must not be negative, got -1"),
    ("rows", -1, "rows must not be negative, got -1"),
    ("rows", 6, "rows must be at most 6 elements to select from less first = 1, got 6"),
    ("size", -1, "selections are made from 0 to 2^32 - 2 elements, got -1"),
    ("size", 4, "rows must be at most 4 elements to select from less first = 1, got 4"),
]
PERMUTED_ERRORS = [
    *ESTIMATE_ERRORS,
    ("base", zeros(4), "base must have 2 dimensions, got shape (4)"),
    ("base", zeros(5, 4).mT, "base must be contiguous"),
    ("base", zeros(4, 5, dtype=torch.float64), "base must have dtype Float, got Double"),
    ("base", zeros(6, 5), "base's rows must be at most 5 elements to select from, got 6"),
    ("base", zeros(4, 7), "base's columns must be at most 6 elements to select from, got 7"),
    ("in_stream", -2, "in_stream must be -1 or a 32-bit counter word, got -2"),
    ("out_stream", 2**32, "out_stream must be -1 or a 32-bit counter word, got 4294967296"),
]
REPLACE_ERRORS = [
    ("size", 0, "count must be 0 where there is nothing to select, got 4"),
    ("count", 2**32, "first + count must be below 2^32 - 1, got 0 + 4294967296"),
]


@parametrize_errors(
    (("selections",), SELECTIONS_ERRORS),
    (("select",), SELECT_ERRORS),
    (("select_add", "select_add_"), ADD_ERRORS),
    (("selection_sum",), SUM_ERRORS),
    (("permuted_estimate_",), PERMUTED_ERRORS),
)
def test_wrong_arguments_are_named(name, argument, value, message):
    check_error(name, OPERATORS[name](**{argument: value}), message)


@parametrize_errors((("selections",), REPLACE_ERRORS))
def test_wrong_draws_with_replacement_are_named(name, argument, value, message):
    check_error(name, OPERATORS[name](**{argument: value, "replace": True}), message)


# ---- empty problems ------------------------------------------------------------------------------


@each_way
@each_device
@pytest.mark.parametrize("sizes", [(0, 2, 5), (6, 0, 5), (6, 2, 0), (0, 0, 0)], ids=str)
def test_empty_rows(device, sizes, replace):
    key, empty = make_key(device), torch.zeros(sizes, device=device)
    changes = {"key": key, "replace": replace, "count": min(4, sizes[2])}
    check_empty("select", select_arguments(x=empty, **changes), ("x",))
    shared = select_arguments(x=empty, **changes, antithetic=False, shared=True)
    check_empty("select", shared, ("x",))
    add = add_arguments(y=empty, z=empty, key=key, replace=replace)
    check_empty("select_add", add, ("y", "z"))


@each_way
@each_device
@pytest.mark.parametrize(
    "changes", [{"directions": 0}, {"count": 0}, {"size": 0, "count": 0}], ids=str
)
def test_empty_selections(device, changes, replace):
    arguments = selections_arguments(key=make_key(device), replace=replace, **changes)
    result = _ops.selections(**arguments)
    assert (result.dtype, result.device.type) == (torch.int64, device)
    assert result.shape == (arguments["directions"], arguments["count"])


@each_way
@each_device
@pytest.mark.parametrize("sizes", [(0, 1, 4, 6), (3, 2, 0, 6), (3, 0, 0, 0)], ids=str)
def test_empty_sums(device, sizes, replace):
    check_bits("selection_sum", sum_arguments(*sizes, replace=replace, device=device))


@each_device
@pytest.mark.parametrize("sizes", [(0, 5, 6, 4, 5), (3, 0, 6, 0, 5), (3, 5, 0, 4, 0)], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["set", "add"])
def test_empty_estimates(device, sizes, accumulate):
    arguments = estimate_arguments(sizes, (True, True), accumulate=accumulate, device=device)
    check_reference("permuted_estimate_", arguments)


def test_estimate_of_no_directions_overwrites_only_if_told():
    arguments = estimate_arguments((0, 5, 6, 4, 5), (True, True))
    before = arguments["grad"].clone()
    _ops.permuted_estimate_(**arguments)
    assert_bitwise_equal(arguments["grad"], before)
    _ops.permuted_estimate_(**arguments | {"accumulate": False})
    assert_bitwise_equal(arguments["grad"], torch.zeros_like(before))
