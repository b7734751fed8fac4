"""Wrong arguments that several operators share: argument, value and what the error must say."""

import pytest
import torch


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# What is wrong with any operator on y [6, 2, 5] (R = 2, D = 3, T = 2), antithetic: argument, value,
# message.
KEY_ERRORS = [
    ("key", zeros(2, dtype=torch.int64), "key must have shape (3,), got (2)"),
    ("key", zeros(3), "key must have dtype Long, got Float"),
    ("key", zeros(6, dtype=torch.int64)[::2], "key must be contiguous"),
]
SIGMA_ERRORS = [
    ("sigma", zeros(2, dtype=torch.float64), "sigma must have one element, got shape (2)"),
    ("sigma", torch.tensor(0.1), "sigma must have dtype Double, got Float"),
]
DIRECTION_ERRORS = [
    ("directions", 0, "directions must be positive, got 0"),
    ("directions", -3, "directions must be positive, got -3"),
    ("directions", 2, "antithetic needs an even number of repeats, got 3"),
]
OUTPUT_ERRORS = [
    ("y", zeros(6, 5), "y must have 3 dimensions, got shape (6, 5)"),
    ("y", zeros(6, 5, 2).mT, "y must be contiguous"),
    ("y", zeros(7, 2, 5), "y must have a multiple of directions = 3 rows, got 7"),
    ("directions", 4, "y must have a multiple of directions = 4 rows, got 6"),
    *DIRECTION_ERRORS,
    *KEY_ERRORS,
]
# And of those on x [6, 2, 6] besides, which may be shared.
LINEAR_ERRORS = [
    *OUTPUT_ERRORS,
    *SIGMA_ERRORS,
    ("y", zeros(6, 2, 5, dtype=torch.int64), "x must have dtype"),
    ("x", zeros(6, 6), "x must have 3 dimensions, got shape (6, 6)"),
    ("x", zeros(6, 2, 6, dtype=torch.float64), "x must have dtype Float, got Double"),
    ("x", zeros(4, 2, 6), "x must have as many rows as y (6) or a divisor of the repeats (2)"),
    ("x", zeros(0, 2, 6), "x must have as many rows as y (6) or a divisor of the repeats (2)"),
    ("x", zeros(6, 3, 6), "x must have y's 2 tokens, got 3"),
    ("x", zeros(6, 2, 12)[..., ::2], "x must be contiguous in its last dimension"),
    ("bias_stream", -2, "bias_stream must be -1 or a 32-bit counter word, got -2"),
    ("bias_stream", 2**32, "bias_stream must be -1 or a 32-bit counter word, got 4294967296"),
]
# Of operators that move the rows of x [6, 2, 6], antithetic and not shared.
MOVE_ERRORS = [
    ("x", zeros(6, 6), "x must have 3 dimensions, got shape (6, 6)"),
    ("x", zeros(7, 2, 6), "x must have a multiple of directions = 3 rows, got 7"),
    ("x", zeros(6, 2, 12)[..., ::2], "x must be contiguous in its last dimension"),
    ("x", zeros(6, 2, 6, dtype=torch.int64), "x must be float32, float64, bfloat16 or float16"),
    ("directions", 4, "x must have a multiple of directions = 4 rows, got 6"),
    ("shared", True, "antithetic and shared exclude each other"),
]
# Of operators that add rows of z to y [6, 2, 5].
SUMMAND_ERRORS = [
    ("y", zeros(6, 2, 5, dtype=torch.int64), "z must have dtype"),
    ("z", zeros(6, 5), "z must have 3 dimensions, got shape (6, 5)"),
    ("z", zeros(6, 2, 5, dtype=torch.float64), "z must have dtype Float, got Double"),
    ("z", zeros(4, 2, 5), "z must have a multiple of directions = 3 rows that divides y's 6, got"),
    ("z", zeros(9, 2, 5), "z must have a multiple of directions = 3 rows that divides y's 6, got"),
    ("z", zeros(0, 2, 5), "z must have a multiple of directions = 3 rows that divides y's 6, got"),
    ("z", zeros(6, 3, 5), "z must have y's 2 tokens, got 3"),
    ("z", zeros(6, 2, 10)[..., ::2], "z must be contiguous in its last dimension"),
]
# Estimates into grad [5, 6] of weights [3], which are float32 for a float32 grad.
ESTIMATE_ERRORS = [
    ("grad", zeros(5), "grad must have 2 dimensions, got shape (5)"),
    ("grad", zeros(6, 5).mT, "grad must be contiguous"),
    ("grad", zeros(5, 6, dtype=torch.float64), "weights must have dtype Double, got Float"),
    ("grad", zeros(5, 6, dtype=torch.int64), "grad must be float32, float64, bfloat16 or"),
    ("weights", zeros(3, 1), "weights must have 1 dimensions, got shape (3, 1)"),
    ("weights", zeros(6)[::2], "weights must be contiguous"),
    *KEY_ERRORS,
]


def word_errors(*names):
    """Errors of counter words that cannot be left out."""
    return [
        (name, value, f"{name} must be a 32-bit counter word, got {value}")
        for name in names
        for value in (-1, 2**32)
    ]


def parametrize_errors(*lists):
    """One test per (name, error): `lists` are pairs of operators' names and their errors."""
    errors = [(name, *error) for names, list_ in lists for name in names for error in list_]
    return pytest.mark.parametrize(("name", "argument", "value", "message"), errors)
