"""dense_lookup: rows of dense noise, the bits of the contract on every instruction set."""

import pytest
import torch
from ops import (
    check_bits,
    check_error,
    check_functional,
    check_registration,
    check_shards,
    check_threads,
    each_device,
    each_distribution,
    each_dtype,
    make_key,
    run,
    stream,
)
from ops_errors import KEY_ERRORS, word_errors

from perturbed import _ops, reference
from perturbed.testing import assert_bitwise_equal

# (R, D, T, rows, cols)
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 1, 7, 5),
    (1, 2, 3, 9, 4),
    (2, 2, 4, 130, 64),
    (1, 3, 2, 5, 131),
    (3, 2, 300, 6, 33),
    (0, 3, 2, 5, 6),
    (2, 2, 0, 5, 6),
    (2, 2, 3, 5, 0),
]


def arguments(size, rademacher, dtype=torch.float32, device="cpu"):
    repeats, directions, tokens, rows, cols = size
    return {
        "index": torch.randint(rows, (repeats * directions, tokens)).to(device),
        "key": make_key(device),
        "stream": stream(0),
        "directions": directions,
        "rows": rows,
        "cols": cols,
        "rademacher": rademacher,
        "dtype": dtype,
    }


@each_distribution
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_on_every_instruction_set(capability, size, rademacher):
    check_bits("dense_lookup", arguments(size, rademacher))


@each_distribution
@each_dtype
def test_bits_in_every_dtype(dtype, rademacher):
    check_bits("dense_lookup", arguments((2, 3, 4, 10, 21), rademacher, dtype))


@each_distribution
@each_device
def test_rows_are_those_of_the_whole_matrix(device, rademacher):
    given = arguments((2, 3, 4, 10, 21), rademacher, device=device)
    matrices = _ops.dense_materialise(
        given["key"], given["stream"], 0, 3, 10, 21, rademacher, torch.float32
    )
    directions = torch.arange(6, device=device)[:, None] % 3
    assert_bitwise_equal(run("dense_lookup", given), matrices[directions, given["index"]])
    check_functional("dense_lookup", given)


@each_distribution
def test_threads_and_shards_give_the_same_bits(rademacher):
    given = arguments((2, 7, 60, 50, 70), rademacher)
    check_threads("dense_lookup", given)
    check_shards("dense_lookup", given, ("index",))


def test_large_matrices_have_random_access():
    """The last of 2^30 rows of 16 columns: 2^32 normal blocks are too many, these just fit."""
    given = arguments((1, 2, 1, 2**30 - 1, 16), False)
    given["index"].fill_(2**30 - 2)
    z = run("dense_lookup", given)
    word = (2**30 - 2) * 4
    blocks = reference.words(given["key"], given["stream"], 0, 2, word, 4)
    expected = torch.stack(reference.box_muller(blocks[..., 0::2], blocks[..., 1::2]), -1)
    assert_bitwise_equal(z, expected.reshape(2, 1, 16))


@each_distribution
def test_registration(rademacher):
    check_registration("dense_lookup", arguments((2, 3, 4, 10, 21), rademacher))


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("index", zeros(6), "index must have 2 dimensions, got shape (6)"),
        ("index", zeros(6, 4, dtype=torch.int32), "index must have dtype Long, got Int"),
        ("index", zeros(4, 6).mT, "index must be contiguous"),
        ("index", zeros(7, 4), "index must have a multiple of directions = 3 rows, got 7"),
        ("index", zeros(6, 4) + 10, "index must be between 0 and 9, got 10"),
        ("index", zeros(6, 4) - 1, "index must be between 0 and 9, got -1"),
        ("directions", 0, "directions must be positive, got 0"),
        ("rows", -1, "rows and cols must not be negative, got -1 and 21"),
        ("rows", 2**31, "more than 2^32 noise blocks"),
        ("rows", 2**62, "more than 2^32 noise blocks"),  # times 6 blocks a row is few, in 64 bits
        ("dtype", torch.int32, "dtype must be float32, float64, bfloat16 or float16, got Int"),
        *KEY_ERRORS,
        *[error for error in word_errors("stream")],
    ],
)
def test_errors_name_the_argument(argument, value, message):
    check_error("dense_lookup", arguments((2, 3, 4, 10, 21), False) | {argument: value}, message)
