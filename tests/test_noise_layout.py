"""Noise as matrices: which element draws from which block, and that no way of cutting shows."""

import itertools

import pytest
import torch
from ops import documented_program

from perturbed import _C, _ops, reference
from perturbed.testing import assert_bitwise_equal, devices

SEED = 1234
MIXED = _C.splitmix64(SEED)
GENERATION = 7
STREAM = 3 << 8 | 1  # layer 3, bias


def make_key(seed=SEED, generation=GENERATION, first=0):
    return torch.tensor([_C.splitmix64(seed), generation, first])


def materialise(count=3, rows=10, cols=65, *, key=None, stream=STREAM, first=0, rademacher=False):
    key = make_key() if key is None else key
    return _ops.dense_materialise(key, stream, first, count, rows, cols, rademacher, torch.float32)


SHAPES = [
    (1, 1),
    (1, 10),
    (3, 1),
    (5, 4),
    (4, 32),
    (10, 65),
    (7, 127),
    (64, 128),
    (9, 200),
    (2, 784),
]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_normal_layout(rows, cols):
    """Block c1 = row * ceil(cols / 4) + col // 4; normal col % 4 of the block's four."""
    per_row = -(-cols // 4)
    got = materialise(2, rows, cols, first=4).numpy()
    for direction in (0, 1):
        normals = _C.normals(MIXED, GENERATION, STREAM, 4 + direction, 0, rows * per_row)
        for row, col in itertools.product({0, rows // 2, rows - 1}, {0, cols // 2, cols - 1}):
            assert got[direction, row, col] == normals[row * per_row + col // 4, col % 4]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sign_layout(rows, cols):
    """Block c1 = row // 4 * ceil(cols / 32) + col // 32, word row % 4, bit col % 32; set is +1."""
    across = -(-cols // 32)
    got = materialise(2, rows, cols, first=4, rademacher=True).numpy()
    for direction in (0, 1):
        words = _C.words(MIXED, GENERATION, STREAM, 4 + direction, 0, -(-rows // 4) * across)
        for row, col in itertools.product(range(rows), {0, cols // 2, cols - 1}):
            bit = int(words[row // 4 * across + col // 32, row % 4]) >> col % 32 & 1
            assert got[direction, row, col] == (1 if bit else -1)


@pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "rademacher"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_materialise_equals_plain_torch(capability, rows, cols, rademacher):
    arguments = (make_key(), STREAM, 2, 5, rows, cols, rademacher, torch.float32)
    assert_bitwise_equal(
        _ops.dense_materialise(*arguments), reference.dense_materialise(*arguments)
    )


@pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "rademacher"])
@pytest.mark.parametrize("device", devices())
def test_any_range_of_directions_is_a_slice_of_the_whole(device, rademacher):
    def draw(key_first, first, count):
        key = make_key(first=key_first).to(device)
        return materialise(count, 7, 70, key=key, first=first, rademacher=rademacher)

    whole = draw(0, 0, 40)
    for first, count in ((0, 1), (1, 39), (13, 17), (39, 1), (16, 16), (40, 0)):
        assert_bitwise_equal(draw(0, first, count), whole[first : first + count])
        assert_bitwise_equal(draw(first, 0, count), whole[first : first + count])
        assert_bitwise_equal(
            draw(first // 2, first - first // 2, count), whole[first : first + count]
        )


@pytest.mark.parametrize("first", [2**31 - 2, 2**32 - 4])
@pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "rademacher"])
def test_large_global_directions(capability, first, rademacher):
    arguments = (STREAM, 0, 4, 5, 37, rademacher, torch.float32)
    key = make_key(first=first, generation=2**32 - 1)
    got = _ops.dense_materialise(key, *arguments)
    assert_bitwise_equal(got, reference.dense_materialise(key, *arguments))
    assert got.unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "rademacher"])
def test_threads_do_not_change_bits(rademacher):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(materialise(33, 130, 257, rademacher=rademacher))
    finally:
        torch.set_num_threads(before)
    assert_bitwise_equal(results[1], results[0])
    assert_bitwise_equal(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "rademacher"])
@pytest.mark.parametrize("device", devices())
def test_other_dtypes_are_rounded_float32(device, rademacher, dtype):
    key = make_key().to(device)
    single = materialise(5, 9, 75, key=key, rademacher=rademacher)
    other = _ops.dense_materialise(key, STREAM, 0, 5, 9, 75, rademacher, dtype)
    assert_bitwise_equal(other, single.to(dtype))


@pytest.mark.cuda
def test_cuda_noise_is_within_the_tolerance_of_the_contract():
    arguments = (STREAM, 0, 64, 128, 512, False, torch.float32)
    cpu = _ops.dense_materialise(make_key(), *arguments)
    error = (_ops.dense_materialise(make_key().cuda(), *arguments).cpu() - cpu).abs()
    assert error.max() <= 5e-4
    assert (error > 4e-6).double().mean() <= 2e-4
    assert error.square().mean().sqrt() <= 8e-7
    signs = (STREAM, 0, 16, 65, 130, True, torch.float32)
    assert_bitwise_equal(
        _ops.dense_materialise(make_key().cuda(), *signs).cpu(),
        _ops.dense_materialise(make_key(), *signs),
    )


def test_every_part_of_the_address_matters():
    """Another seed, generation, stream or layer is another draw; the same address is the same."""
    base = materialise()
    assert_bitwise_equal(materialise(), base)
    for other in (
        materialise(key=make_key(seed=SEED + 1)),
        materialise(key=make_key(generation=GENERATION + 1)),
        materialise(stream=STREAM - 1),
        materialise(stream=STREAM + (1 << 8)),
        materialise(first=1)[:, :1],
    ):
        assert (other == base[:, : other.shape[1]]).double().mean() < 0.01


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    materialise()
    materialise(rademacher=True)
    assert_bitwise_equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_the_program_in_the_documentation(distribution):
    """docs/conventions.md ends in a program for one element; it must be what the kernels draw."""
    namespace = documented_program()
    rows, cols, first = 6, 39, 2**32 - 2
    got = materialise(
        2, rows, cols, key=make_key(first=first), rademacher=distribution == "rademacher"
    )
    for direction, row, col in itertools.product((0, 1), range(rows), range(cols)):
        expected = namespace["element"](
            SEED, GENERATION, 3, 1, first + direction, row, col, cols, distribution
        )
        assert abs(got[direction, row, col].item() - expected) <= 1.4e-6
