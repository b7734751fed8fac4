"""The sign-flip family's operators: signs of every direction on rows that they move or add.

They give the bits of their twins.
"""

import dataclasses

import pytest
import torch
from ops import (
    Case,
    check_bits,
    check_empty,
    check_error,
    check_gradients,
    check_refuses_gradients,
    check_registration,
    check_shards,
    check_threads,
    each_device,
    each_dtype,
    make_key,
    stream,
)
from ops_errors import (
    DIRECTION_ERRORS,
    KEY_ERRORS,
    MOVE_ERRORS,
    OUTPUT_ERRORS,
    SUMMAND_ERRORS,
    parametrize_errors,
    word_errors,
    zeros,
)

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal

SIGNS = stream(5)


@dataclasses.dataclass(frozen=True)
class FlipCase(Case):
    """flip: x [B, T, in], or `shared` rows that every direction sees. `out` is `in`."""

    def arguments(self, dtype=torch.float32, device="cpu"):
        return {
            "x": self.activations(self.shared or self.rows, self.inputs, dtype, device),
            "key": make_key(device),
            "stream": SIGNS,
            "directions": self.directions,
            "antithetic": self.antithetic,
            "shared": self.shared > 0,
        }


@dataclasses.dataclass(frozen=True)
class AddCase(Case):
    """flip_add: y [B, T, out] from z [M, T, out] with M = `copies` * D, 0: M = B."""

    copies: int = 0

    def arguments(self, dtype=torch.float32, device="cpu"):
        rows = self.copies * self.directions or self.rows
        return {
            "y": self.outputs(dtype, device),
            "z": self.activations(rows, self.inputs, dtype, device),
            "key": make_key(device),
            "stream": SIGNS,
            "directions": self.directions,
            "antithetic": self.antithetic,
        }


SIZES = [  # R, D, T, columns and options; columns below, at and above 32, a word of signs
    ((1, 1, 1, 1), {}),
    ((2, 7, 1, 2), {"antithetic": True}),
    ((3, 5, 3, 3), {}),
    ((1, 17, 1, 5), {}),
    ((4, 16, 1, 31), {"antithetic": True}),
    ((1, 9, 1, 32), {}),
    ((2, 3, 3, 33), {"strided": True}),
    ((5, 7, 1, 63), {}),
    ((2, 7, 1, 64), {"antithetic": True, "strided": True}),
    ((8, 7, 1, 65), {"antithetic": True}),
    ((5, 3, 1, 100), {}),
    ((2, 17, 3, 257), {"antithetic": True}),
    ((1, 2, 1, 70_000), {}),
]
FLIPS = [FlipCase(*s, s[3], **options) for s, options in SIZES]
FLIPS += [
    FlipCase(2, 7, 1, 33, 33, shared=2),
    FlipCase(1, 16, 3, 100, 100, shared=1, strided=True),
    FlipCase(3, 7, 1, 257, 257, shared=3),
]
ADDS = [AddCase(*s, s[3], **options) for s, options in SIZES]
ADDS += [
    AddCase(4, 7, 1, 63, 63, antithetic=True, copies=1),
    AddCase(4, 16, 3, 65, 65, antithetic=True, copies=2),
    AddCase(6, 5, 1, 257, 257, strided=True, copies=3),
]
OPERATORS = {
    "flip": lambda **changes: FlipCase(2, 3, 2, 6, 6, antithetic=True).arguments() | changes,
    "flip_add": lambda **changes: AddCase(2, 3, 2, 5, 5, antithetic=True).arguments() | changes,
    "flip_add_": lambda **changes: AddCase(2, 3, 2, 5, 5, antithetic=True).arguments() | changes,
}


# ---- reference -----------------------------------------------------------------------------------


@each_dtype
@each_device
@pytest.mark.parametrize("case", FLIPS, ids=str)
def test_flip_gives_the_bits_of_plain_torch(case, device, dtype):
    check_bits("flip", case.arguments(dtype, device))


@each_dtype
@each_device
@pytest.mark.parametrize("case", ADDS, ids=str)
def test_flip_add_gives_the_bits_of_plain_torch(case, device, dtype):
    check_bits("flip_add", case.arguments(dtype, device))


@each_dtype
def test_other_capabilities(other_capability, dtype):
    for case in FLIPS:
        check_bits("flip", case.arguments(dtype))
    for case in ADDS:
        check_bits("flip_add", case.arguments(dtype))


@each_dtype
@each_device
def test_flipping_twice_changes_nothing(device, dtype):
    """Zeros, infinities and NaN included: a flip is a change of the sign bit."""
    arguments = FlipCase(2, 7, 1, 65, 65, antithetic=True).arguments(dtype, device)
    arguments["x"][0, 0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    arguments["x"][1, 0, :8] = float("nan")
    once = _ops.flip(**arguments)
    assert_bitwise_equal(once.abs(), arguments["x"].abs())
    assert_bitwise_equal(_ops.flip(**arguments | {"x": once}), arguments["x"])


# ---- bitwise -------------------------------------------------------------------------------------


@each_dtype
def test_threads_do_not_change_bits(dtype):
    check_threads("flip", FlipCase(4, 33, 1, 129, 129).arguments(dtype))
    check_threads("flip_add", AddCase(4, 33, 1, 129, 129).arguments(dtype))


@each_device
def test_shards_of_directions_are_slices_of_the_whole(device):
    for case in FLIPS:
        if case.directions >= 5:
            check_shards("flip", case.arguments(device=device), [] if case.shared else ["x"])
    for case in ADDS:
        if case.directions >= 5:
            check_shards("flip_add", case.arguments(device=device), ["y", "z"])


# ---- registration, derivatives, errors -----------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name):
    inputs = {"flip": ("x",), "flip_add": ("y", "z"), "flip_add_": ()}[name]
    check_registration(name, OPERATORS[name](), inputs)
    if name == "flip":
        shared = {"x": torch.randn(2, 2, 6), "antithetic": False, "shared": True}
        check_registration(name, OPERATORS[name](**shared), inputs)
        strided = torch.randn(6, 4, 9)[:, ::2, 1:7].bfloat16()
        check_registration(name, OPERATORS[name](x=strided))
    else:
        check_registration(name, OPERATORS[name](z=torch.randn(3, 2, 5)), inputs)


@pytest.mark.parametrize("antithetic", [False, True])
def test_gradients(antithetic):
    arguments = OPERATORS["flip"](antithetic=antithetic)
    check_gradients("flip", arguments, ("x",))
    if not antithetic:
        check_gradients("flip", arguments | {"shared": True}, ("x",))
    arguments = OPERATORS["flip_add"](antithetic=antithetic)
    check_gradients("flip_add", arguments, ("y", "z"))
    check_gradients("flip_add", arguments | {"z": torch.randn(3, 2, 5)}, ("y", "z"))


@pytest.mark.parametrize("argument", ["y", "z"])
def test_in_place_operator_refuses_gradients(argument):
    check_refuses_gradients("flip_add_", OPERATORS["flip_add_"](), argument)


WIDTH_ERRORS = [
    ("z", zeros(6, 2, 4), "z must have y's 5 columns, got 4"),
    ("z", zeros(6, 2, 6), "z must have y's 5 columns, got 6"),
]


@parametrize_errors(
    (("flip",), [*MOVE_ERRORS, *DIRECTION_ERRORS, *KEY_ERRORS, *word_errors("stream")]),
    (
        ("flip_add", "flip_add_"),
        [*OUTPUT_ERRORS, *SUMMAND_ERRORS, *WIDTH_ERRORS, *word_errors("stream")],
    ),
)
def test_wrong_arguments_are_named(name, argument, value, message):
    check_error(name, OPERATORS[name](**{argument: value}), message)


@each_device
@pytest.mark.parametrize("sizes", [(0, 2, 5), (6, 0, 5), (6, 2, 0), (0, 0, 0)], ids=str)
def test_empty_problems(device, sizes):
    key, empty = make_key(device), torch.zeros(sizes, device=device)
    check_empty("flip", OPERATORS["flip"](x=empty, key=key), ("x",))
    shared = OPERATORS["flip"](x=empty, key=key, antithetic=False, shared=True)
    check_empty("flip", shared, ("x",))
    check_empty("flip_add", OPERATORS["flip_add"](y=empty, z=empty, key=key), ("y", "z"))
