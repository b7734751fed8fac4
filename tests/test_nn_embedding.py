"""PerturbedEmbedding: every row looks up in a table of its own, whatever the noise family."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, REPEATS, SIGMA, D, signs
from torch import nn
from zoo import same

import perturbed
from perturbed import (
    Dense,
    LowRank,
    Permuted,
    PerturbedEmbedding,
    PerturbedLinear,
    PerturbedModel,
    SignFlip,
    convert,
    revert,
)
from perturbed.noise import base
from perturbed.testing import DTYPES, assert_bitwise_equal, assert_close_to_reference

SIZE, WIDTH = 11, 6

each_family = pytest.mark.parametrize("noise", FAMILIES.values(), ids=FAMILIES)
some_families = pytest.mark.parametrize(
    "noise",
    [Dense(), Dense(storage="stored"), LowRank(2), SignFlip("both", bases=2), Permuted()],
    ids=repr,
)


def population(noise=None, antithetic=None, padding=None, dtype=torch.float64, directions=D):
    layer = PerturbedEmbedding(SIZE, WIDTH, directions, padding, noise, dtype=dtype)
    pm = PerturbedModel(layer, directions, antithetic=antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return layer, pm


def indices(repeats, *shape, directions=D):
    return torch.randint(SIZE, (repeats * directions, *shape))


# ---- one noise ---------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize(("repeats", "antithetic", "negated"), REPEATS[:5])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["rows", "T1xT2"])
@torch.no_grad()
def test_rows_look_up_in_their_own_tables(noise, repeats, antithetic, negated, shape):
    layer, pm = population(noise, antithetic)
    x = indices(repeats, *shape)
    y = pm(x)
    assert y.shape == (*x.shape, WIDTH)
    tables = layer.weight + SIGMA * signs(2 * D, D, True).view(2, D, 1, 1) * (
        layer.parameter_noise("weight", 0, D)
    )
    s = signs(len(x), D, negated)
    for b in range(len(x)):
        same(tables[int(s[b] < 0), b % D][x[b]], y[b])


@each_family
def test_members_and_estimates_hold_the_same_noise(noise):
    layer, pm = population(noise)
    weights = torch.randn(D).double()
    pm.set_grad(weights)
    e = layer.parameter_noise("weight", 0, D)
    same(layer.weight.grad, SIGMA * torch.tensordot(weights, e, 1))
    x = torch.arange(SIZE)
    for d in range(D):
        same(pm.member(d, -1)(x), layer.weight - SIGMA * e[d])


@each_family
@pytest.mark.parametrize("antithetic", [None, False])
@torch.no_grad()
def test_replicated_rows_are_looked_up_once(noise, antithetic, monkeypatch):
    _, pm = population(noise, antithetic)
    short = pm.replicate(torch.randint(SIZE, (4, 5)))
    expected = pm(short.full())
    seen = []
    function = F.embedding
    monkeypatch.setattr(F, "embedding", lambda x, *a, **k: seen.append(len(x)) or function(x, *a))
    same(pm(short), expected)
    assert seen == [4]


@each_family
@torch.no_grad()
def test_shards_of_the_population_draw_what_the_whole_draws(noise):
    _, whole = population(noise, directions=6)
    x = indices(2, 5, directions=6)
    y = whole(x).view(2, 6, 5, WIDTH)
    layer = PerturbedEmbedding(SIZE, WIDTH, 2, noise=noise, dtype=torch.float64)
    layer.weight.copy_(whole.model.weight)
    pm = PerturbedModel(layer, 2, sigma=SIGMA, seed=5)
    pm.state.first_direction = 3
    pm.set_noise()
    if "auto" not in repr(noise):  # whose number of columns depends on D
        same(pm(x.view(2, 6, 5)[:, 3:5].flatten(0, 1)), y[:, 3:5].flatten(0, 1))


@some_families
@torch.no_grad()
def test_chunks_of_directions_change_nothing(noise, monkeypatch):
    _, pm = population(noise, directions=7)
    x = indices(2, 5, directions=7)
    expected = pm(x)
    monkeypatch.setitem(base.SCRATCH_BYTES, "cpu", 1)
    assert_bitwise_equal(pm(x), expected)


@each_family
@torch.no_grad()
def test_every_dtype_is_as_accurate_as_plain_torch(noise):
    for dtype in DTYPES:
        layer, pm = population(noise, dtype=dtype)
        x = indices(2, 5)
        y = pm(x)
        e = layer.parameter_noise("weight", 0, D)
        s = signs(len(x), D, True)
        d = torch.arange(len(x))[:, None] % D
        plain = layer.weight[x] + (SIGMA * s)[:, None, None].to(dtype) * e[d, x]
        exact = layer.weight.double()[x] + (SIGMA * s)[:, None, None] * e.double()[d, x]
        if dtype == torch.float64:
            same(y, exact)
        else:
            assert_close_to_reference(y, plain, exact)


def test_gradients_reach_the_table():
    layer, pm = population()
    x = indices(2, 5)
    weights = torch.randn(len(x), 5, WIDTH).double()
    (pm(x) * weights).sum().backward()
    same(layer.weight.grad, torch.autograd.grad((layer(x) * weights).sum(), layer.weight)[0])
    with torch.no_grad():
        expected = pm(x)
    same(pm(x), expected)


# ---- rows without noise ------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("padding", [2, -1])
@torch.no_grad()
def test_padding_has_no_noise_anywhere(noise, padding):
    layer, pm = population(noise, padding=padding)
    row = padding % SIZE
    x = indices(2, 40)
    y = pm(x)
    assert (x == row).any()
    same(y[x == row], layer.weight[row].expand_as(y[x == row]))
    e = layer.parameter_noise("weight", 0, D)
    assert not e[:, row].any()
    assert e.any(1).any(1).all()
    same(pm.member(1, -1).weight, layer.weight - SIGMA * e[1])
    pm.set_grad(torch.ones(D).double())
    same(layer.weight.grad, SIGMA * e.sum(0))
    layer.weight.grad.fill_(2.0)
    pm.set_grad(torch.ones(D).double(), accumulate=True)
    same(layer.weight.grad, 2 + SIGMA * e.sum(0))
    assert_bitwise_equal(pm(x), y)  # what the family holds is untouched


class Tied(nn.Module):
    """A language model whose embedding is its output layer, with position numbers of one row."""

    def __init__(self, padding=None, output_first=False):
        super().__init__()
        if output_first:
            self.head = nn.Linear(WIDTH, SIZE)
        self.embed = nn.Embedding(SIZE, WIDTH, padding)
        self.positions = nn.Embedding(5, WIDTH)
        if not output_first:
            self.head = nn.Linear(WIDTH, SIZE)
        self.head.weight = self.embed.weight

    def forward(self, x):
        position = torch.arange(x.shape[1])[None]
        return self.head(torch.tanh(self.embed(x) + self.positions(position)))


@some_families
@pytest.mark.parametrize("output_first", [False, True], ids=["embedding", "output"])
@pytest.mark.parametrize("padding", [None, 2])
@torch.no_grad()
def test_a_tied_output_layer_sees_the_same_noise(noise, output_first, padding):
    net = convert(Tied(padding, output_first).double(), D, noise)
    assert type(net.embed) is PerturbedEmbedding
    assert type(net.head) is PerturbedLinear
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    x = indices(2, 5)
    y = pm(x)
    members = [pm.member(b % D, 1 if b < D else -1) for b in range(len(x))]
    for b, member in enumerate(members):
        assert member.head.weight is member.embed.weight
        same(member(x[b : b + 1])[0], y[b])
    weights = torch.randn(D).double()
    pm.set_grad(weights)
    e = torch.stack([pm.member(d).embed.weight - net.embed.weight for d in range(D)])
    same(net.embed.weight.grad, torch.tensordot(weights, e, 1))
    assert e[:, 2].any()  # the output layer trains that row


@torch.no_grad()
def test_tables_that_share_their_padding_leave_it_alone():
    net = nn.ModuleList([nn.Embedding(SIZE, WIDTH, 2), nn.Embedding(SIZE, WIDTH, 2)])
    net[1].weight = net[0].weight
    pm = PerturbedModel(convert(net, D), D)
    pm.set_noise()
    assert not (pm.member(0)[1].weight - net[1].weight)[2].any()
    net[1].padding_idx = 3
    pm.set_noise()
    moved = (pm.member(0)[1].weight - net[1].weight).any(1)
    assert moved[2]
    assert moved[3]


# ---- one row for all ---------------------------------------------------------------------------


@some_families
@pytest.mark.parametrize("antithetic", [None, False])
@torch.no_grad()
def test_one_row_of_indices_stands_for_all(noise, antithetic):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = PerturbedEmbedding(SIZE, WIDTH, D, noise=noise, dtype=torch.float64)

        def forward(self, x, positions):
            return x + self.embed(positions)

    pm = PerturbedModel(Positions(), D, antithetic, sigma=SIGMA)
    pm.set_noise()
    x, positions = torch.randn(4 * D, 5, WIDTH).double(), torch.randint(SIZE, (1, 5))
    same(pm(x, positions), pm(x, positions.expand(len(x), -1)))
    assert pm(x[:0], positions).shape == (0, 5, WIDTH)


# ---- as a torch layer --------------------------------------------------------------------------


def test_conversion_keeps_the_table_and_leaves_other_gradients_alone():
    net = nn.Sequential(nn.Embedding(SIZE, WIDTH, padding_idx=3))
    x = torch.arange(SIZE)
    weight, expected = net[0].weight, net(x)
    convert(net, D, LowRank(2))
    assert (type(net[0]), net[0].noise) == (PerturbedEmbedding, LowRank(2))
    assert net[0].weight is weight
    assert_bitwise_equal(net(x), expected)
    assert "padding_idx=3" in repr(net[0])
    assert type(revert(net)[0]) is nn.Embedding


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=repr
)
def test_options_without_a_meaning_for_populations_are_reported(options):
    net = nn.Sequential(nn.Embedding(SIZE, WIDTH, **options), nn.Linear(WIDTH, 3))
    with pytest.warns(UserWarning, match="0 \\(Embedding\\)"):
        convert(net, D)
    assert type(net[0]) is nn.Embedding
    assert next(iter(options)) in str(perturbed.conversion_report(net))


@torch.no_grad()
def test_frozen_tables_have_no_noise():
    layer = PerturbedEmbedding(SIZE, WIDTH, D)
    layer.weight.requires_grad_(False)
    net = nn.Sequential(layer, PerturbedLinear(WIDTH, 3, D))
    pm = PerturbedModel(net, D)
    pm.set_noise()
    x = indices(2, 5)
    with pm.perturbed():
        assert_bitwise_equal(layer(x), F.embedding(x, layer.weight))
        short = pm.replicate(x[:4])
        assert_bitwise_equal(layer(short), F.embedding(short.full(), layer.weight))


@torch.no_grad()
def test_every_kind_of_batch():
    _, pm = population()
    assert pm(indices(0, 5)).shape == (0, 5, WIDTH)
    assert pm(indices(2, 0)).shape == (2 * D, 0, WIDTH)
    x = indices(2, 5)
    assert_bitwise_equal(pm(x.int()), pm(x))
    strided = torch.stack([x, x], -1)[..., 0]
    assert_bitwise_equal(pm(strided), pm(x))
    again = pickle.loads(pickle.dumps(pm))
    assert_bitwise_equal(again(x), pm(x))


@some_families
@torch.no_grad()
def test_compiled_forwards_follow_the_draw(noise):
    _, pm = population(noise, padding=2)
    torch._dynamo.reset()
    compiled = torch.compile(pm.model, backend="eager", fullgraph=True)
    x = indices(2, 5)
    for _ in range(2):
        pm.allocate_memory()
        with pm.perturbed():
            same(compiled(x), pm(x))
        pm.set_noise()


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(6, 2), TypeError, "input must be int64 or int32 indices, got torch.float32"),
        (torch.tensor(1), ValueError, "got a single index"),
        (torch.zeros(7, 2).long(), ValueError, "R \\* D rows, D = 3 .* got 7 rows"),
        (torch.zeros(6, 2).long() + SIZE, IndexError, "out of range"),
    ],
)
def test_wrong_indices_are_named(x, error, words):
    _, pm = population()
    with pytest.raises(error, match=words):
        pm(x)


def test_families_check_the_size_of_the_table():
    with pytest.raises(ValueError, match=r"rank must be at most min\(in, out\) = 6"):
        PerturbedEmbedding(SIZE, WIDTH, D, noise=LowRank(7))
