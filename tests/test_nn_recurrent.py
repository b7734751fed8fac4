"""Perturbed recurrent layers and cells: every row is its member, step by step."""

import copy
import functools
import pickle

import pytest
import torch
from families import FAMILIES, SIGMA, D
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from zoo import same

import perturbed
from perturbed import (
    Dense,
    LowRank,
    PerturbedGRU,
    PerturbedGRUCell,
    PerturbedLSTM,
    PerturbedLSTMCell,
    PerturbedModel,
    PerturbedRNN,
    PerturbedRNNCell,
)
from perturbed.testing import assert_bitwise_equal

IN, H, T = 6, 5, 4
FEW = {"dense": Dense(), "low_rank": LowRank(2, "rademacher"), "stored": Dense(storage="stored")}
LAYERS = {
    "rnn": (PerturbedRNN, {}),
    "relu": (PerturbedRNN, {"nonlinearity": "relu"}),
    "gru": (PerturbedGRU, {}),
    "lstm": (PerturbedLSTM, {}),
    "projected": (PerturbedLSTM, {"proj_size": 3}),
}
CELLS = {
    "rnn": (PerturbedRNNCell, {}),
    "relu": (PerturbedRNNCell, {"nonlinearity": "relu"}),
    "gru": (PerturbedGRUCell, {}),
    "lstm": (PerturbedLSTMCell, {}),
}
each_family = pytest.mark.parametrize("noise", FAMILIES.values(), ids=FAMILIES)
few_families = pytest.mark.parametrize("noise", FEW.values(), ids=FEW)
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_cell = pytest.mark.parametrize("kind", CELLS)


def population(kind="lstm", noise=None, antithetic=None, **options):
    """A layer of a kind, float64 with steps after rows, and its model with noise drawn."""
    cls, own = LAYERS[kind]
    options = {"batch_first": True, "dtype": torch.float64, **own, **options}
    return drawn(cls(IN, H, D, noise=noise, **options), antithetic)


def cell_population(kind="lstm", noise=None, antithetic=None, **options):
    """The same of a cell."""
    cls, own = CELLS[kind]
    options = {"dtype": torch.float64, **own, **options}
    return drawn(cls(IN, H, D, noise=noise, **options), antithetic)


def drawn(layer, antithetic):
    pm = PerturbedModel(layer, D, antithetic=antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return layer, pm


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def first_state(layer, rows):
    """A random state as the layer takes it."""
    if isinstance(layer, nn.RNNCellBase):
        states = [randn(rows, H) for _ in range(2 if "LSTM" in type(layer).__name__ else 1)]
    else:
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        states = [randn(count, rows, layer.proj_size or H)]
        states += [randn(count, rows, H)] if layer.mode == "LSTM" else []
    return tuple(states) if len(states) > 1 else states[0]


def row_of(value, b, dim):
    """Row b of a tensor, or of every tensor in a tuple, with its dimension."""
    return torch.utils._pytree.tree_map(lambda t: t.narrow(dim, b, 1), value)


def check_rows(pm, x, hx=None, negated=True):
    """Every row of output and state equals its member's, called with that row alone."""
    cell = isinstance(pm.model, nn.RNNCellBase)
    arguments = (x,) if hx is None else (x, hx)
    result = pm(*arguments)
    members = functools.cache(pm.member)
    state_dim = 0 if cell else 1
    for b in range(len(x)):
        member = members(b % D, -1 if negated and b >= len(x) // 2 else 1)
        here = [row_of(x, b, 0)] + ([] if hx is None else [row_of(hx, b, state_dim)])
        expected = member(*here)
        if cell:
            compare(row_of(result, b, 0), expected)
        else:
            compare(row_of(result[0], b, 0), expected[0])
            compare(row_of(result[1], b, 1), expected[1])


def compare(actual, expected, tolerance=1e-9):
    leaves = torch.utils._pytree.tree_leaves
    assert type(actual) is type(expected)
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        same(a, e, tolerance)


# ---- rows and estimates ------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
@torch.no_grad()
def test_rows_are_their_members(noise, kind):
    layer, pm = population(kind, noise)
    check_rows(pm, randn(2 * D, T, IN))
    check_rows(pm, randn(2 * D, T, IN), first_state(layer, 2 * D))


@each_family
@each_cell
@torch.no_grad()
def test_rows_of_cells_are_their_members(noise, kind):
    layer, pm = cell_population(kind, noise)
    check_rows(pm, randn(2 * D, IN))
    check_rows(pm, randn(2 * D, IN), first_state(layer, 2 * D))


OPTIONS = {
    "layers": {"num_layers": 3},
    "both_ways": {"bidirectional": True},
    "no_bias": {"bias": False},
    "all": {"num_layers": 2, "bidirectional": True, "bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}


@few_families
@each_layer
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_options_of_the_layer(noise, kind, options):
    layer, pm = population(kind, noise, **options)
    layer.eval()
    check_rows(pm, randn(2 * D, T, IN), first_state(layer, 2 * D))


@each_cell
@torch.no_grad()
def test_cells_without_bias(kind):
    layer, pm = cell_population(kind, bias=False)
    check_rows(pm, randn(2 * D, IN), first_state(layer, 2 * D))


@pytest.mark.parametrize(
    ("repeats", "antithetic"), [(1, None), (2, None), (3, False), (4, True), (2, False)]
)
@torch.no_grad()
def test_repeats_and_signs(repeats, antithetic):
    negated = repeats > 1 and antithetic is not False
    for make, shape in ((population, (T, IN)), (cell_population, (IN,))):
        layer, pm = make(antithetic=antithetic)
        x = randn(repeats * D, *shape)
        check_rows(pm, x, first_state(layer, len(x)), negated)


@few_families
@pytest.mark.parametrize("kind", [*LAYERS, "cell"])
def test_estimates_are_weighted_sums(noise, kind):
    if kind == "cell":
        layer, pm = cell_population(noise=noise)
    else:
        layer, pm = population(kind, noise, num_layers=2, bidirectional=True)
    weights = randn(D)
    pm.set_grad(weights)
    plain = dict(layer.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in plain.items()}
    for d in range(D):
        for name, parameter in pm.member(d).named_parameters():
            total[name] += weights[d] * (parameter - plain[name]).detach()
    for name, parameter in plain.items():
        assert parameter.grad.any()
        same(parameter.grad, total[name])


@few_families
@each_layer
@torch.no_grad()
def test_replicated_rows(noise, kind):
    layer, pm = population(kind, noise, bidirectional=True, num_layers=2)
    short = pm.replicate(randn(3, T, IN))
    compare(pm(short), pm(short.full()), 1e-11)
    layer, pm = cell_population(noise=noise)
    short, hx = pm.replicate(randn(3, IN)), first_state(layer, 3)
    hx = tuple(pm.replicate(h) for h in hx)
    compare(pm(short, hx), pm(short.full(), tuple(h.full() for h in hx)), 1e-11)


class Loop(nn.Module):
    """Steps first inside of a model with rows first; then a cell, step by step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(IN, IN, 2, bidirectional=True)
        self.cell = nn.GRUCell(2 * IN, H)

    def forward(self, x):
        y, _ = self.lstm(x.transpose(0, 1))
        h = None
        for step in y:
            h = self.cell(step, h)
        return h


@few_families
@torch.no_grad()
def test_layers_and_cells_inside_of_models(noise):
    net = perturbed.convert(Loop().double(), D, noise)
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    assert not perturbed.conversion_report(net).unperturbed
    x = randn(2 * D, T, IN)
    y = pm(x)
    for b in range(len(x)):
        same(y[b], pm.member(b % D, 1 if b < D else -1)(x[b : b + 1])[0], 1e-9)


@torch.no_grad()
def test_time_first_arguments_are_no_rows():
    """pm(...) takes the first dimension for the rows; the layer would take the second."""
    _, pm = population(batch_first=False)
    x = randn(T, 2 * D, IN)
    with pytest.raises(ValueError, match="rows must stay the first dimension"):
        pm(x)
    with pm.perturbed():
        y, (h, c) = pm.model(x)
    expected, state = pm.member(1)(x[:, 1:2])
    compare((y[:, 1:2], (h[:, 1:2], c[:, 1:2])), (expected, state))


@torch.no_grad()
def test_one_row_stands_for_all():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(IN, H, batch_first=True)
            self.cell = nn.LSTMCell(H, H)
            self.start = nn.Parameter(randn(1, 1, IN))

        def forward(self, x):
            y, _ = self.gru(self.start, torch.ones(1, 1, H, dtype=x.dtype))
            one = torch.ones(1, H, dtype=x.dtype)
            return x + self.cell(y[:, 0], (one, one))[0]

    pm = PerturbedModel(perturbed.convert(Decoder().double(), D, exclude=is_start), D, sigma=SIGMA)
    pm.set_noise()
    x = randn(2 * D, H)
    y = pm(x)
    for b in range(len(x)):
        same(y[b], pm.member(b % D, 1 if b < D else -1)(x[b : b + 1])[0], 1e-9)


def is_start(name, module):
    return name == ""


# ---- packed sequences --------------------------------------------------------------------------


@few_families
@each_layer
@pytest.mark.parametrize("ordered", [False, True], ids=["any_order", "sorted"])
@torch.no_grad()
def test_packed_sequences(noise, kind, ordered):
    layer, pm = population(kind, noise, num_layers=2, bidirectional=True)
    lengths = torch.tensor([4, 1, 3, 3, 2, 4]) if not ordered else torch.tensor([5, 4, 4, 2, 1, 1])
    x, hx = randn(len(lengths), 5, IN), first_state(layer, len(lengths))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=ordered)
    if ordered:  # nothing in it has B as its first dimension
        with pm.perturbed():
            result, state = layer(packed, hx)
    else:
        result, state = pm(packed, hx)
    plain, _ = layer(packed, hx)
    assert isinstance(result, PackedSequence)
    assert_bitwise_equal(result.batch_sizes, plain.batch_sizes)
    for mine, torchs in zip(result[2:], plain[2:], strict=True):
        assert mine is torchs is None or torch.equal(mine, torchs)
    output, _ = pad_packed_sequence(result, batch_first=True)
    for b, length in enumerate(lengths.tolist()):
        member = pm.member(b % D, 1 if b < D else -1)
        expected, expected_state = member(x[b : b + 1, :length], row_of(hx, b, 1))
        same(output[b, :length], expected[0], 1e-9)
        compare(row_of(state, b, 1), expected_state)


# ---- the layer as a torch layer ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@each_layer
def test_parameters_are_those_of_the_torch_layer(kind, options):
    cls, own = LAYERS[kind]
    torch.manual_seed(3)
    plain = cls.torch_class(IN, H, **own, **options).eval()
    torch.manual_seed(3)
    layer = cls(IN, H, D, **own, **options).eval()
    assert list(layer.state_dict()) == list(plain.state_dict())
    for name, parameter in plain.named_parameters():
        assert_bitwise_equal(layer.get_parameter(name), parameter)
    x = torch.randn(T, 7, IN)
    compare(layer(x), plain(x), 0)
    compare(layer(x[:, 0]), plain(x[:, 0]), 0)
    assert type(perturbed.revert(layer)) is cls.torch_class
    compare(layer(x), plain(x), 0)


@each_cell
def test_parameters_are_those_of_the_torch_cell(kind):
    cls, own = CELLS[kind]
    torch.manual_seed(3)
    plain = cls.torch_class(IN, H, **own)
    torch.manual_seed(3)
    layer = cls(IN, H, D, **own)
    for name, parameter in plain.named_parameters():
        assert_bitwise_equal(layer.get_parameter(name), parameter)
    compare(layer(torch.ones(7, IN)), plain(torch.ones(7, IN)), 0)
    assert type(perturbed.revert(layer)) is cls.torch_class


def test_device_and_dtype_arguments():
    for cls, own in (*LAYERS.values(), *CELLS.values()):
        layer = cls(IN, H, D, device="meta", dtype=torch.bfloat16, **own)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@few_families
def test_frozen_and_tied_parameters(noise):
    layer, pm = population("gru", noise, num_layers=2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    layer.bias_ih_l0.requires_grad_(False)
    layer.weight_ih_l1.requires_grad_(False)
    pm.set_noise()
    member = pm.member(0)
    assert_bitwise_equal(member.weight_hh_l1, member.weight_hh_l0)
    assert member.bias_ih_l0.equal(layer.bias_ih_l0)
    assert member.weight_ih_l1.equal(layer.weight_ih_l1)
    assert not member.bias_ih_l1.equal(layer.bias_ih_l1)
    with torch.no_grad():
        check_rows(pm, randn(2 * D, T, IN))
    pm.set_grad(torch.ones(D, dtype=torch.float64))
    assert layer.bias_ih_l0.grad is None
    assert layer.weight_hh_l0.grad.any()


@few_families
@torch.no_grad()
def test_copies_and_states_continue_with_the_same_noise(noise):
    for make, x in ((population, randn(2 * D, T, IN)), (cell_population, randn(2 * D, IN))):
        _, pm = make(noise=noise)
        y = pm(x)
        compare(copy.deepcopy(pm)(x), y, 0)
        compare(pickle.loads(pickle.dumps(pm))(x), y, 0)
        _, other = make(noise=noise)
        other.set_noise()
        other.load_state_dict(pm.state_dict())
        compare(other(x), y, 0)
        pm.set_noise()
        assert (pm(x)[0] - y[0]).abs().max() > 0.01


# ---- torch's modes -----------------------------------------------------------------------------


@few_families
@each_layer
def test_gradients(noise, kind):
    """Of inputs, states and parameters; those of a row are its member's."""
    layer, pm = population(kind, noise, num_layers=2, bidirectional=True)
    x = randn(2 * D, 3, IN).requires_grad_()
    hx = first_state(layer, 2 * D)
    states = [h.requires_grad_() for h in (hx if isinstance(hx, tuple) else (hx,))]

    def forward(x, *states):
        return pm(x, states if len(states) > 1 else states[0])[0]

    assert torch.autograd.gradcheck(forward, (x, *states), fast_mode=True)
    forward(x, *states)[1].square().sum().backward()
    member = pm.member(1)
    row = x.detach()[1:2].requires_grad_()
    member(row, row_of(hx, 1, 1))[0].square().sum().backward()
    same(x.grad[1], row.grad[0], 1e-9)
    for name, parameter in member.named_parameters():
        same(layer.get_parameter(name).grad, parameter.grad, 1e-9)


@each_cell
def test_gradients_of_cells(kind):
    layer, pm = cell_population(kind)
    x, hx = randn(2 * D, IN).requires_grad_(), first_state(layer, 2 * D)
    assert torch.autograd.gradcheck(lambda x: pm(x, hx), x, fast_mode=True)


def test_dropout_is_that_of_training():
    layer, pm = population(num_layers=2, dropout=0.5)
    x = randn(2 * D, T, IN)
    layer.eval()
    expected = pm(x)[0]
    compare(pm(x)[0], expected, 0)
    layer.train()
    torch.manual_seed(1)
    y = pm(x)[0]
    assert (y - expected).abs().max() > 0.01
    torch.manual_seed(1)
    assert_bitwise_equal(pm(x)[0], y)


@each_layer
@torch.no_grad()
def test_autocast_and_half_precision(kind):
    layer, pm = population(kind, num_layers=2)
    x = randn(2 * D, T, IN)
    exact = pm(x)[0]
    layer.float()
    pm.free_memory()
    bound = 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    zeros = torch.utils._pytree.tree_map(lambda t: 0 * t.float(), first_state(layer, 2 * D))
    for state in (None, zeros):
        with torch.autocast("cpu", torch.bfloat16):
            y = pm(x.float(), state)[0]
        assert y.dtype == torch.bfloat16
        assert (y.double() - exact).abs().max() < bound
    layer.bfloat16()
    pm.free_memory()
    y = pm(x.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < bound


def test_torchs_random_state_is_left_alone():
    _, pm = population()
    x = randn(2 * D, T, IN)
    before = torch.get_rng_state()
    pm.set_noise()
    pm(x)
    assert torch.get_rng_state().equal(before)


@torch.no_grad()
@torch._dynamo.config.patch(allow_rnn=True)  # torch's switch for torch's own layers
def test_compiled_layers_compute_the_same():
    for (_, pm), shape in (
        (population("gru", LowRank(1), bidirectional=True), (T, IN)),
        (cell_population(noise=LowRank(1)), (IN,)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(pm, backend="eager", fullgraph=True)
        for repeats in (2, 4):  # sizes become symbols
            x = randn(repeats * D, *shape)
            compare(compiled(x), pm(x), 1e-11)


# ---- bad input ---------------------------------------------------------------------------------

X, HX = torch.ones(2 * D, T, IN).double(), torch.ones(1, 2 * D, H).double()
BAD = {
    "unbatched": ((X[0],), ValueError, r"input must be \(B, T, 6\).*got \(4, 6\).*unsqueeze\(0\)"),
    "features": ((X[..., :3],), ValueError, r"input must be \(B, T, 6\).*got \(6, 4, 3\)"),
    "integers": ((X.long(),), TypeError, "floating point, got torch.int64"),
    "directions": ((X[:5],), ValueError, r"R \* D rows, D = 3 .* got 5"),
    "one_state": ((X, HX), TypeError, r"hx must be a pair of tensors \(h_0, c_0\)"),
    "state_rows": ((X, (HX[:, :3], HX)), ValueError, r"hx .* \(1, 6, 5\), got \(1, 3, 5\)"),
    "state_dtype": ((X, (HX, HX.float())), ValueError, "input's dtype torch.float64, got torch.fl"),
    "no_tensor": ((X, (HX, 0)), TypeError, "hx must be a pair of tensors"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_inputs_are_refused(bad):
    arguments, error, words = BAD[bad]
    _, pm = population()
    with pytest.raises(error, match=words):
        pm(*arguments)
    assert not pm.state.active


BAD_CELL = {
    "unbatched": ((X[0, 0],), ValueError, r"input must be \(B, 6\).*got \(6,\).*unsqueeze\(0\)"),
    "features": ((X[:, 0, :3],), ValueError, r"input must be \(B, 6\).*got \(6, 3\)"),
    "integers": ((X[:, 0].long(),), TypeError, "floating point, got torch.int64"),
    "pair": ((X[:, 0], (HX[0], HX[0])), TypeError, "hx must be a tensor or None, got tuple"),
    "state": ((X[:, 0], HX), ValueError, r"hx must have shape \(6, 5\), got \(1, 6, 5\)"),
}


@pytest.mark.parametrize("bad", BAD_CELL)
def test_bad_inputs_of_cells_are_refused(bad):
    arguments, error, words = BAD_CELL[bad]
    _, pm = cell_population("gru")
    with pytest.raises(error, match=words):
        pm(*arguments)


def test_bad_options_are_refused():
    for cls in (PerturbedRNN, PerturbedGRU, PerturbedLSTM, PerturbedLSTMCell):
        with pytest.raises(ValueError, match=r"rank must be at most .* = 5 .* got 6"):
            cls(IN, H, D, noise=LowRank(6))
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sin'"):
        PerturbedRNNCell(IN, H, D, nonlinearity="sin")


@torch.no_grad()
def test_empty_batches():
    for kind in LAYERS:
        layer, pm = population(kind, bidirectional=True)
        y, _ = pm(randn(0, T, IN))
        assert y.shape == (0, T, 2 * (layer.proj_size or H))
        y, _ = pm(randn(2 * D, 0, IN))
        assert y.shape == (2 * D, 0, 2 * (layer.proj_size or H))
