"""PerturbedModel: what is perturbed, which noise is drawn, and what a forward may do."""

import numpy as np
import pytest
import torch
from families import signs
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import KINDS, D, inputs, mlp, population, same

import perturbed
from perturbed import Dense, PerturbedModel
from perturbed.testing import assert_bitwise_equal

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_noise = pytest.mark.parametrize(
    "noise", [Dense(), Dense("rademacher"), Dense(storage="stored")], ids=str
)


def one_row(arguments, b, rows):
    """Row b of every tensor that has rows."""

    def cut(leaf):
        has_rows = isinstance(leaf, torch.Tensor) and len(leaf) == rows
        return leaf[b : b + 1] if has_rows else leaf

    return tree_map(cut, arguments)


# ---- members -----------------------------------------------------------------------------------


@each_kind
@each_noise
@pytest.mark.parametrize(
    ("repeats", "antithetic", "grad"),
    [
        (1, None, False),
        (2, None, True),
        (3, False, False),
        (4, None, False),
        (26, True, False),
        (26, True, True),
    ],
)
def test_a_member_is_the_network_that_its_rows_see(kind, noise, repeats, antithetic, grad):
    net, pm = kind.convert(noise=noise, antithetic=antithetic)
    rows = repeats * D
    arguments = kind.arguments(rows)
    with torch.set_grad_enabled(grad):
        batched, layout = tree_flatten(kind.call(pm, *arguments))
        unperturbed, _ = tree_flatten(kind.call(net, *arguments))
    assert all(len(out) == rows for out in batched)
    assert max((a - b).abs().max() for a, b in zip(batched, unperturbed, strict=True)) > 0.01
    s = signs(rows, D, antithetic or (antithetic is None and repeats > 1))
    members = {}
    for b in range(0, rows, 1 if rows < 20 else 7):
        key = b % D, int(s[b])
        if key not in members:
            members[key] = pm.member(*key)
        single, single_layout = tree_flatten(kind.call(members[key], *one_row(arguments, b, rows)))
        assert single_layout == layout
        for alone, together in zip(single, batched, strict=True):
            same(alone[0], together[b])


@each_kind
def test_a_member_is_plain_and_independent(kind):
    net, pm = kind.convert()
    member = pm.member(1, -1)
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert not any(isinstance(m, perturbed.nn.PerturbedLayer) for m in member.modules())
    assert [type(m) for m in member.modules()] == [type(m) for m in kind.make().modules()]
    assert list(member.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.zero_()
    for name, parameter in net.named_parameters():
        assert_bitwise_equal(parameter, before[name])
    kind.call(pm, *kind.arguments(2 * D))  # the population is still whole


@pytest.mark.parametrize(
    ("d", "sign", "error", "words"),
    [
        (D, 1, ValueError, "d must be between 0 and 3, got 4"),
        (-1, 1, ValueError, "d must be between 0 and 3, got -1"),
        (1.0, 1, TypeError, "d must be an int, got 1.0"),
        (True, 1, TypeError, "d must be an int, got True"),
        (0, 0, ValueError, "sign must be 1 or -1, got 0"),
        (0, "+", ValueError, "sign must be 1 or -1, got '\\+'"),
    ],
)
def test_members_that_do_not_exist_are_refused(d, sign, error, words):
    _, pm = population()
    with pytest.raises(error, match=words):
        pm.member(d, sign)


def test_members_and_rows_may_be_named_by_numpy_integers():
    _, pm = population()
    x = inputs()
    same(pm.member(np.int64(2))(x[2]), pm(x)[2])


# ---- evaluation --------------------------------------------------------------------------------


def test_the_base_model_stays_unperturbed():
    net, pm = population()
    x = inputs()
    plain = mlp().double()
    plain.load_state_dict(net.state_dict())
    assert_bitwise_equal(net(x), plain(x))
    pm(x)
    assert_bitwise_equal(net(x), plain(x))
    assert_bitwise_equal(net(x[:3]), plain(x[:3]))


def test_the_block_perturbs_every_call_in_it():
    net, pm = population()
    x = inputs()
    with pm.perturbed():
        assert_bitwise_equal(net(x), pm(x))  # and pm(x) inside leaves the noise on
        assert_bitwise_equal(net(x), pm(x))
        assert_bitwise_equal(net[0](x), pm.model[0](x))
        many = net(inputs(4))
    assert many.shape == (4 * D, 3)
    assert_bitwise_equal(net(x), net(x))
    assert not pm.state.active


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.broken = True

    def forward(self, x):
        y = self.fc(x)
        if self.broken:
            raise KeyError("on purpose")
        return y

    def other(self, x):
        return self.forward(x)


@pytest.mark.parametrize("name", ["forward", "__call__", "other"])
def test_an_exception_switches_the_noise_off(name):
    net = perturbed.convert(Fails(), D)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    x = torch.randn(2 * D, 6)
    fused = torch.backends.mha.get_fastpath_enabled()
    for broken in (True, False):
        net.broken = broken
        if broken:
            with pytest.raises(KeyError, match="on purpose"):
                getattr(pm, name)(x)
        assert (pm.state.active, pm.state.rows) == (False, None)
        assert torch.backends.mha.get_fastpath_enabled() == fused
        net.broken = False
        net(x[:3])
        pm(torch.randn(4 * D, 6))  # rows of the failed forward bind nobody
    with pytest.raises(KeyError, match="mine"), pm.perturbed():
        raise KeyError("mine")
    assert not pm.state.active


def test_hooks_of_the_base_model_fire():
    net, pm = population()
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    net.register_forward_hook(lambda module, args, out: seen.append(("post", out.shape)))
    net[0].register_forward_hook(lambda module, args, out: out + 1000)
    pm.register_forward_hook(lambda module, args, out: seen.append("wrapper"))
    out = pm(inputs())
    assert seen == ["pre", ("post", (2 * D, 3)), "wrapper"]
    saturated = pm.member(0)[2](torch.ones(8).double())  # tanh of a thousand
    same(out[0], saturated)


def test_attributes_and_methods_of_the_base_model():
    class Net(nn.Module):
        limit = 3

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)
            self.names = ["a"]
            self.kind = dict

        def act(self, x, *, greedy=False):
            """Choose."""
            return self.fc(x).argmax(-1) if greedy else self.fc(x)

        @property
        def size(self):
            return self.fc.in_features

    net = perturbed.convert(Net(), D)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    x = torch.randn(2 * D, 6)
    assert (pm.limit, pm.size, pm.kind) == (3, 6, dict)
    assert pm.names is net.names
    assert pm.fc is net.fc
    assert (pm.act.__name__, pm.act.__doc__) == ("act", "Choose.")
    assert not torch.equal(pm.act(x), net.act(x))
    with pm.perturbed():
        assert_bitwise_equal(pm.act(x, greedy=True), net.act(x).argmax(-1))
    assert pm.training
    assert not pm.eval().training
    assert not net.training
    for name in ("missing", "__fspath__"):
        with pytest.raises(AttributeError, match=name):
            getattr(pm, name)


@pytest.mark.parametrize("name", ["steps", "later"])
def test_methods_that_would_run_after_the_noise_are_refused(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def steps(self, x):
            yield self.fc(x)

        async def later(self, x):
            return self.fc(x)

    net = perturbed.convert(Net(), D)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    x = torch.randn(2 * D, 6)
    with pytest.raises(TypeError, match=rf"{name} returns a (generator|coroutine).*pm.perturbed"):
        getattr(pm, name)(x)
    with pm.perturbed():
        (y,) = net.steps(x)
    assert not torch.equal(y, net.fc(x))


# ---- rows --------------------------------------------------------------------------------------


class Folds(nn.Module):
    """Takes (B, T, in) and hands its layer the rows in another order."""

    def __init__(self, fold):
        super().__init__()
        self.fold = fold
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.fold(x))


@pytest.mark.parametrize(
    "fold",
    [
        lambda x: x.flatten(0, 1),
        lambda x: x.transpose(0, 1),
        lambda x: x[: x.shape[0] // 2],
        lambda x: torch.cat([x, x]),
    ],
    ids=["tokens_into_rows", "tokens_first", "half", "doubled"],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": [x]}], ids=["tensor", "nested"])
def test_models_that_reorder_rows_are_refused(fold, wrap):
    net = perturbed.convert(
        Folds(lambda x: fold(x if isinstance(x, torch.Tensor) else x["x"][0])), D
    )
    pm = PerturbedModel(net, D)
    pm.set_noise()
    x = torch.randn(4 * D, 2 * D, 6)
    net(wrap(x))
    with pytest.raises(ValueError, match=r"rows in a forward of 16: .*\(B, T, in\)"):
        pm(wrap(x))


def test_rows_that_no_argument_shows_are_those_of_the_first_layer():
    """NumPy observations, for one."""

    class Net(nn.Module):
        def __init__(self, fold):
            super().__init__()
            self.a, self.b, self.fold = nn.Linear(6, 6), nn.Linear(6, 6), fold

        def forward(self, x):
            y = self.a(torch.from_numpy(x))
            return self.b(y[: 2 * D] if self.fold else y)

    x = np.random.default_rng(0).random((4 * D, 6), dtype=np.float32)
    for fold in (False, True):
        net = perturbed.convert(Net(fold), D)
        pm = PerturbedModel(net, D)
        pm.set_noise()
        if not fold:
            assert pm(x).shape == (4 * D, 6)
            continue
        with pytest.raises(ValueError, match="a layer got 8 rows in a forward of 16"):
            pm(x)
