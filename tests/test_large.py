"""Counters and offsets beyond 2^31 and 2^32: global indices, blocks, elements of a tensor."""

import functools

import pytest
import torch
from ops import documented_program, make_sigma, stream

import perturbed
from perturbed import _C, _ops
from perturbed.testing import assert_bitwise_equal

SEED, GENERATION = 99, 3
LAYER = 2


@functools.cache
def program():
    return documented_program()


def key(first=0, generation=GENERATION):
    return torch.tensor([_C.splitmix64(SEED), generation, first])


def need_memory(gigabytes):
    """Skip where that much, and a little more, is not free now."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if free < 1.3e6 * gigabytes:
        pytest.skip(f"needs {gigabytes} GB of memory, {free / 1e6:.1f} GB are free")


# ---- counters, which need no memory --------------------------------------------------------------

EDGES = [2**31, 2**32]
each_edge = pytest.mark.parametrize("edge", EDGES, ids=["2^31", "2^32"])
each_distribution = pytest.mark.parametrize("distribution", ["normal", "rademacher"])


@each_edge
@each_distribution
def test_directions_around(edge, distribution):
    """Global indices are taken modulo 2^32, as docs/conventions.md says."""
    drawn = _ops.dense_materialise(
        key(edge - 2), stream(0, LAYER), 1, 4, 3, 5, distribution == "rademacher", torch.float32
    )
    for d in range(4):
        for row, col in ((0, 0), (2, 4)):
            at = (edge - 1 + d) % 2**32
            expected = program()["element"](
                SEED, GENERATION, LAYER, 0, at, row, col, 5, distribution
            )
            assert float(drawn[d, row, col]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@each_edge
def test_generations_around(edge):
    for generation in (edge - 1, edge, edge + 1):
        drawn = _ops.dense_materialise(
            key(0, generation), stream(0, LAYER), 0, 1, 1, 1, False, torch.float32
        )
        expected = program()["element"](SEED, generation % 2**32, LAYER, 0, 0, 0, 0, 1, "normal")
        assert float(drawn) == pytest.approx(expected, rel=1e-5)


@each_distribution
@pytest.mark.parametrize("last", [2**31, 2**32 - 2], ids=["2^31", "2^32-2"])
def test_rows_of_a_table_whose_blocks_go_on_to(last, distribution):
    """An embedding's rows are drawn one by one: block 2^32 - 2, the last, needs no memory."""
    per_row, cols = (1, 3) if distribution == "normal" else (4, 30)
    rows = (last + 1) * per_row  # one block a row, or four rows a block
    index = torch.tensor([0, rows // 2, rows - 2, rows - 1]).view(4, 1)
    drawn = _ops.dense_lookup(
        index, key(), stream(0, LAYER), 1, rows, cols, distribution == "rademacher", torch.float32
    )
    for entry, row in enumerate(index.flatten().tolist()):
        for col in (0, cols - 1):
            expected = program()["element"](
                SEED, GENERATION, LAYER, 0, 0, row, col, cols, distribution
            )
            assert float(drawn[entry, 0, col]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_matrix_of_more_blocks_is_refused():
    index = torch.zeros(1, 1, dtype=torch.int64)
    for rows, cols, rademacher in ((2**32, 4, False), (2**34, 32, True)):
        with pytest.raises(RuntimeError, match="blocks"):
            _ops.dense_lookup(
                index, key(), stream(0, LAYER), 1, rows, cols, rademacher, torch.float32
            )


# ---- limits that a model checks ------------------------------------------------------------------


def test_limits_of_a_population_name_themselves():
    for directions in (2**32, 2**40):
        with pytest.raises(ValueError, match=r"directions must be between 1 and 2\^32 - 1"):
            perturbed.PerturbedLinear(2, 2, directions)
    layer = perturbed.PerturbedLinear(2, 2, 2**32 - 1)
    pm = perturbed.PerturbedModel(layer, 2**32 - 1, antithetic=False, sigma=0.3, seed=SEED)
    pm.set_noise()
    # The last direction of them all; its neighbours, the first ones, are of another window.
    with pm.window(2**32 - 2, 1):
        drawn = layer.parameter_noise("weight", 0, 1)
    expected = program()["element"](SEED, 0, 0, 0, 2**32 - 2, 1, 1, 2, "normal")
    assert float(drawn[0, 1, 1]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="population"):
        pm.window(2**32 - 2, 2).__enter__()


@pytest.mark.parametrize("generation", [2**63, 2**70, -(2**63) - 1])
def test_a_generation_that_is_no_64_bit_number_is_refused(generation):
    pm = perturbed.PerturbedModel(perturbed.PerturbedLinear(2, 2, 2), 2)
    pm.set_noise()
    before = pm.get_extra_state()
    with pytest.raises(ValueError, match="generation"):
        pm.set_extra_state({**before, "generation": generation})
    assert pm.get_extra_state() == before
    pm.set_noise()


# ---- tensors of more than 2^31 and 2^32 elements -------------------------------------------------

BIG = pytest.mark.slow
SIDE = 2**15


def check_last(got, direction, row, col, cols, distribution, scale=1.0):
    expected = scale * program()["element"](
        SEED, GENERATION, LAYER, 0, direction, row, col, cols, distribution
    )
    assert float(got) == pytest.approx(expected, rel=1e-2)  # bfloat16


@BIG
@pytest.mark.parametrize("count", [2, 4], ids=["2^31", "2^32"])
@each_distribution
def test_materialised_noise(count, distribution):
    need_memory(2.2 * count)
    rows, cols = SIDE, SIDE + 36
    drawn = _ops.dense_materialise(
        key(), stream(0, LAYER), 0, count, rows, cols, distribution == "rademacher", torch.bfloat16
    )
    for d, row, col in ((0, 0, 0), (count - 1, 5, 9), (count - 1, rows - 1, cols - 1)):
        check_last(drawn[d, row, col], d, row, col, cols, distribution)


@BIG
@each_distribution
def test_estimates(distribution):
    need_memory(4.4)
    rows, cols = SIDE, 2 * SIDE + 36
    grad = torch.full((rows, cols), float("nan"), dtype=torch.bfloat16)
    weights = torch.tensor([0.5])
    _ops.dense_estimate_(
        grad, weights, key(), make_sigma(), stream(0, LAYER), distribution == "rademacher", False
    )
    for row, col in ((0, 0), (rows // 2, 7), (rows - 1, cols - 1)):
        check_last(grad[row, col], 0, row, col, cols, distribution, 0.5 * 0.3)
    assert not grad[-1].isnan().any()


@BIG
@each_distribution
@pytest.mark.parametrize("of", ["y", "x"])
def test_rows(of, distribution):
    """An output, or an input that is one row seen by all, of more than 2^31 elements."""
    inputs, outputs = (4, SIDE + 4) if of == "y" else (SIDE + 4, 4)
    need_memory(4.5)
    batch, directions = 2 * SIDE, 4
    x = torch.zeros(1, 1, inputs, dtype=torch.bfloat16)
    x[..., -1] = 1.0
    x = x.expand(batch, 1, inputs)
    y = torch.zeros(batch, 1, outputs, dtype=torch.bfloat16)
    _ops.dense_linear_(
        y,
        x,
        key(),
        make_sigma(),
        stream(0, LAYER),
        -1,
        directions,
        False,
        distribution == "rademacher",
    )
    for row, out in ((0, 0), (batch - 2, 3), (batch - 1, outputs - 1)):
        check_last(y[row, 0, out], row % directions, out, inputs - 1, inputs, distribution, 0.3)
    repeats = y.view(-1, directions, outputs)
    assert_bitwise_equal(repeats[-1], repeats[0])
