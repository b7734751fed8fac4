"""What E_d is in every noise family: its statistics, its shape, and who draws it.

That layers, members and estimates agree on E_d is shown by test_nn_linear.py.
"""

import numpy as np
import pytest
import torch
from families import FAMILIES
from zoo import same

from perturbed import (
    Dense,
    LowRank,
    LowRankLinear,
    Permuted,
    PermutedLinear,
    PerturbedLinear,
    PerturbedModel,
    SignFlip,
    SignFlipLinear,
    Sparse,
    SparsePerturbedLinear,
    convert,
)
from perturbed.noise.base import STREAM_BIAS, STREAM_WEIGHT, LayerNoise, stream_word
from perturbed.noise.state import NoiseState
from perturbed.testing import assert_bitwise_equal

SIGMA = 0.3
LAYER = 4
WEIGHT, BIAS = stream_word(LAYER, STREAM_WEIGHT), stream_word(LAYER, STREAM_BIAS)

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def draw(directions, first=0, generation=0, seed=1, layer=LAYER):
    """A layer's place in a draw of ``directions`` directions that start at the global ``first``."""
    state = NoiseState(directions, antithetic=False, sigma=SIGMA, seed=seed)
    state.first_direction = first
    state.move(seed, generation, SIGMA)
    return LayerNoise(state, stream_word(layer, STREAM_WEIGHT), stream_word(layer, STREAM_BIAS))


def weight_noise(family, site, rows, cols, dtype=torch.float64, first=0, count=None):
    count = site.state.directions if count is None else count
    like = torch.empty(0, dtype=dtype)
    return family.materialise(site, site.weight, first, count, rows, cols, like)


# ---- statistics --------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize(("rows", "cols"), [(5, 6), (4, 40)])
def test_every_element_has_mean_0_and_variance_1(family, rows, cols):
    """Elementwise over draws, because the directions of one draw share what the family shares."""
    draws, directions = 300, 8
    sums = torch.zeros(2, rows, cols, dtype=torch.float64)
    fourth = 0.0
    for generation in range(draws):
        noise = weight_noise(family, draw(directions, generation=generation), rows, cols)
        sums += torch.stack([noise.sum(0), noise.square().sum(0)])
        fourth += float(noise.pow(4).mean()) / draws
    mean, square = sums / (draws * directions)
    # A draw counts once: its directions, and in the mean over all elements those too, may repeat
    # the same numbers.
    assert mean.abs().max() < 5 * draws**-0.5
    assert (square - 1).abs().max() < 5 * (fourth / draws) ** 0.5
    assert abs(mean.mean()) < 5 * (draws * min(rows, cols)) ** -0.5
    assert abs(square.mean() - 1) < 5 * (fourth / (draws * min(rows, cols))) ** 0.5


@each_family
def test_directions_draws_and_layers_differ(family):
    site = draw(4)
    noise = weight_noise(family, site, 40, 40)
    assert len({tuple(e.flatten().tolist()) for e in noise}) == 4
    for other in (draw(4, generation=1), draw(4, seed=2), draw(4, layer=LAYER + 1)):
        assert not torch.equal(noise, weight_noise(family, other, 40, 40))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_noise_has_that_rank(rank, distribution):
    noise = weight_noise(LowRank(rank, distribution), draw(20), 32, 24)
    ranks = torch.linalg.matrix_rank(noise)
    assert (ranks <= rank).all()
    assert (ranks == rank).sum() > 15


def test_sparse_noise_has_k_distinct_columns():
    noise = weight_noise(Sparse(3), draw(50), 9, 20)
    used = noise.ne(0).all(1)
    assert (used.sum(1) == 3).all()
    assert torch.equal(noise.ne(0).any(1), used)
    assert used.any(0).all()  # every column is some direction's
    assert noise[:, :, :].square().sum() / noise.numel() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("family", "nonzero_rows", "nonzero_cols"),
    [
        (Permuted("in"), 12, 20),
        (Permuted("both"), 12, 20),
        (Permuted("in", in_sparsity=7), 12, 7),
        (Permuted("auto", out_sparsity=0.25), 3, 20),
        (Permuted("auto", in_sparsity=0.1, out_sparsity=5), 5, 2),
        (Permuted("in", out_sparsity=1), 1, 20),
        (Permuted("in", in_sparsity=0.001), 12, 1),
    ],
    ids=repr,
)
def test_permuted_noise_is_one_matrix_in_other_places(family, nonzero_rows, nonzero_cols):
    noise = weight_noise(family, draw(10), 12, 20)
    assert (noise.ne(0).any(2).sum(1) == nonzero_rows).all()
    assert (noise.ne(0).any(1).sum(1) == nonzero_cols).all()
    values = noise.flatten(1).sort().values
    assert_bitwise_equal(values, values[:1].expand_as(values))
    assert not torch.equal(noise[0], noise[1])


def test_repeated_rows_and_columns():
    noise = weight_noise(Permuted("out", allow_repeats=True), draw(50), 64, 3)
    distinct = torch.tensor([len(set(map(tuple, e.tolist()))) for e in noise]).double()
    assert distinct.mean() / 64 == pytest.approx(1 - 1 / torch.e, abs=0.03)
    noise = weight_noise(Permuted("in", allow_repeats=True), draw(50), 3, 64)
    assert noise.eq(0).all(1).double().mean() == pytest.approx(1 / torch.e, abs=0.03)


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_sign_flips_are_of_the_bases(bases):
    noise = weight_noise(SignFlip("both", bases=bases), draw(12, first=5), 6, 8).abs()
    for d in range(12):
        for other in range(12):
            assert torch.equal(noise[d], noise[other]) == ((d - other) % bases == 0)


@each_family
def test_bias_noise_is_dense(family):
    like = torch.empty(0)
    noise = family.materialise(draw(3), BIAS, 0, 3, 1, 50, like)
    expected = Dense(family.distribution).materialise(draw(3), BIAS, 0, 3, 1, 50, like)
    assert_bitwise_equal(noise, expected)


# ---- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # "auto" looks at the number of directions
    "family", [f for f in FAMILIES.values() if f != Sparse()], ids=repr
)
@torch.no_grad()
def test_a_shard_is_a_slice_of_the_population(family):
    """Three processes with a part of the directions each draw what one with all of them draws."""
    rows, cols, parts = 7, 6, (4, 1, 3)
    whole = draw(sum(parts))
    expected = weight_noise(family, whole, rows, cols)
    x = torch.randn(sum(parts), 1, cols, dtype=torch.float64)
    weights = torch.randn(sum(parts), dtype=torch.float64)
    y = family.add_linear(torch.zeros(sum(parts), 1, rows, dtype=x.dtype), x, whole, False)
    grad = torch.zeros(rows, cols, dtype=x.dtype)
    total = torch.zeros_like(grad)
    first = 0
    for count in parts:
        site, here = draw(count, first), slice(first, first + count)
        assert_bitwise_equal(weight_noise(family, site, rows, cols), expected[here])
        zeros = torch.zeros(count, 1, rows, dtype=x.dtype)
        same(family.add_linear(zeros, x[here], site, False), y[here])
        family.estimate_(total, weights[here], site, site.weight, True)
        first += count
    family.estimate_(grad, weights, whole, whole.weight, False)
    same(total, grad)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_of_any_dtype_is_the_rounded_noise(family, dtype):
    wide = weight_noise(family, draw(5), 9, 10, torch.float32)
    assert_bitwise_equal(weight_noise(family, draw(5), 9, 10, dtype), wide.to(dtype))


# ---- options -----------------------------------------------------------------------------------


def test_families_are_values():
    names = list(FAMILIES)
    for i, a in enumerate(FAMILIES.values()):
        for j, b in enumerate(FAMILIES.values()):
            assert (a == b) == (i == j), (names[i], names[j])
        assert eval(repr(a)) == a
        assert hash(eval(repr(a))) == hash(a)


BAD_OPTIONS = [
    (lambda: LowRank(0), ValueError, "rank must be at least 1, got 0"),
    (lambda: LowRank(1.5), TypeError, "rank must be an int, got 1.5"),
    (lambda: LowRank(1, "uniform"), ValueError, "distribution must be one of .* got 'uniform'"),
    (lambda: LowRankLinear(6, 5, 3, rank=6), ValueError, r"at most min\(in, out\) = 5 .* got 6"),
    (lambda: SparsePerturbedLinear(6, 5, 3, sparsity=7), ValueError, "in_features = 6, got 7"),
    (lambda: Sparse(0), ValueError, "sparsity as a count must be at least 1, got 0"),
    (lambda: Sparse(1.5), ValueError, r"sparsity as a fraction must be in \(0, 1\], got 1.5"),
    (lambda: Sparse(0.0), ValueError, r"must be in \(0, 1\], got 0.0"),
    (lambda: Sparse("half"), ValueError, "sparsity must be a count, a fraction or 'auto'"),
    (lambda: Sparse(None), TypeError, "sparsity must be an int, got None"),
    (lambda: Sparse(True), TypeError, "sparsity must be an int, got True"),
    (lambda: Permuted("rows"), ValueError, "permutation must be one of .* got 'rows'"),
    (lambda: Permuted(None), ValueError, "permutation must be one of .* got None"),
    (lambda: Permuted(in_sparsity=-1), ValueError, "in_sparsity as a count .* got -1"),
    (lambda: Permuted(out_sparsity=1.01), ValueError, r"out_sparsity as a fraction .* got 1.01"),
    (lambda: Permuted(in_sparsity=float("nan")), ValueError, "got nan"),
    (lambda: Permuted(allow_repeats=1), TypeError, "allow_repeats must be True or False, got 1"),
    (lambda: Permuted(storage="disk"), ValueError, "storage must be one of .* got 'disk'"),
    (lambda: PermutedLinear(6, 5, 3, in_sparsity=7), ValueError, "in_features = 6, got 7"),
    (lambda: PermutedLinear(6, 5, 3, out_sparsity=6), ValueError, "out_features = 5, got 6"),
    (lambda: PermutedLinear(1, 5, 3, permutation="in"), ValueError, "a side longer than 1"),
    (lambda: PermutedLinear(1, 1, 3), ValueError, r"a side longer than 1, got a \(1, 1\) weight"),
    (lambda: SignFlip("left"), ValueError, "flip must be one of .* got 'left'"),
    (lambda: SignFlip(np.array(["in", "out"])), ValueError, "flip must be one of"),
    (lambda: SignFlip(bases=0), ValueError, "bases must be at least 1, got 0"),
    (lambda: SignFlip(bases=2.0), TypeError, "bases must be an int, got 2.0"),
    (lambda: SignFlipLinear(6, 5, 3, flip=1), ValueError, "flip must be one of .* got 1"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD_OPTIONS)
def test_bad_options_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_model_that_does_not_fit_stays_as_it_was():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"1: rank must be at most .* = 2 .* got 3"):
        convert(net, 4, noise=LowRank(3))
    assert type(net[0]) is type(net[1]) is torch.nn.Linear


AUTO = [
    (4, 6, (True, True)),
    (31, 31, (True, True)),
    (32, 31, (False, True)),
    (31, 32, (True, False)),
    (64, 64, (True, False)),
    (1, 6, (True, False)),
    (6, 1, (False, True)),
    (100, 10, (False, True)),
]


@pytest.mark.parametrize(("rows", "cols", "sides"), AUTO)
def test_auto_varies_the_longer_side_and_both_of_small_weights(rows, cols, sides):
    noise = weight_noise(SignFlip(), draw(30), rows, cols)
    signs = noise * noise[:1]  # relative to the first direction
    assert bool((signs < 0).all(1).logical_or((signs > 0).all(1)).all()) == (not sides[1])
    assert bool((signs < 0).all(2).logical_or((signs > 0).all(2)).all()) == (not sides[0])
    assert Permuted().sides(rows, cols) == sides


def test_auto_sparsity_spreads_the_columns_over_the_directions():
    for directions, expected in ((3, 2), (6, 1), (100, 1), (1, 6), (2, 3)):
        noise = weight_noise(Sparse(), draw(directions), 5, 6)
        assert (noise.ne(0).any(1).sum(1) == expected).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (5, 1), (1, 1), (2, 2)])
@each_family
@torch.no_grad()
def test_layers_with_sides_of_one(family, inputs, outputs):
    try:
        layer = PerturbedLinear(inputs, outputs, 4, noise=family, dtype=torch.float64)
    except ValueError as error:
        assert "at most" in str(error) or "a side longer than 1" in str(error)  # noqa: PT017
        return
    pm = PerturbedModel(layer, 4, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(8, inputs, dtype=torch.float64)
    y = pm(x)
    for b in range(8):
        same(pm.member(b % 4, 1 if b < 4 else -1)(x[b]), y[b])


@torch.no_grad()
def test_no_more_bases_are_drawn_than_there_are_directions():
    outputs, grads = [], []
    for bases in (3, 10**30):
        net = convert(torch.nn.Linear(6, 5).double(), 3, SignFlip(bases=bases))
        torch.nn.init.zeros_(net.weight)
        torch.nn.init.zeros_(net.bias)
        pm = PerturbedModel(net, 3)
        pm.set_noise()
        pm.set_grad(torch.arange(3.0))
        outputs.append(pm(torch.eye(6, dtype=torch.float64)))
        grads.append(net.weight.grad)
    assert_bitwise_equal(*outputs)
    assert_bitwise_equal(*grads)


def test_held_bases_are_the_drawn_ones():
    x = torch.randn(8, 6, dtype=torch.float64)
    for make in (SignFlip, Permuted):
        outputs = []
        for storage in ("regenerate", "stored"):
            torch.manual_seed(0)
            layer = PerturbedLinear(6, 5, 4, noise=make("in", storage=storage), dtype=x.dtype)
            pm = PerturbedModel(layer, 4, sigma=SIGMA)
            pm.set_noise()
            outputs.append([pm(x)])
            held = layer.held_bytes()
            assert held == (30 * 8 if storage == "stored" else 0)
            pm.set_noise()
            assert layer.held_bytes() == 0
            outputs[-1].append(pm(x))
        assert_bitwise_equal(torch.stack(outputs[0]), torch.stack(outputs[1]))
        assert not torch.equal(*outputs[0])
