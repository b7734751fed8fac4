"""How a population is cut over processes and forwards: properties of every small case."""

import itertools

import pytest

from perturbed.optim.split import Split

POPULATIONS = range(1, 24)
CHUNKS = [None, 1, 2, 3, 5, 7, 8, 23, 24, 100]
CASES = [
    (population, chunk, size)
    for population, chunk in itertools.product(POPULATIONS, CHUNKS)
    for size in range(1, population + 1)
]


def cut(population, chunk, size):
    return [Split(population, chunk, rank, size) for rank in range(size)]


def test_every_direction_is_somebodys_once():
    for case in CASES:
        splits = cut(*case)
        assert [d for s in splits for d in range(s.first, s.first + s.count)] == [*range(case[0])]


def test_all_processes_know_what_the_others_have():
    for case in CASES:
        splits = cut(*case)
        assert all(s.sizes == [t.count for t in splits] for s in splits)
        assert all(s.population == case[0] for s in splits)
        assert all(s.count >= 1 for s in splits)


def test_no_forward_has_more_than_a_chunk():
    for population, chunk, size in CASES:
        for s in cut(population, chunk, size):
            assert 1 <= s.chunk <= s.count
            assert s.chunk == s.count if chunk is None else s.chunk <= chunk


def test_chunks_are_the_same_whatever_the_number_of_processes():
    """Forwards of the same directions: that is what makes losses bit for bit the same."""
    for population, chunk, size in CASES:
        if chunk is None or -(-population // chunk) < size:
            continue  # fewer chunks than processes: these must be cut
        alone = set(range(0, population, chunk))
        forwards = {
            first
            for s in cut(population, chunk, size)
            for first in range(s.first, s.first + s.count, s.chunk)
        }
        assert forwards == alone, (population, chunk, size)


def test_shares_differ_by_one_chunk_at_most():
    for population, chunk, size in CASES:
        counts = [s.count for s in cut(population, chunk, size)]
        whole = chunk is not None and -(-population // chunk) >= size
        # Whole chunks, the population's last being a short one; or single directions.
        assert max(counts) - min(counts) <= (2 * chunk - 1 if whole else 1)


def test_more_processes_than_directions():
    for size in (4, 100):
        with pytest.raises(ValueError, match=f"got {size} processes for a population of 3"):
            Split(3, None, 0, size)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_a_direction(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1 direction, got {chunk}"):
        Split(4, chunk)


@pytest.mark.parametrize("chunk", [2.0, "2", True])
def test_a_chunk_is_a_whole_number(chunk):
    with pytest.raises(TypeError, match="chunk must be an int"):
        Split(4, chunk)
