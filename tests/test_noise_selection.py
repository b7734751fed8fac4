"""Selections of the noise contract (csrc/noise/permutation.h): bits and bijection.

`model` is written from docs/conventions.md in NumPy and knows neither the kernels nor
perturbed/reference. Statistics: test_noise_selection_statistics.py.
"""

import hashlib

import numpy as np
import pytest
import torch
from ops import documented_program, each_device, make_key

from perturbed import _C, _ops, reference
from perturbed.testing import assert_bitwise_equal

SEED, GENERATION, STREAM = 1234, 7, 3 << 8 | 9  # layer 3, sparse columns
MIXED = _C.splitmix64(SEED)

each_way = pytest.mark.parametrize("replace", [False, True], ids=["permutation", "replace"])


def draw(size, count=None, *, directions=1, first=5, replace=False, key=None, stream=STREAM):
    """Entries of `directions` selections from direction `first` on: [directions, count] int64."""
    key = torch.tensor([MIXED, GENERATION, 0]) if key is None else key
    count = size if count is None else count
    return _ops.selections(key, stream, first, directions, size, count, replace)


def philox_words(direction, blocks):
    """The words of blocks 0 .. blocks - 1, one after the other, as 64-bit integers."""
    counters = np.zeros((blocks, 4), np.uint32)
    counters[:, 0], counters[:, 2], counters[:, 3] = STREAM, GENERATION, direction
    counters[:, 1] = np.arange(blocks)
    return _C.philox(counters, MIXED).astype(np.uint64).ravel()


def model(size, count, direction, replace=False):
    """Entries 0 .. count - 1 by the contract's text."""
    if replace:
        drawn = philox_words(direction, -(-count // 4))[:count]
        return (drawn * np.uint64(size) >> np.uint64(32)).astype(np.int64)
    bits = 8
    while 2**bits < size:
        bits += 1
    widths = [bits // 2, bits - bits // 2]  # high half, low half
    multiplier, offset = philox_words(direction, 4).reshape(8, 2).T
    left, right = 0, 1
    value = np.arange(count, dtype=np.uint64)
    outside = np.ones(count, bool)
    while outside.any():
        halves = [value >> np.uint64(widths[right]), value % np.uint64(2 ** widths[right])]
        for round_ in range(8):
            changed, source = (left, right) if round_ % 2 == 0 else (right, left)
            line = (multiplier[round_] * halves[source] + offset[round_]) % np.uint64(2**32)
            halves[changed] = halves[changed] ^ line >> np.uint64(32 - widths[changed])
        walked = halves[left] * np.uint64(2 ** widths[right]) + halves[right]
        value = np.where(outside, walked, value)
        outside = value >= size
    return value.astype(np.int64)


# ---- bits ----------------------------------------------------------------------------------------

# Stored results of seed 1234, generation 7, stream 3 << 8 | 9. They change only with the version of
# the noise contract, never with a kernel.
KNOWN_ANSWERS = {
    # (size, direction, replace): entries
    (10, 5, False): [1, 7, 5, 8, 3, 2, 9, 4, 6, 0],
    (10, 2**32 - 1, False): [7, 9, 2, 8, 6, 0, 1, 5, 3, 4],
    (10, 5, True): [4, 7, 9, 2, 3, 8, 6, 5, 9, 0],
}
# 2^18 entries of direction 5, as little-endian 32-bit words.
SHA256 = {
    # (size, replace)
    (1 << 18, False): "ea324e5895f90bb0ddbe52e1ff80da6f3781c17af6afc9d28e1a8534404bdc21",
    (300_007, False): "5a7c7e9f5bab33b3689bd15137039dffc477db60a4122a4dfd65ab356671a7c0",
    (300_007, True): "a3aa16fdcdb29265a0a929c53c59c83b954c03421841880f33593de8718eb6d7",
}


@pytest.mark.parametrize(("size", "direction", "replace"), KNOWN_ANSWERS)
def test_known_answers(size, direction, replace):
    expected = KNOWN_ANSWERS[size, direction, replace]
    assert draw(size, first=direction, replace=replace)[0].tolist() == expected
    assert model(size, size, direction, replace).tolist() == expected
    key = torch.tensor([MIXED, GENERATION, direction])
    plain = reference.selections(key, STREAM, 0, 1, size, size, replace)
    assert plain[0].tolist() == expected


@pytest.mark.parametrize(("size", "replace"), SHA256)
def test_committed_hash(size, replace):
    entries = draw(size, 1 << 18, replace=replace)[0].numpy().astype("<u4")
    assert hashlib.sha256(entries.tobytes()).hexdigest() == SHA256[size, replace]


# Around the widths of the network: 8 bits up to 256, then one more at every power of two.
SIZES = [1, 2, 3, 5, 31, 33, 63, 64, 65, 100, 255, 256, 257, 511, 512, 513, 1000, 4095, 4097]


@each_way
@each_device
@pytest.mark.parametrize("size", SIZES)
def test_selections_equal_the_model(device, size, replace):
    key = torch.tensor([MIXED, GENERATION, 3], device=device)
    got = draw(size, directions=4, first=1, replace=replace, key=key)
    assert got.device.type == torch.device(device).type
    for direction, entries in zip(range(4, 8), got.tolist(), strict=True):
        assert entries == model(size, size, direction, replace).tolist()
    assert_bitwise_equal(got, reference.selections(key, STREAM, 1, 4, size, size, replace))


@each_way
@each_device
@pytest.mark.parametrize("size", [65_535, 65_537, 70_000, 2**20 + 1, 2**31, 2**32 - 2])
def test_first_entries_of_large_selections_equal_the_model(device, size, replace):
    key = torch.tensor([MIXED, GENERATION, 0], device=device)
    got = draw(size, 1000, replace=replace, key=key)
    assert got[0].tolist() == model(size, 1000, 5, replace).tolist()
    assert_bitwise_equal(got, reference.selections(key, STREAM, 5, 1, size, 1000, replace))


@each_device
def test_large_global_directions(device):
    key = torch.tensor([MIXED, GENERATION, 2**32 - 2], device=device)
    got = draw(50, directions=3, first=0, key=key)
    for direction, entries in zip((2**32 - 2, 2**32 - 1, 0), got.tolist(), strict=True):
        assert entries == model(50, 50, direction).tolist()


@pytest.mark.parametrize("size", [1, 2, 5, 37, 256, 257, 1000])
def test_the_program_in_the_documentation(size):
    permutation = documented_program()["permutation"]
    for direction in (0, 2**32 - 1):
        expected = permutation(SEED, GENERATION, 3, 9, direction, size)
        assert draw(size, first=direction)[0].tolist() == expected


# ---- bijection -----------------------------------------------------------------------------------


@each_device
def test_every_size_is_permuted(device):
    key = make_key(device)
    for size in range(1, 301):
        entries = draw(size, directions=5, key=key)
        identity = torch.arange(size, device=device).expand(5, size)
        assert_bitwise_equal(entries.sort(1).values, identity.contiguous())


@each_device
@pytest.mark.parametrize("size", [1023, 1025, 65_536, 65_537, 70_000, 2**20 - 1, 2**20])
def test_large_sizes_are_permuted(device, size):
    entries = draw(size, directions=2, key=make_key(device))
    assert_bitwise_equal(entries.sort(1).values[1], torch.arange(size, device=device))
    assert (entries[0] != entries[1]).any()


@each_way
def test_fewer_entries_are_the_first(replace):
    whole = draw(300, directions=3, replace=replace)
    for count in (0, 1, 2, 3, 5, 31, 33, 299):
        part = draw(300, count, directions=3, replace=replace)
        assert_bitwise_equal(part, whole[:, :count].contiguous())


def test_every_part_of_the_address_matters():
    base = draw(1000)
    assert_bitwise_equal(draw(1000), base)
    for seed, generation, first, stream in (
        (SEED + 1, GENERATION, 0, STREAM),
        (SEED, GENERATION + 1, 0, STREAM),
        (SEED, GENERATION, 1, STREAM),
        (SEED, GENERATION, 0, STREAM - 1),
        (SEED, GENERATION, 0, STREAM + (1 << 8)),
    ):
        key = torch.tensor([_C.splitmix64(seed), generation, first])
        for replace in (False, True):
            other = draw(1000, key=key, stream=stream, replace=replace)
            same = draw(1000, replace=replace)
            assert (other == same).double().mean() < 0.01


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    draw(100)
    draw(100, replace=True)
    assert_bitwise_equal(torch.get_rng_state(), before)
