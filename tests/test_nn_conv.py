"""Perturbed convolutions: every row is its member's, whatever the family, geometry and way.

Dtypes, autograd, modes of torch and arguments: test_nn_conv_torch.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, signs
from geometries import GEOMETRIES, SIGMA, D
from zoo import same

from perturbed import (
    Dense,
    LowRank,
    LowRankConv2d,
    Permuted,
    PermutedConv2d,
    PerturbedConv2d,
    PerturbedModel,
    SignFlip,
    SignFlipConv2d,
    Sparse,
)
from perturbed import nn as perturbed_nn
from perturbed.noise import convolution, scratch
from perturbed.noise.base import STREAM_BIAS, STREAM_WEIGHT, LayerNoise, stream_word
from perturbed.noise.state import NoiseState
from perturbed.testing import assert_bitwise_equal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

# Every family meets these, and these families every geometry; the other pairs are slow tests.
CHIEF = {"groups", "strided", "pointwise", "whole", "transposed_groups"}
SOME = {"dense-normal", "low-rank-3", "sparse-1", "permuted-both-few", "sign-flip-both-bases"}
PAIRS = [
    pytest.param(
        family,
        geometry,
        marks=[] if geometry in CHIEF or family in SOME else pytest.mark.slow,
    )
    for family, noise in FAMILIES.items()
    for geometry in GEOMETRIES
    # Refused, and rightly so: a group with one channel on each side has nothing to permute.
    if not (isinstance(noise, Permuted) and geometry == "depthwise")
]
each_pair = pytest.mark.parametrize(("family", "geometry"), PAIRS)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)
WAYS = ["auto", "sums", "products"]


@pytest.fixture
def way(request, monkeypatch):
    """Have one way to compute a convolution serve all: "auto" is what users get."""
    # One direction at a time in sums, two in products.
    monkeypatch.setitem(scratch.SCRATCH_BYTES, "cpu", 5000)
    if request.param != "auto":
        monkeypatch.setattr(perturbed_nn.conv, "GEMM_ROWS", 0)
        sums = request.param == "sums"
        monkeypatch.setattr(convolution, "SUM_POSITIONS", 0 if sums else math.inf)
        monkeypatch.setattr(convolution, "holds_sums", lambda x: sums)
    return request.param


def members_of(pm):
    return {(d, sign): pm.member(d, sign) for d in range(D) for sign in (1, -1)}


def assert_rows_are_members(members, x, y, negated):
    s = signs(len(x), D, negated)
    assert len(y) == len(x)
    for (d, sign), member in members.items():
        mine = (torch.arange(len(x)) % D == d) & (s == sign)
        if mine.any():
            same(y[mine], member(x[mine]))


# ---- rows --------------------------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("way", WAYS, indirect=True)
@torch.no_grad()
def test_rows_are_their_members(family, geometry, way):
    kind = GEOMETRIES[geometry]
    for antithetic, several, shared in ((None, (1, 2, 4, 8), (1, 3)), (False, (2, 3), (2,))):
        _, pm = kind.population(FAMILIES[family], antithetic)
        members = members_of(pm)
        for repeats in several:
            x = kind.inputs(repeats * D)
            negated = antithetic is None and repeats > 1
            assert_rows_are_members(members, x, pm(x), negated)
        for rows in shared:
            x = pm.replicate(kind.inputs(rows))
            assert_rows_are_members(members, x.full(), pm(x), antithetic is None)


@each_pair
def test_estimates_are_weighted_sums_of_the_noise(family, geometry):
    layer, pm = GEOMETRIES[geometry].population(FAMILIES[family])
    weights = torch.randn(D, dtype=torch.float64)
    pm.set_grad(weights)
    for name, parameter in layer.named_parameters():
        noise = layer.parameter_noise(name, 0, D)
        assert noise.std() > 0.3
        expected = SIGMA * torch.tensordot(weights, noise, 1)
        same(parameter.grad, expected)
        pm.set_grad(weights, accumulate=True)
        same(parameter.grad, 2 * expected)
        pm.set_grad(weights)


@each_family
def test_members_hold_the_noise(family):
    layer, pm = GEOMETRIES["groups"].population(FAMILIES[family])
    for name in ("weight", "bias"):
        noise = SIGMA * layer.parameter_noise(name, 0, D)
        for d in range(D):
            for sign in (1, -1):
                change = getattr(pm.member(d, sign), name) - getattr(layer, name)
                same(change, sign * noise[d])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
@each_family
@torch.no_grad()
def test_frozen_parameters_are_not_perturbed(family, frozen, way):
    for geometry in ("groups", "pointwise", "pixel", "transposed"):
        kind = GEOMETRIES[geometry]
        layer, pm = kind.population(FAMILIES[family])
        getattr(layer, frozen).requires_grad_(False)
        pm.set_noise()
        members = members_of(pm)
        assert torch.equal(getattr(members[0, 1], frozen), getattr(layer, frozen))
        x, short = kind.inputs(2 * D), pm.replicate(kind.inputs(2))
        assert_rows_are_members(members, x, pm(x), True)
        assert_rows_are_members(members, short.full(), pm(short), True)


@each_family
@torch.no_grad()
def test_partners_cancel(family):
    kind = GEOMETRIES["strided"]
    layer, pm = kind.population(FAMILIES[family])
    x = kind.inputs(D)
    plus, minus = pm(torch.cat([x, x])).chunk(2)
    assert (plus - minus).abs().max() > 0.1
    same((plus + minus) / 2, layer(x))


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "rows_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 3)[::2, ..., ::3],
    "expanded": lambda x: x[:1, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", ["3x3", "groups", "pointwise", "whole"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("weights_too", [False, True])
@torch.no_grad()
def test_layouts_do_not_matter(layout, geometry, way, weights_too):
    kind = GEOMETRIES[geometry]
    for family in ("dense-normal", "low-rank-1", "permuted-both", "sign-flip-in"):
        layer, pm = kind.population(FAMILIES[family])
        x = LAYOUTS[layout](kind.inputs(4 * D))
        before, expected = x.clone(), pm(x.contiguous())
        if weights_too:
            layer.to(memory_format=torch.channels_last)
            assert_rows_are_members(members_of(pm), x, pm(x), True)
            pm.set_grad(torch.ones(D))
        same(pm(x), expected)
        assert_bitwise_equal(x, before)


# ---- shards and statistics of the noise ---------------------------------------------------------


def draw(directions, first=0, generation=0, window=1, groups=1):
    """Place of a convolution in a draw whose first direction has the global index ``first``."""
    state = NoiseState(directions, antithetic=False, sigma=SIGMA, seed=1)
    state.first_direction = first
    state.move(1, generation, SIGMA)
    words = stream_word(4, STREAM_WEIGHT), stream_word(4, STREAM_BIAS)
    return LayerNoise(state, *words, window=window, groups=groups)


@each_family
@pytest.mark.parametrize("way", WAYS, indirect=True)
@torch.no_grad()
def test_a_shard_is_a_slice_of_the_population(family, way):
    noise, kind, parts = FAMILIES[family], GEOMETRIES["groups"], (4, 1, 3)
    if isinstance(noise, Sparse) and noise.sparsity == "auto":
        pytest.skip("the number of columns depends on the number of directions")
    conv = convolution.Convolution((1, 1), (1, 1), (1, 1), groups=2)
    weight = torch.randn(10, 6, 3, 3, dtype=torch.float64)
    bias = torch.randn(10, dtype=torch.float64)
    x = kind.inputs(sum(parts))
    weights = torch.randn(sum(parts), dtype=torch.float64)
    whole = draw(sum(parts), window=9, groups=2)
    expected = noise.convolve(x, weight, bias, whole, conv, 0)
    materialised = noise.materialise_weight(whole, 0, sum(parts), 10, 54, x)
    total = torch.zeros(10, 54, dtype=torch.float64)
    first = 0
    for count in parts:
        site, here = draw(count, first, window=9, groups=2), slice(first, first + count)
        same(noise.convolve(x[here], weight, bias, site, conv, 0), expected[here])
        same(noise.materialise_weight(site, 0, count, 10, 54, x), materialised[here])
        noise.estimate_weight_(total, weights[here], site, True)
        first += count
    same(total, SIGMA * torch.tensordot(weights, materialised, 1))


@each_family
@pytest.mark.parametrize("groups", [1, 2])
def test_every_element_has_mean_0_and_variance_1(family, groups):
    draws, directions, rows, cols = 300, 8, 10, 24
    sums = torch.zeros(2, rows, cols, dtype=torch.float64)
    fourth = 0.0
    like = torch.empty(0, dtype=torch.float64)
    for generation in range(draws):
        site = draw(directions, generation=generation, window=4, groups=groups)
        noise = FAMILIES[family].materialise_weight(site, 0, directions, rows, cols, like)
        sums += torch.stack([noise.sum(0), noise.square().sum(0)])
        fourth += float(noise.pow(4).mean()) / draws
    mean, square = sums / (draws * directions)
    # A draw counts once: its directions may repeat the same numbers.
    assert mean.abs().max() < 5 * draws**-0.5
    assert (square - 1).abs().max() < 5 * (fourth / draws) ** 0.5


@pytest.mark.parametrize("groups", [1, 2])
def test_flipped_kernels_are_kernels_times_signs_of_channels(groups):
    site = draw(6, window=4, groups=groups)
    like = torch.empty(0, dtype=torch.float64)
    noise = SignFlip("both").materialise_weight(site, 0, 6, 10, 24, like)
    relative = (noise / noise[:1]).view(6, groups, 10 // groups, 6, 4)
    same(relative.abs(), torch.ones_like(relative))
    same(relative, relative[..., :1].expand_as(relative))
    outer = relative[:, :, :, 0, 0, None] * relative[:, :, 0, :, 0].unsqueeze(2)
    same(relative[..., 0], outer * relative[:, :, :1, :1, 0])
    if groups == 2:  # the groups' channels have signs of their own
        assert not torch.equal(relative[:, 0], relative[:, 1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", ["in", "out"])
def test_permuted_kernels_are_the_same_kernels_elsewhere(side, groups):
    site = draw(6, window=4, groups=groups)
    like = torch.empty(0, dtype=torch.float64)
    noise = Permuted(side).materialise_weight(site, 0, 6, 10, 24, like)
    noise = noise.view(6, groups, 10 // groups, 6, 4)
    axis = 3 if side == "in" else 2
    for d in range(1, 6):
        order = [
            int((noise[d].select(axis - 1, i)[:, None] == noise[0].movedim(axis - 1, 1))
                .flatten(2).all(2).all(0).nonzero())
            for i in range(noise.shape[axis])
        ]  # fmt: skip
        assert sorted(order) == list(range(noise.shape[axis]))


# ---- what is refused ----------------------------------------------------------------------------


def test_depthwise_convolutions_have_nothing_to_permute():
    for make in (PerturbedConv2d, PermutedConv2d):
        options = {"noise": Permuted()} if make is PerturbedConv2d else {}
        with pytest.raises(
            ValueError, match=r"longer than 1, got a \(1, 1\) weight in every group"
        ):
            make(6, 6, 3, D, groups=6, **options)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(6, 5, 6), ValueError, r"\(B, 6, height, width\) .*got \(6, 5, 6\); for one in"),
        (torch.ones(6, 4, 5, 6), ValueError, r"input must be \(B, 6, height.*got \(6, 4, 5, 6\)"),
        (torch.ones(6, 6), ValueError, r"input must be \(B, 6, height, width\)"),
        (torch.ones(6, 6, 1, 5, 6), ValueError, r"input must be \(B, 6, height, width\)"),
        (torch.ones(6, 6, 2, 6), ValueError, r"as large as the dilated kernel, .*\(2, 6\) with p"),
        (torch.ones(7, 6, 5, 6), ValueError, r"R \* D rows, D = 3 .* got 7"),
        (torch.ones(9, 6, 5, 6), ValueError, "even number of repeats"),
        (torch.ones(6, 6, 5, 6, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        (torch.ones(6, 6, 5, 6, dtype=torch.float32), RuntimeError, "type"),
    ],
    ids=["unbatched", "channels", "2d", "5d", "small", "rows", "odd", "int", "dtype"],
)
def test_inputs_that_do_not_fit_are_refused(x, error, words):
    _, pm = GEOMETRIES["3x3"].population(Dense())
    x = x.double() if error is ValueError else x
    with pytest.raises(error, match=words):
        pm(x)
    assert not pm.state.active


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PerturbedConv2d(6, 5, 3, 0), ValueError, "directions must be .* got 0"),
        (lambda: PerturbedConv2d(6, 5, 3, D, groups=4), ValueError, "divisible by groups"),
        (
            lambda: PerturbedConv2d(6, 5, 3, D, noise="dense"),
            TypeError,
            "noise must be a noise fam",
        ),
        (
            lambda: LowRankConv2d(6, 5, 3, D, rank=6),
            ValueError,
            r"= 5 of a \(5, 54\) weight, got 6",
        ),
        (lambda: PermutedConv2d(6, 5, 3, D, in_sparsity=7), ValueError, "= 6, got 7"),
        (lambda: PermutedConv2d(6, 4, 3, D, groups=2, out_sparsity=3), ValueError, "= 2, got 3"),
        (lambda: SignFlipConv2d(6, 5, 3, D, flip="up"), ValueError, "flip must be one of"),
        (lambda: SignFlipConv2d(6, 5, 3, D, bases=0), ValueError, "bases must be at least 1"),
    ],
)
def test_bad_options_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("layer", "noise"),
    [
        (LowRankConv2d(6, 5, 3, D, rank=2, distribution="rademacher"), LowRank(2, "rademacher")),
        (PermutedConv2d(6, 5, 3, D, permutation="out"), Permuted("out")),
        (PermutedConv2d(6, 5, 3, D, in_sparsity=0.5), Permuted(in_sparsity=0.5)),
        (SignFlipConv2d(6, 5, 3, D, flip="in", bases=2), SignFlip("in", bases=2)),
        (PerturbedConv2d(6, 5, 3, D), Dense()),
    ],
)
@torch.no_grad()
def test_named_layers_have_their_family(layer, noise):
    assert layer.noise == noise
    pm = PerturbedModel(layer.double(), D, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(2 * D, 6, 5, 5, dtype=torch.float64)
    assert_rows_are_members(members_of(pm), x, pm(x), True)


@each_geometry
@pytest.mark.parametrize("family", ["dense-normal", "low-rank-1", "sign-flip-both"])
def test_empty_batches(family, geometry):
    kind = GEOMETRIES[geometry]
    layer, pm = kind.population(FAMILIES[family])
    x = kind.inputs(0).requires_grad_()
    y = pm(x)
    assert y.shape == layer(x).shape
    y.sum().backward()
    assert pm(pm.replicate(kind.inputs(0))).shape == y.shape


def test_definition_written_out():
    """One row by nested sums, in no way that torch's convolutions share."""
    kind = GEOMETRIES["groups"]
    layer, pm = kind.population(Dense())
    x = kind.inputs(2 * D)
    y = pm(x)
    b, d, s = 4, 1, -1
    kernels = layer.weight + s * SIGMA * layer.parameter_noise("weight", 0, D)[d]
    offset = layer.bias + s * SIGMA * layer.parameter_noise("bias", 0, D)[d]
    padded = F.pad(x[b], (1, 1, 1, 1))
    for o in (0, 4, 5, 9):
        seen = padded[6 * (o // 5) : 6 * (o // 5) + 6]
        for i, j in ((0, 0), (3, 4), (2, 1)):
            same(y[b, o, i, j], (kernels[o] * seen[:, i : i + 3, j : j + 3]).sum() + offset[o])
