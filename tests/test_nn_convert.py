"""convert and revert: which layers change, and that nothing else about them does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from zoo import KINDS, D, OwnForward, Tied, mlp

import perturbed
from perturbed import Dense, PerturbedLinear, PerturbedModel
from perturbed.nn.twins import TWINS
from perturbed.testing import assert_bitwise_equal

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
def test_conversion_is_undone_without_a_trace(kind):
    net = kind.make().double().eval()
    modules, parameters = list(net.modules()), list(net.parameters())
    types = [type(m) for m in modules]
    attributes = [sorted(m.__dict__) for m in modules]
    state = copy.deepcopy(net.state_dict())
    assert perturbed.convert(net, D) is net
    assert any(type(m) is PerturbedLinear for m in modules)
    assert [id(m) for m in net.modules()] == [id(m) for m in modules]
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert perturbed.revert(net) is net
    assert [type(m) for m in net.modules()] == types
    assert [sorted(m.__dict__) for m in modules] == attributes
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    for name, tensor in net.state_dict().items():
        assert_bitwise_equal(tensor, state[name])


@each_kind
def test_without_noise_a_converted_model_computes_what_it_did(kind):
    net = kind.make().double().eval()
    arguments = kind.arguments(5)
    leaves = torch.utils._pytree.tree_leaves
    before = leaves(kind.call(net, *arguments))
    perturbed.convert(net, D)
    for after, expected in zip(leaves(kind.call(net, *arguments)), before, strict=True):
        assert_bitwise_equal(after, expected)


def test_hooks_flags_and_holders_survive():
    net = mlp()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("hook"))
    net[0].eval()
    net[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    holder = net[0]
    perturbed.convert(net, D)
    net(torch.ones(1, 6))
    assert calls == ["hook"]
    assert not net[0].training
    assert net[2].training
    assert not net[2].weight.requires_grad
    assert holder is net[0]
    assert optimizer.param_groups[0]["params"][0] is net[0].weight


def test_what_a_layer_was_it_becomes_again(monkeypatch):
    """A registered subclass, and a class that is named and never imported."""

    class Named(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(6, 6), OwnForward(6, 6), Named(6, 3), PerturbedLinear(3, 3, D))
    monkeypatch.setitem(TWINS, OwnForward, PerturbedLinear)
    monkeypatch.setitem(TWINS, "test_nn_convert.*.Named", PerturbedLinear)
    perturbed.convert(net, D)
    assert [type(m) for m in net] == [PerturbedLinear] * 4
    clone = copy.deepcopy(net)
    for model in (net, clone):
        perturbed.revert(model)
        assert [type(m) for m in model] == [nn.Linear, OwnForward, Named, nn.Linear]
        assert not {"noise", "directions", "sites", "original_class"} & {
            name for m in model for name in m.__dict__
        }


def test_ties_survive():
    net = perturbed.convert(Tied(), D)
    assert net.a.weight is net.b.weight
    perturbed.revert(net)
    assert net.a.weight is net.b.weight


def test_converting_twice_keeps_what_is_there():
    noise = Dense("rademacher")
    net = nn.Sequential(PerturbedLinear(6, 6, D, noise=noise), nn.Linear(6, 3))
    perturbed.convert(net, D)
    assert (net[0].noise, net[1].noise) == (noise, Dense())
    perturbed.convert(net, D + 1, Dense(storage="stored"))
    assert (net[0].directions, net[1].directions) == (D, D)
    assert net[0].noise is noise


def test_a_model_is_converted_before_and_after_wrapping():
    """A layer that joins later is perturbed from the next draw on."""
    net = nn.Sequential(perturbed.convert(nn.Linear(6, 6), D), nn.Linear(6, 3))
    pm = PerturbedModel(net, D)
    pm.set_noise()
    perturbed.convert(net, D)
    x = torch.randn(2 * D, 6)
    torch.testing.assert_close(pm(x)[1], net[1](pm.member(1)[0](x[1])))
    pm.set_noise()
    torch.testing.assert_close(pm(x)[1], pm.member(1)(x[1]))
    pm.set_grad(torch.ones(D))
    assert net[1].weight.grad.any()


def test_reverting_releases_the_wrapper():
    net = perturbed.convert(mlp(), D)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    perturbed.revert(net)
    for use in (lambda: pm(torch.ones(D, 6)), pm.set_noise, lambda: pm.member(0)):
        with pytest.raises(RuntimeError, match="reverted or serve a newer"):
            use()
    again = PerturbedModel(perturbed.convert(net, 2 * D), 2 * D)
    again.set_noise()
    again(torch.ones(2 * D, 6))


class Scaled(PerturbedLinear):
    """A user's own perturbed layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_own_perturbed_layers_keep_their_class():
    layer = Scaled(6, 3, D)
    pm = PerturbedModel(layer, D, sigma=0.3)
    pm.set_noise()
    x = torch.randn(2 * D, 6)
    member = pm.member(0)
    assert type(member) is Scaled
    torch.testing.assert_close(pm(x)[0], member(x[0]))
    perturbed.revert(layer)
    assert (type(layer), layer.is_perturbed) == (Scaled, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnForward(6, 6),
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", amount=0.5),
        lambda: torch.ao.nn.qat.Linear(6, 6, qconfig=torch.ao.quantization.default_qconfig),
        lambda: nn.Bilinear(6, 6, 6),
    ],
    ids=["subclass", "weight_norm", "pruned", "qat", "bilinear"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_compute_something_else_are_left_alone(make):
    special = make()
    kind = type(special)
    net = nn.Sequential(special, nn.Linear(6, 3))
    perturbed.convert(net, D)
    assert (type(net[0]), type(net[1])) == (kind, PerturbedLinear)
    with pytest.raises(ValueError, match="no layer that can be perturbed"):
        perturbed.convert(special, D)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_parameters_computed_after_conversion_are_refused(change):
    """Their noise would go into a tensor that is thrown away."""
    net = perturbed.convert(mlp(), D)
    pm = PerturbedModel(net, D)
    change(net[2])
    with pytest.raises(ValueError, match=r"2\.(weight|bias) must be a Parameter"):
        pm.set_noise()
    with pytest.raises(ValueError, match="must be a Parameter"):
        PerturbedModel(net, D)


def test_lazy_layers_are_refused_until_they_have_weights():
    net = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1\.weight is lazy; run one forward first"):
        perturbed.convert(net, D)
    assert type(net[0]) is nn.Linear
    net(torch.ones(1, 6))
    perturbed.convert(net, D)
    assert [type(m) for m in net] == [PerturbedLinear, PerturbedLinear]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None, D), TypeError, r"model must be an nn\.Module, got NoneType"),
        ((nn.Linear, D), TypeError, r"model must be an nn\.Module, got type"),
        ((mlp(), 0), ValueError, "directions must be .* got 0"),
        ((mlp(), 2.0), TypeError, "directions must be an int"),
        ((mlp(), D, "dense"), TypeError, "noise must be a noise family"),
        ((mlp(), D, Dense), TypeError, "noise must be a noise family"),
        (
            (nn.Sequential(nn.Tanh()), D),
            ValueError,
            r"no layer that can be perturbed: Sequential \(no",
        ),
    ],
    ids=["none", "class", "zero", "float", "text", "family_class", "nothing"],
)
def test_bad_arguments_change_nothing(arguments, error, words):
    with pytest.raises(error, match=words):
        perturbed.convert(*arguments)
    if isinstance(arguments[0], nn.Module):
        assert not any(isinstance(m, PerturbedLinear) for m in arguments[0].modules())


def test_revert_wants_a_module_and_leaves_others_alone():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        perturbed.revert(3)
    net = mlp()
    assert perturbed.revert(net) is net
