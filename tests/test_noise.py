"""Words and normals of the noise contract (docs/conventions.md), bit by bit."""

import hashlib
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from perturbed import _C, reference
from perturbed.noise import base
from perturbed.testing import assert_bitwise_equal

SEED = 1234
MIXED = _C.splitmix64(SEED)
GENERATION = 7
STREAM = 3 << 8 | 1  # layer 3, bias
WORD_EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)


# ---- Philox ------------------------------------------------------------------------------------

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": """00000000 00000000 00000000 00000000  00000000 00000000
                6627e8d5 e169c58d bc57ac4c 9b00dbd8""",
    "ones": """ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff
               408f276d 41c83b0e a20bc7c6 6d5451fd""",
    "digits of pi": """243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0
                       d16cfe09 94fdcceb 5001e420 24126ea1""",
}


def signed64(low, high):
    value = high << 32 | low
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name):
    words = [int(word, 16) for word in KNOWN_ANSWERS[name].split()]
    counter, key, expected = words[:4], signed64(*words[4:6]), words[6:]
    native = _C.philox(np.array([counter], np.uint32), key)
    assert native.dtype == np.uint32
    assert native[0].tolist() == expected
    plain = reference.philox4x32(torch.tensor(counter), torch.tensor(key))
    assert plain.tolist() == expected


def test_philox_native_and_plain_agree_on_random_counters():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4096, 4), dtype=np.uint32)
    counters[: len(WORD_EDGES) ** 4] = list(itertools.product(WORD_EDGES, repeat=4))
    for key in (0, -1, MIXED, 1 << 62, -(1 << 63)):
        native = _C.philox(counters, key).astype(np.int64)
        plain = reference.philox4x32(torch.from_numpy(counters.astype(np.int64)), torch.tensor(key))
        assert_bitwise_equal(torch.from_numpy(native), plain)


def test_splitmix64():
    # First outputs of the published generator for states 0 and 1.
    assert _C.splitmix64(0) % 2**64 == 0xE220A8397B1DCDAF
    assert _C.splitmix64(1) % 2**64 == 0x910A2DEC89025CC1
    for seed in (0, 1, SEED, 2**31, 2**32, 2**63 - 1):
        assert _C.splitmix64(seed) == reference.splitmix64(seed)


# ---- streams -----------------------------------------------------------------------------------


def test_the_same_streams_in_python_in_c_and_in_the_docs():
    root = Path(__file__).parent.parent
    header = (root / "csrc" / "noise" / "counters.h").read_text()
    enum = header.partition("enum NoiseStream")[2].partition("};")[0]
    native = {
        re.sub("(?=[A-Z])", "_", name).upper(): int(number)
        for name, number in re.findall(r"kStream(\w+) = (\d+)", enum)
    }
    python = {n.removeprefix("STREAM"): v for n, v in vars(base).items() if n.startswith("STREAM_")}
    assert native == python
    assert sorted(native.values()) == list(range(len(native)))  # no number twice, none left out
    contract = (root / "docs" / "conventions.md").read_text().partition("**Streams**")[2]
    rows = re.findall(r"^\| (\d[\d, ]*) \|", contract.partition("**Families.**")[0], re.MULTILINE)
    documented = {int(number) for row in rows for number in row.split(",")}
    assert documented == set(native.values())


# ---- words: which counter a block draws from -----------------------------------------------------


@pytest.mark.parametrize("first_block", [0, 5, 2**31 - 20, 2**32 - 67])
def test_words_are_philox_of_the_documented_counter(capability, first_block):
    """c0 = stream, c1 = block, c2 = generation, c3 = direction; key words low, high."""
    count = 67  # several batches of every vector width, and a rest
    for generation, direction in ((GENERATION, 11), (2**32 - 1, 2**31), (2**31, 2**32 - 1)):
        counters = np.empty((count, 4), np.uint32)
        counters[:, 0] = STREAM
        counters[:, 1] = np.arange(first_block, first_block + count)
        counters[:, 2] = generation
        counters[:, 3] = direction
        words = _C.words(MIXED, generation, STREAM, direction, first_block, count)
        np.testing.assert_array_equal(words, _C.philox(counters, MIXED))
        plain = reference.words(
            torch.tensor([MIXED, generation, direction - 2]), STREAM, 2, 1, first_block, count
        )
        np.testing.assert_array_equal(words, plain[0].numpy())


def test_blocks_are_unique_at_the_corners():
    """No two of the corner counters give the same block, within a word or across words."""
    corners = np.array(list(itertools.product(WORD_EDGES, repeat=4)), np.uint32)
    words = _C.philox(corners, MIXED)
    assert len(np.unique(words, axis=0)) == len(WORD_EDGES) ** 4
    # And through the fast path, where c1 and c3 enter by separate precomputed parts.
    fast = [
        _C.words(MIXED, generation, stream, direction, block, 1)[0]
        for stream, block, generation, direction in corners.tolist()
    ]
    np.testing.assert_array_equal(np.stack(fast), words)


# Stored results. They change only with the version of the noise contract, never with a kernel.
# 2^18 blocks (2^20 words or normals) from block 0 on of seed 1234, generation 7, stream 3 << 8 | 1
# and direction 5, as little-endian bytes.
WORDS_SHA256 = "1789f5877c3c959a540d008e740a6365a2ae61749ffa0d8c98a8a13b8f7a5d47"
NORMALS_SHA256 = "e4575926bb868ade5f975f9a16c7b224d2781fb5f64912c8e6456074f7ba9b2f"


def sha256(array):
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def test_committed_hash_of_words(capability):
    words = _C.words(MIXED, GENERATION, STREAM, 5, 0, 1 << 18)
    assert (words.dtype, words.size) == (np.uint32, 1 << 20)
    assert sha256(words) == WORDS_SHA256


def test_committed_hash_of_normals(capability):
    normals = _C.normals(MIXED, GENERATION, STREAM, 5, 0, 1 << 18)
    assert (normals.dtype, normals.size) == (np.float32, 1 << 20)
    assert sha256(normals) == NORMALS_SHA256


# ---- normals -----------------------------------------------------------------------------------


def test_emulated_fma_rounds_once():
    """Cases where rounding to float64 first would land on a tie and go the wrong way."""
    rng = np.random.default_rng(0)
    a = np.float32(2.0**-12) * np.array([1 + 2.0**-20, 1 + 2.0**-20, 1 - 2.0**-20], np.float32)
    b = np.float32(2.0**-12) * np.array([1 - 2.0**-20, 2.0**-20 - 1, 1 + 2.0**-20], np.float32)
    c = np.array([1 + 2.0**-23, -1 - 2.0**-23, 1 + 2.0**-23], np.float32)
    a = np.concatenate([a, rng.standard_normal(2000, np.float32)])
    b = np.concatenate([b, rng.standard_normal(2000, np.float32)])
    c = np.concatenate([c, rng.standard_normal(1000, np.float32), -(a * b)[-1000:]])
    twice_rounded = (a.astype(np.float64) * b + c).astype(np.float32)
    got = reference.noise._fma(*map(torch.from_numpy, (a, b, c))).numpy()
    assert (got[:3] != twice_rounded[:3]).any(), "the crafted cases should need the correction"
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        error = abs(Fraction(float(result)) - exact)
        for neighbour in (np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf)):
            assert error <= abs(Fraction(float(neighbour)) - exact)


def test_normals_native_and_plain_are_bit_identical(capability):
    count = 1 << 15
    native = _C.normals(MIXED, GENERATION, STREAM, 5, 3, count)
    words = torch.from_numpy(_C.words(MIXED, GENERATION, STREAM, 5, 3, count).astype(np.int64))
    pairs = reference.box_muller(words[:, 0::2], words[:, 1::2])
    assert_bitwise_equal(torch.from_numpy(native), torch.stack(pairs, -1).reshape(count, 4))


def formula(words):
    """Box-Muller in float64 from numpy alone: the definition, not an implementation."""
    w0, w1 = words[..., 0::2].astype(np.int64), words[..., 1::2].astype(np.int64)
    radius = np.sqrt(-2 * np.log((2 * (w0 >> 9) + 1) * 2.0**-24))
    angle = 2 * np.pi * (w1 >> 9) * 2.0**-23
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(words.shape)


# The largest error over all pairs of words is 1.37e-6: found by trying every angle with every
# radius above 4; below 4 the errors of radius and angle add up to less than 1e-6.
NORMAL_ERROR = 1.4e-6


def test_normals_are_accurate(capability):
    count = 1 << 18
    words = _C.words(MIXED, GENERATION, STREAM, 0, 0, count)
    error = np.abs(_C.normals(MIXED, GENERATION, STREAM, 0, 0, count) - formula(words))
    assert error.max() <= NORMAL_ERROR
    assert np.quantile(error, 0.999) <= 4e-7
    assert np.sqrt(np.mean(error**2)) <= 1e-7


def test_normals_at_extreme_words():
    """Smallest and largest radius, and every angle at which a polynomial or a sign switches."""
    edges = [
        0,
        511,
        512,
        2**32 - 1,
        2**31,
        2**31 - 1,
        2**30,
        2**30 - 1,
        3 << 30,
        *range(0, 2**32, 1 << 29),
    ]
    words = np.array(list(itertools.product(edges, edges)), np.int64)
    expected = formula(words)
    assert np.abs(expected).max() == pytest.approx(math.sqrt(48 * math.log(2)))  # 5.768
    native = _C.box_muller(words.astype(np.uint32))
    assert np.abs(native - expected).max() <= NORMAL_ERROR
    w0, w1 = torch.from_numpy(words).unbind(-1)
    assert_bitwise_equal(torch.stack(reference.box_muller(w0, w1), -1), torch.from_numpy(native))
    inexact = torch.stack(reference.box_muller(w0, w1, exact=False), -1).numpy()
    assert np.abs(inexact - expected).max() <= 4e-6
