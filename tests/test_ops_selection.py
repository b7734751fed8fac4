"""Operators on selections pi_d: permutations of 0 .. size - 1, or draws with replacement.

They move numbers or add them in a fixed order, so that all but `permuted_estimate_` give the bits
of their twins. test_noise_selection.py has the selections themselves; registration, derivatives,
argument errors and empty problems are in test_ops_selection_rules.py.
"""

import dataclasses

import pytest
import torch
from ops import (
    Case,
    accumulator,
    check_bits,
    check_overwrites,
    check_reference,
    check_shards,
    check_threads,
    check_weights_of_shards,
    each_accumulator,
    each_device,
    each_dtype,
    make_key,
    run,
    stream,
)

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal

IN, OUT = stream(7), stream(8)

each_way = pytest.mark.parametrize("replace", [False, True], ids=["permutation", "replace"])


@dataclasses.dataclass(frozen=True)
class SelectCase(Case):
    """select: `out` entries of x [B, T, in], or of `shared` rows that every direction sees."""

    def arguments(self, dtype=torch.float32, replace=False, device="cpu"):
        return {
            "x": self.activations(self.shared or self.rows, self.inputs, dtype, device),
            "key": make_key(device),
            "stream": IN,
            "directions": self.directions,
            "count": self.out,
            "antithetic": self.antithetic,
            "shared": self.shared > 0,
            "replace": replace,
        }


@dataclasses.dataclass(frozen=True)
class AddCase(Case):
    """select_add: y [B, T, out] from z [M, T, in] with M = `copies` * D, 0: M = B."""

    copies: int = 0

    def arguments(self, dtype=torch.float32, replace=False, device="cpu"):
        rows = self.copies * self.directions or self.rows
        return {
            "y": self.outputs(dtype, device),
            "z": self.activations(rows, self.inputs, dtype, device),
            "key": make_key(device),
            "stream": OUT,
            "directions": self.directions,
            "antithetic": self.antithetic,
            "replace": replace,
        }


# Sizes are below, at and above powers of two and of 2^8, where the network's width changes.
SELECTS = [
    SelectCase(1, 1, 1, 1, 1),
    SelectCase(2, 7, 1, 2, 2, antithetic=True),
    SelectCase(3, 5, 3, 3, 3),
    SelectCase(1, 17, 1, 5, 5),
    SelectCase(4, 16, 1, 31, 31, antithetic=True),
    SelectCase(2, 3, 3, 33, 33, strided=True),
    SelectCase(1, 7, 1, 10, 63),
    SelectCase(2, 7, 1, 64, 64),
    SelectCase(8, 7, 1, 65, 65, antithetic=True, strided=True),
    SelectCase(5, 3, 1, 1, 100),
    SelectCase(2, 17, 3, 256, 257, antithetic=True),
    SelectCase(1, 3, 1, 70_000, 70_000),
    SelectCase(2, 7, 1, 33, 33, shared=2),
    SelectCase(1, 16, 3, 60, 100, shared=1, strided=True),
    SelectCase(3, 7, 1, 257, 257, shared=3),
]
ADDS = [
    AddCase(1, 1, 1, 1, 1),
    AddCase(2, 7, 1, 2, 2, antithetic=True),
    AddCase(3, 5, 3, 3, 2),
    AddCase(1, 17, 1, 5, 5),
    AddCase(4, 16, 1, 31, 31, antithetic=True, copies=2),
    AddCase(2, 3, 3, 33, 33, strided=True),
    AddCase(4, 7, 1, 63, 10, antithetic=True, copies=1),
    AddCase(2, 7, 1, 64, 64),
    AddCase(8, 7, 1, 65, 64, antithetic=True, strided=True, copies=4),
    AddCase(5, 3, 1, 100, 1, copies=1),
    AddCase(2, 17, 3, 257, 256, antithetic=True),
    AddCase(1, 3, 1, 70_000, 65_000),
    AddCase(2, 3, 1, 10, 0),
]
each_select = pytest.mark.parametrize("case", SELECTS, ids=str)
each_add = pytest.mark.parametrize("case", ADDS, ids=str)

# (D, first, rows, size)
SUMS = [
    (1, 0, 1, 1),
    (40, 0, 5, 5),
    (7, 3, 28, 31),
    (33, 0, 33, 33),
    (100, 10, 54, 64),
    (300, 1, 2, 100),
    (17, 250, 7, 257),
    (3, 69_990, 10, 70_000),
    (5, 2, 0, 9),
]
each_sum = pytest.mark.parametrize(("directions", "first", "rows", "size"), SUMS)


def sum_arguments(directions, first, rows, size, dtype=torch.float32, replace=False, device="cpu"):
    return {
        "weights": torch.randn(directions, dtype=dtype).to(device),
        "key": make_key(device, first=5),
        "stream": IN,
        "first": first,
        "rows": rows,
        "size": size,
        "replace": replace,
    }


# (D, m, n, q, p)
ESTIMATES = [
    (1, 1, 1, 1, 1),
    (40, 3, 5, 3, 5),
    (17, 31, 33, 20, 33),
    (33, 64, 63, 64, 10),
    (100, 65, 100, 1, 100),
    (300, 5, 257, 5, 257),
    (7, 257, 64, 256, 63),
    (2, 2, 70_000, 2, 70_000),
    (9, 5, 6, 0, 0),
]
each_estimate = pytest.mark.parametrize("sizes", ESTIMATES, ids=lambda s: "-".join(map(str, s)))
each_mode = pytest.mark.parametrize(
    "mode", [(True, True), (True, False), (False, True)], ids=["both", "in", "out"]
)


def estimate_arguments(sizes, mode, dtype=torch.float32, accumulate=True, device="cpu"):
    directions, m, n, q, p = sizes
    acc = accumulator(dtype)
    return {
        "grad": torch.randn(m, n).to(device, dtype),
        "base": torch.randn(q, p, dtype=acc).to(device),
        "weights": torch.randn(directions, dtype=acc).to(device),
        "key": make_key(device, first=5),
        "in_stream": IN if mode[0] else -1,
        "out_stream": OUT if mode[1] else -1,
        "accumulate": accumulate,
    }


# ---- reference -----------------------------------------------------------------------------------


@each_way
@each_dtype
@each_device
@each_select
def test_select_gives_the_bits_of_plain_torch(case, device, dtype, replace):
    check_bits("select", case.arguments(dtype, replace, device))


@each_way
@each_device
def test_draws_with_replacement_may_outnumber_the_columns(device, replace):
    count = 40 if replace else 9
    case = SelectCase(2, 3, 1, count, 9, antithetic=True)
    check_bits("select", case.arguments(replace=replace, device=device))


@each_way
@each_dtype
@each_device
@each_add
def test_select_add_gives_the_bits_of_plain_torch(case, device, dtype, replace):
    check_bits("select_add", case.arguments(dtype, replace, device))


@each_way
@each_accumulator
@each_device
@each_sum
def test_selection_sum_gives_the_bits_of_plain_torch(
    device, directions, first, rows, size, dtype, replace
):
    arguments = sum_arguments(directions, first, rows, size, dtype, replace, device)
    check_bits("selection_sum", arguments)


@each_mode
@each_dtype
@each_device
@each_estimate
def test_estimate_matches_plain_torch(device, sizes, dtype, mode):
    arguments = estimate_arguments(sizes, mode, dtype, device=device)
    check_reference("permuted_estimate_", arguments)
    check_overwrites("permuted_estimate_", arguments)


@each_way
@pytest.mark.parametrize("case", [c for c in SELECTS if c.inputs < 70_000], ids=str)
def test_select_on_other_capabilities(other_capability, case, replace):
    check_bits("select", case.arguments(replace=replace))


@each_way
@pytest.mark.parametrize("case", [c for c in ADDS if c.out < 70_000], ids=str)
def test_select_add_on_other_capabilities(other_capability, case, replace):
    check_bits("select_add", case.arguments(replace=replace))


@each_mode
@pytest.mark.parametrize("sizes", ESTIMATES[:7], ids=lambda s: "-".join(map(str, s)))
def test_sums_on_other_capabilities(other_capability, sizes, mode):
    check_reference("permuted_estimate_", estimate_arguments(sizes, mode))
    check_bits("selection_sum", sum_arguments(sizes[0], 0, sizes[2], sizes[2]))


@each_device
def test_estimate_is_the_transpose_of_the_forward(device):
    """sum_d w_d (E_d x): by select, a product and select_add, and by the estimate."""
    d, m, n, q, p = 5, 9, 11, 6, 8
    arguments = estimate_arguments((d, m, n, q, p), (True, True), torch.float64, False, device)
    key, base, weights = arguments["key"], arguments["base"], arguments["weights"]
    x = torch.eye(n, dtype=torch.float64, device=device)[:, None]
    moved = _ops.select(x, key, IN, d, p, False, True, False)  # (n * D, 1, p)
    y = torch.zeros(n * d, 1, m, dtype=torch.float64, device=device)
    _ops.select_add_(y, moved @ base.T, key, OUT, d, False, False)
    expected = torch.einsum("d,jdi->ij", weights, y.view(n, d, m))
    torch.testing.assert_close(run("permuted_estimate_", arguments), expected)


# ---- bitwise -------------------------------------------------------------------------------------


@each_way
@each_dtype
def test_threads_do_not_change_bits(dtype, replace):
    check_threads("select", SelectCase(4, 33, 1, 100, 129).arguments(dtype, replace))
    check_threads("select_add", AddCase(4, 33, 1, 129, 100).arguments(dtype, replace))
    sums = sum_arguments(100, 0, 130, 130, accumulator(dtype), replace)
    check_threads("selection_sum", sums)
    both = estimate_arguments((100, 131, 257, 100, 200), (True, True), dtype)
    check_threads("permuted_estimate_", both)


@each_way
@each_device
def test_shards_of_directions_are_slices_of_the_whole(device, replace):
    for case in SELECTS:
        if case.directions >= 5:
            arguments = case.arguments(replace=replace, device=device)
            check_shards("select", arguments, [] if case.shared else ["x"])
    for case in ADDS:
        if case.directions >= 5:
            arguments = case.arguments(replace=replace, device=device)
            check_shards("select_add", arguments, ["y", "z"])
    key, rest = make_key(device), (20, 15, replace)
    whole = _ops.selections(key, IN, 0, 40, *rest)
    for first, count in ((0, 1), (1, 39), (13, 17), (40, 0)):
        part = _ops.selections(
            make_key(device, first=first // 2), IN, first - first // 2, count, *rest
        )
        assert_bitwise_equal(part, whole[first : first + count])


@each_accumulator
@each_device
def test_sum_of_a_shard_is_the_whole_with_other_weights_zero(device, dtype):
    check_weights_of_shards("selection_sum", sum_arguments(40, 0, 67, 67, dtype, device=device))
    for mode in ((True, True), (True, False), (False, True)):
        arguments = estimate_arguments((40, 67, 130, 50, 130), mode, dtype, False, device)
        check_weights_of_shards("permuted_estimate_", arguments)
