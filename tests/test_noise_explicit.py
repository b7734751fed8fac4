"""Explicit members: what each row of the batch sees are tensors that the caller holds."""

from collections.abc import Callable

import pytest
import torch
from geometries import GEOMETRIES
from swarms import check_rows, each_kind, particles, population, randn, swarm
from torch import nn
from torch.utils._pytree import tree_flatten
from zoo import KINDS, D, Kind, inputs, same

import perturbed
from perturbed import Explicit, PerturbedModel
from perturbed import nn as pnn
from perturbed.nn.library import PerturbedTransposedLinear
from perturbed.nn.twins import TWINS
from perturbed.testing import assert_bitwise_equal

# ---- members are the networks that their rows see ----------------------------------------------


@each_kind
@pytest.mark.filterwarnings("ignore:convert left")
@pytest.mark.parametrize(("repeats", "flat", "grad"), [(1, True, False), (5, False, True)])
def test_a_member_is_the_network_that_its_rows_see(kind: Kind, repeats, flat, grad):
    net = perturbed.convert(kind.make().double().eval(), D, Explicit())
    pm = swarm(net, flat=flat)
    args, kwargs = kind.arguments(repeats * D)
    with torch.set_grad_enabled(grad):
        check_rows(pm, repeats * D, args, kwargs, call=lambda model, *a: kind.call(model, *a))


# Name -> (torch layer, what it is called with for a number of rows).
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple]]] = {
    "layer_norm": (lambda: nn.LayerNorm((5, 6)), lambda n: (randn(n, 2, 5, 6),)),
    "rms_norm": (lambda: nn.RMSNorm(6), lambda n: (randn(n, 6),)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), lambda n: (randn(n, 6, 3),)),
    "batch_norm": (lambda: nn.BatchNorm2d(6).eval(), lambda n: (randn(n, 6, 2, 3),)),
    "affine": (lambda: pnn.Affine((6, 1, 1)), lambda n: (randn(n, 6, 2, 3),)),
    "embedding": (
        lambda: nn.Embedding(7, 6, padding_idx=2),
        lambda n: (torch.randint(7, (n, 5)),),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda n: (randn(n, 5, 6), randn(n, 4, 6), randn(n, 4, 6)),
    ),
    "attention_sizes": (
        lambda: nn.MultiheadAttention(
            6, 2, kdim=3, vdim=4, add_bias_kv=True, add_zero_attn=True, batch_first=True
        ),
        lambda n: (randn(n, 5, 6), randn(n, 4, 3), randn(n, 4, 4)),
    ),
    "rnn": (lambda: nn.RNN(6, 5, 2, batch_first=True), lambda n: (randn(n, 4, 6),)),
    "gru": (
        lambda: nn.GRU(6, 5, bidirectional=True, bias=False, batch_first=True),
        lambda n: (randn(n, 4, 6),),
    ),
    "lstm": (lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True), lambda n: (randn(n, 4, 6),)),
    "rnn_cell": (lambda: nn.RNNCell(6, 5), lambda n: (randn(n, 6), randn(n, 5))),
    "gru_cell": (lambda: nn.GRUCell(6, 5), lambda n: (randn(n, 6), randn(n, 5))),
    "lstm_cell": (lambda: nn.LSTMCell(6, 5), lambda n: (randn(n, 6), (randn(n, 5), randn(n, 5)))),
    "empty_linear": (lambda: nn.Linear(0, 5), lambda n: (randn(n, 3, 0),)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("repeats", "flat"), [(1, True), (4, False)])
def test_every_kind_of_layer(name, repeats, flat):
    make, arguments = LAYERS[name]
    net = perturbed.convert(nn.ModuleList([make().double()]), 3, Explicit())
    pm = swarm(net, 3, flat)

    def call(model, *args):
        layer = (model.model if model is pm else model)[0]
        out = layer(*args)
        # Rows first: states of recurrent layers are (layers, B, H).
        return out[0] if isinstance(layer, nn.RNNBase) else out

    with pm.perturbed():
        check_rows(pm, 3 * repeats, *arguments(3 * repeats), call=call)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_states_of_recurrent_layers(layer):
    net = perturbed.convert(layer(6, 5, 2, batch_first=True).double(), 3, Explicit())
    pm, x = swarm(net, 3), randn(6, 4, 6)
    states = tree_flatten(pm(x)[1])[0]
    for b in range(6):
        for state, own in zip(
            states, tree_flatten(pm.member(b % 3)(x[b : b + 1])[1])[0], strict=True
        ):
            same(state[:, b], own[:, 0])


def test_batch_statistics_are_a_members_own():
    pm = swarm(perturbed.convert(nn.BatchNorm1d(6).double(), 3, Explicit()), 3)
    x = randn(12, 6)
    y = pm.train()(x)
    for d in range(3):
        same(y[d::3], pm.member(d)(x[d::3]))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(
    ("repeats", "flat", "grad"), [(1, False, False), (3, True, False), (13, True, True)]
)
def test_convolutions(geometry, repeats, flat, grad):
    layer = geometry.make(Explicit())
    pm, x = swarm(layer, 3, flat), geometry.inputs(3 * repeats)
    with torch.set_grad_enabled(grad):
        check_rows(pm, 3 * repeats, x)
        shared = geometry.inputs(repeats)
        y = pm(pm.replicate(shared))
        assert y.shape[0] == 3 * repeats
        same(y, pm(pm.replicate(shared).full()))


def test_convolutions_in_chunks(monkeypatch):
    """Members apart in memory are copied a few at a time."""
    layer = GEOMETRIES["groups"].make(Explicit())
    pm, x = swarm(layer, 3, flat=True), GEOMETRIES["groups"].inputs(9)
    whole, shared = pm(x), pm(pm.replicate(x))
    monkeypatch.setitem(perturbed.noise.base.SCRATCH_BYTES, "cpu", 2 * layer.weight.nbytes)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            same(pm(x), whole)
            same(pm(pm.replicate(x)), shared)


class Transposed(nn.Module):
    """What transformers calls Conv1D: a Linear layer whose weight is (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x @ self.weight + self.bias


class ScaledRMSNorm(nn.Module):
    """A norm of a library, found by its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_layers_of_libraries(monkeypatch, flat):
    monkeypatch.setitem(TWINS, Transposed, PerturbedTransposedLinear)
    net = nn.Sequential(Transposed(), ScaledRMSNorm()).double()
    pm = swarm(perturbed.convert(net, 3, Explicit()), 3, flat)
    check_rows(pm, 9, randn(9, 2, 6))
    members, weights = pm.members(), randn(3)
    assert_bitwise_equal(pm.member(1)[0].weight, members["0.weight"][1])
    pm.set_grad(weights)
    same(net[0].weight.grad, torch.einsum("d,dij->ij", weights, members["0.weight"]))


def test_padding_and_shared_positions_of_an_embedding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 6, padding_idx=2)
            self.places = nn.Embedding(4, 6)

        def forward(self, ids):
            return self.words(ids) + self.places(torch.arange(4)[None])

    net = perturbed.convert(Net().double(), 3, Explicit())
    pm, ids = swarm(net, 3), torch.randint(7, (6, 4))
    ids[:, 1] = 2
    check_rows(pm, 6, ids)
    members = pm.members()
    same(pm(ids)[4, 1], members["words.weight"][1, 2] + members["places.weight"][1, 1])
    same(pm(pm.replicate(ids)), pm(pm.replicate(ids).full()))
    weights = randn(3)
    pm.set_grad(weights)
    same(net.words.weight.grad, torch.einsum("d,dij->ij", weights, members["words.weight"]))
    with pytest.raises(IndexError):
        pm(ids - 7)


# ---- what takes no part ------------------------------------------------------------------------


@each_kind
@pytest.mark.filterwarnings("ignore:convert left")
def test_the_weights_sigma_and_seed_of_the_model_take_no_part(kind):
    net = perturbed.convert(kind.make().double().eval(), D, Explicit())
    pm = swarm(net)
    args, kwargs = kind.arguments(2 * D)
    before = tree_flatten(kind.call(pm, args, kwargs))[0]
    with torch.no_grad():
        for name in pm.members():
            net.get_parameter(name).fill_(float("nan"))
    pm.set_seed(3)
    pm.set_noise_scale(9.0)
    for old, new in zip(before, tree_flatten(kind.call(pm, args, kwargs))[0], strict=True):
        assert_bitwise_equal(new, old)


class Frozen(nn.Module):
    """Members have a first layer, so that rows differ where the body's parameters do not."""

    def __init__(self, body):
        super().__init__()
        self.first, self.body = nn.Linear(6, 6), body

    def forward(self, x):
        return self.body(self.first(x))


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 6),
        lambda: nn.Conv1d(6, 6, 3, padding=1),
        lambda: nn.Conv1d(6, 6, 3, padding=1, groups=2),
        lambda: nn.ConvTranspose1d(6, 6, 3, padding=1),
        lambda: nn.GroupNorm(2, 6),
    ],
    ids=["linear", "conv", "grouped_conv", "conv_transposed", "norm"],
)
def test_frozen_parameters_serve_all_members(make, frozen):
    net = Frozen(make()).double()
    for name in frozen:
        getattr(net.body, name).requires_grad_(False)
    pm = swarm(perturbed.convert(net, 3, Explicit()), 3)
    own = [f"body.{name}" for name in ("weight", "bias") if name not in frozen]
    assert list(pm.members()) == ["first.weight", "first.bias", *own]
    x = randn(15, 6) if isinstance(net.body, nn.Linear) else randn(15, 6, 6)
    check_rows(pm, 15, x)
    same(pm(pm.replicate(x[:4])), pm(pm.replicate(x[:4]).full()))
    same(pm(x[:0]), x[:0])


def test_a_first_layer_with_a_frozen_weight_sees_shared_rows():
    for layer in (nn.Linear(6, 5), nn.Conv1d(6, 5, 2)):
        layer.weight.requires_grad_(False)
        pm = swarm(perturbed.convert(layer.double(), 3, Explicit()), 3)
        x = randn(4, 6) if isinstance(layer, nn.Linear) else randn(4, 6, 30)
        same(pm(pm.replicate(x)), pm(pm.replicate(x).full()))


def test_a_tied_parameter_is_given_once():
    pm = population("tied")
    assert list(pm.members()) == ["a.weight", "a.bias", "b.bias"]
    member = pm.member(2)
    assert member.a.weight is member.b.weight


# ---- gradients ---------------------------------------------------------------------------------


GRADIENTS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)),
    "convnet": KINDS["convnet"].make,
    "transformer": KINDS["transformer"].make,
    "lstm": lambda: nn.LSTM(6, 4, batch_first=True),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("flat", [False, True])
def test_gradients_reach_the_inputs_and_the_members(name, flat):
    net = perturbed.convert(GRADIENTS[name]().double().eval(), D, Explicit())
    pm = PerturbedModel(net, D)
    # Leaves, or views of the one leaf that an optimizer steps.
    members = particles(pm, flat, grad=True)
    leaf = next(iter(members.values()))._base
    with torch.no_grad():  # as in an optimizer's step
        pm.set_members(members)
    shape = {"mlp": (6,), "convnet": (2, 6, 6)}.get(name, (5, 6))
    x = randn(3 * D, *shape).requires_grad_()

    def loss(y):
        return tree_flatten(y)[0][0].square().sum()

    for _ in range(2):  # held members serve many backwards
        x.grad = None
        loss(pm(x)).backward()
    for d in range(D):
        plain, rows = pm.member(d), x.detach()[d::D].requires_grad_()
        loss(plain(rows)).backward()
        same(x.grad[d::D], rows.grad)
        for key, parameter in plain.named_parameters():
            if flat:
                offset = members[key].storage_offset() + d * leaf.stride(0)
                got = leaf.grad.view(-1)[offset : offset + parameter.numel()]
            else:
                got = members[key].grad[d].flatten()
            same(got, 2 * parameter.grad.flatten())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("flat", [False, True])
def test_leaves_that_are_stepped_in_place_stay_in_the_graph(flat):
    pm, x = population(), inputs(3)
    members = particles(pm, flat, grad=True)
    pm.set_members(members)
    leaves = [next(iter(members.values()))._base] if flat else members.values()
    optimizer = torch.optim.SGD(leaves, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = pm(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]


def test_gradients_reach_the_members_that_a_window_shows():
    pm, x = population(), inputs(2)
    members = particles(pm, grad=True)
    pm.set_members(members)
    for start in (0, 2):
        with torch.no_grad(), pm.window(start, 2), torch.enable_grad():
            pm(x[: 2 * 2]).square().sum().backward()
    each = [t.grad.clone() for t in members.values()]
    assert all(grad.flatten(1).any(1).all() for grad in each)
    for t in members.values():
        t.grad = None
    pm(x[[0, 1, 0, 1, 2, 3, 2, 3]]).square().sum().backward()
    for grad, t in zip(each, members.values(), strict=True):
        same(grad, t.grad)


@each_kind
@pytest.mark.filterwarnings("ignore:convert left")
@pytest.mark.parametrize("flat", [False, True])
def test_set_grad_is_the_weighted_sum_of_the_members(kind, flat):
    net = perturbed.convert(kind.make().double().eval(), D, Explicit())
    pm, weights = swarm(net, flat=flat), randn(D)
    for factor, accumulate in ((1, False), (2, True), (1, False)):
        pm.set_grad(weights, accumulate)
        for name, tensor in pm.members().items():
            expected = factor * torch.tensordot(weights, tensor, 1)
            same(net.get_parameter(name).grad, expected)
