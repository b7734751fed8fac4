"""Statistics of the selections: fixed seeds, limits of 5 standard errors.

The contract's permutations are exactly bijections (test_noise_selection.py) but only nearly
uniform; what families rely on is that an entry is uniform, that pairs of entries are, and that two
directions agree as often as two independent permutations do.
"""

import math

import pytest
import torch
from ops import make_key, stream

from perturbed import _ops

LIMIT = 5.0
STREAM = stream(9)
SIZES = [2, 3, 5, 8, 17, 64, 100, 256]
# Small sizes walk through 256 values, 256 / size steps an entry: their draws are limited by steps.
ENTRIES, STEPS = 10_000_000, 100_000_000

each_size = pytest.mark.parametrize("size", SIZES)


def directions_of(size):
    return int(min(ENTRIES, STEPS * size / 256) / size)


def draw(size, *, directions=None, replace=False, stream=STREAM, generation=3, seed=None):
    key = make_key(generation=generation)
    directions = directions_of(size) if directions is None else directions
    return _ops.selections(key, stream, 0, directions, size, size, replace)


def assert_chi_square(counts, expected, degrees, scale=1.0):
    """Pearson's sum over cells, against its degrees of freedom."""
    statistic = scale * ((counts.double() - expected) ** 2 / expected).sum()
    assert abs(statistic - degrees) <= LIMIT * math.sqrt(2 * degrees)


def assert_mean(values, expected, variance):
    assert abs(values.double().mean() - expected) <= LIMIT * math.sqrt(variance / len(values))


def agreements(a, b):
    """Entries at which two lists of permutations agree: [D]."""
    return (a == b).sum(1)


def assert_independent(agreed, size):
    """Agreements F of independent permutations are the fixed points of a random one.

    Its factorial moments E F (F - 1) .. (F - k + 1) are 1 up to k = size: P(agree at i) = 1 / n,
    and P(agree at i and j) = 1 / (n (n - 1)).
    """
    assert_mean(agreed, 1, 1)
    pairs = agreed * (agreed - 1)
    assert_mean(pairs, 1, (size >= 4) + 4 * (size >= 3) + 2 - 1)


# ---- permutations --------------------------------------------------------------------------------


@each_size
def test_permutations(size):
    check_permutations(draw(size), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [n for n in SIZES if directions_of(n) < ENTRIES // n])
def test_more_permutations_of_small_sizes(size):
    check_permutations(draw(size, directions=ENTRIES // size), size)


def check_permutations(entries, size):
    directions = len(entries)
    cells = torch.arange(size) * size

    # P(pi(i) = j) = 1 / n. Rows and columns of the counts are fixed sums: (n - 1)^2 degrees.
    counts = (entries + cells).flatten().bincount(minlength=size * size)
    expected = directions / size
    assert_chi_square(counts, expected, (size - 1) ** 2, scale=(size - 1) / size)
    deviation = math.sqrt(expected * (1 - 1 / size))
    # 65,536 cells of the largest size: P(|Z| > 5.5) = 4e-8.
    assert (counts - expected).abs().max() <= 5.5 * deviation + 1

    # Pairs of entries of a direction: P = 1 / (n (n - 1)).
    for i, j in {(0, 1), (0, size - 1), (size // 2 - 1, size // 2), (size - 2, size - 1)}:
        pairs = (entries[:, i] * size + entries[:, j]).bincount(minlength=size * size)
        different = pairs.view(size, size)[~torch.eye(size, dtype=torch.bool)]
        assert pairs.sum() == different.sum()
        number = size * (size - 1)
        assert_chi_square(different, directions / number, number - 1)

    # Two directions, and a direction with the identity.
    for distance in (1, 1024):
        assert_independent(agreements(entries[:-distance], entries[distance:]), size)
    assert_independent(agreements(entries, torch.arange(size)), size)


@pytest.mark.parametrize("size", [5, 64, 100, 1000])
def test_streams_generations_and_layers_are_independent(size):
    count = 200_000_000 // (size * 1000)
    directions = max(2000, min(count, 200_000))
    base = draw(size, directions=directions)
    for other in (
        draw(size, directions=directions, stream=stream(7)),
        draw(size, directions=directions, stream=stream(8)),
        draw(size, directions=directions, stream=stream(9, layer=3)),
        draw(size, directions=directions, generation=4),
    ):
        assert_independent(agreements(base, other), size)


@pytest.mark.parametrize("size", [5, 100])
def test_permutations_do_not_depend_on_draws_of_values(size):
    """The first entry against the first noise value of the same direction, on another stream."""
    directions = 100_000
    entry = draw(size, directions=directions)[:, 0].double()
    value = _ops.dense_materialise(
        make_key(), stream(10), 0, directions, 1, 1, False, torch.float64
    ).flatten()
    assert_mean((entry - (size - 1) / 2) * value, 0, (size**2 - 1) / 12)


# ---- draws with replacement ----------------------------------------------------------------------


@each_size
def test_draws_with_replacement(size):
    entries = draw(size, directions=ENTRIES // size, replace=True)
    directions = len(entries)
    assert int(entries.min()) == 0
    assert int(entries.max()) == size - 1
    counts = entries.flatten().bincount(minlength=size)
    assert_chi_square(counts, entries.numel() / size, size - 1)
    pairs = (entries[:, :-1] * size + entries[:, 1:]).flatten()
    if size > 2:  # every second pair, which share no entry
        pairs = pairs.view(directions, -1)[:, ::2].flatten()
    assert_chi_square(pairs.bincount(minlength=size**2), pairs.numel() / size**2, size**2 - 1)
    # Values that no entry takes: about 1 / e of them.
    seen = torch.zeros(directions, size, dtype=torch.bool).scatter_(1, entries, True)
    one, two = (1 - 1 / size) ** size, (1 - 2 / size) ** size
    missing = size * one
    variance = missing + size * (size - 1) * two - missing**2
    assert_mean((~seen).sum(1), missing, variance)
    if size == 256:
        assert float((~seen).double().mean()) == pytest.approx(1 / math.e, abs=1e-3)
    # Two directions.
    assert_mean(agreements(entries[:-1], entries[1:]), 1, 1 - 1 / size)
