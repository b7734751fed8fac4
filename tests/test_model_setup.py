"""PerturbedModel: what it can be made of, who owns a layer, and the summary."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from zoo import KINDS, D, Tied, inputs, mlp, population, same

import perturbed
from perturbed import Dense, PerturbedLinear, PerturbedModel
from perturbed.testing import assert_bitwise_equal

# ---- construction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"directions": 0}, ValueError, "directions must be between 1 and .* got 0"),
        ({"directions": -4}, ValueError, "got -4"),
        ({"directions": True}, TypeError, "directions must be an int, got True"),
        ({"directions": 4.0}, TypeError, "directions must be an int, got 4.0"),
        ({"directions": "4"}, TypeError, "directions must be an int, got '4'"),
        ({"directions": 5}, ValueError, "got 5, layer '0' has 4"),
        ({"sigma": -0.1}, ValueError, "sigma must be finite and at least 0, got -0.1"),
        ({"sigma": float("nan")}, ValueError, "got nan"),
        ({"sigma": float("inf")}, ValueError, "got inf"),
        ({"sigma": "0.1"}, TypeError, "sigma must be a number, got '0.1'"),
        ({"sigma": None}, TypeError, "sigma must be a number, got None"),
        ({"sigma": True}, TypeError, "sigma must be a number, got True"),
        ({"sigma": torch.ones(2)}, TypeError, "sigma must be a number"),
        ({"antithetic": 1}, TypeError, "antithetic must be True, False or None, got 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    net = perturbed.convert(mlp(), D)
    with pytest.raises(error, match=words):
        PerturbedModel(net, **{"directions": D, **options})
    name = next(iter(options))
    if name in ("sigma", "seed") and options[name] is not None:
        pm = PerturbedModel(net, D)
        pm.set_noise()
        x = torch.randn(2 * D, 6)
        before = pm(x)
        for setter in {"sigma": ("set_noise", "set_noise_scale"), "seed": ("set_seed",)}[name]:
            with pytest.raises(error, match=words):
                getattr(pm, setter)(options[name])
        assert_bitwise_equal(pm(x), before)  # nothing has changed


def test_numbers_of_numpy_and_torch_are_numbers():
    net = perturbed.convert(mlp(), np.int64(D))
    pm = PerturbedModel(net, np.int32(D), sigma=torch.tensor(0.5), seed=np.uint64(2**63))
    assert (pm.sigma, pm.seed, pm.directions) == (0.5, 2**63, D)


@pytest.mark.parametrize("model", [None, torch.ones(3), nn.Linear, lambda x: x])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        PerturbedModel(model, D)


def test_models_without_anything_to_perturb_are_refused():
    with pytest.raises(ValueError, match=r"no perturbed layers; make them with perturbed.convert"):
        PerturbedModel(mlp(), D)
    net = perturbed.convert(mlp(), D).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to perturb: all .* frozen"):
        PerturbedModel(net, D)


def test_a_parameter_shared_by_layers_of_different_noise_is_refused():
    net = Tied()
    perturbed.convert(net.a, D, Dense("rademacher"))
    perturbed.convert(net.b, D, Dense("normal"))
    with pytest.raises(ValueError, match=r"b.weight is shared .* Dense\('normal'\) and Dense\('ra"):
        PerturbedModel(net, D)


def test_a_newer_wrapper_takes_the_layers_over():
    net, old = population()
    x = inputs()
    old(x)
    new = PerturbedModel(net, D, seed=8)
    new.set_noise()
    same(new(x)[0], new.member(0)(x[0]))
    for use in (lambda: old(x), old.set_noise, lambda: old.set_grad(torch.ones(D))):
        with pytest.raises(RuntimeError, match=r"reverted or serve a newer PerturbedModel"):
            use()
    part = PerturbedModel(net[2], D)  # of a part of the model, too
    part.set_noise()
    with pytest.raises(RuntimeError, match=r"newer PerturbedModel"):
        new(x)


def test_wrappers_do_not_nest():
    _, pm = population()
    for outer in (pm, nn.Sequential(pm)):
        with pytest.raises(ValueError, match=r"must not contain a PerturbedModel"):
            PerturbedModel(outer, D)


def test_two_models_do_not_interfere():
    (net1, pm1), (net2, pm2) = population(), population()
    x = inputs()
    plain = net2(x)
    with pm1.perturbed():
        assert_bitwise_equal(net2(x), plain)
        assert not torch.equal(pm2(x), plain)
        assert pm1.state.active
    before = pm1(x)
    pm2.set_noise()
    pm2.set_grad(torch.ones(D))
    assert_bitwise_equal(pm1(x), before)
    assert net1[0].weight.grad is None


def test_functional_call_replaces_the_parameters_under_the_noise():
    net, pm = population()
    x = inputs()
    member = pm.member(0)
    doubled = {name: 2 * p.detach() for name, p in net.named_parameters()}
    with pm.perturbed():
        y = torch.func.functional_call(net, doubled, (x,))
    with torch.no_grad():
        for name, p in member.named_parameters():
            p.add_(net.get_parameter(name))
    same(y[0], member(x[0]))


# ---- summary -----------------------------------------------------------------------------------


def table(pm, *args, **kwargs):
    """Return the summary's rows by their first cell."""
    lines = [re.split("  +", line) for line in pm.summary(*args, **kwargs).splitlines()]
    return {first: rest for first, *rest in lines}


def test_summary():
    _, pm = KINDS["heads"].convert(noise=Dense("rademacher", storage="stored"))
    pm.allocate_memory()
    rows = table(pm)
    assert list(rows) == [
        "layer", "frozen", "partly", "Heads: shift", "frozen: weight, bias", "partly: weight",
        "own: weight, bias", "perturbed",
    ]  # fmt: skip
    assert rows["layer"] == ["noise", "parameters", "noise bytes held", "cost"]
    assert rows["partly"] == ["Dense('rademacher', storage='stored')", "6", "0", "50.0%"]
    assert rows["Heads: shift"] == ["none: no perturbed version", "6", "0"]
    assert rows["frozen: weight, bias"] == ["none: frozen (requires_grad=False)", "42", "0"]
    assert rows["perturbed"] == ["6", "0"]
    _, pm = population(noise=Dense(storage="stored"))
    pm.allocate_memory()
    assert table(pm)["perturbed"] == [
        f"{8 * 6 + 8 + 3 * 8 + 3}", f"{8 * D * (8 * 6 + 3 * 8):,}"
    ]  # fmt: skip


def test_cost_counts_the_uses_of_a_weight():
    _, pm = population()
    assert table(pm)["0"][-1] == f"{48 / 72:.1%}"
    assert table(pm, inputs())["0"][-1] == f"{48 / 72:.1%}"
    net, pm = KINDS["twice"].convert()
    assert table(pm, inputs())["first"][-1] == "100.0%"

    class Uneven(nn.Module):
        """One layer sees five positions, one sees one, one is not called."""

        def __init__(self):
            super().__init__()
            self.each, self.all, self.unused = (nn.Linear(6, 6) for _ in range(3))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x, *, scale):
            assert not self.training
            return self.all(self.dropout(self.each(x)).sum(1)) * scale

    net = perturbed.convert(Uneven(), D)
    pm = PerturbedModel(net, D)
    net.all.eval()
    state = torch.get_rng_state()
    rows = table(pm, torch.ones(1, 5, 6), scale=2)
    assert [rows[n][-1] for n in ("each", "all", "unused")] == ["83.3%", "16.7%", "not called"]
    assert torch.equal(torch.get_rng_state(), state)
    assert (net.training, net.each.training, net.all.training) == (True, True, False)
    assert not net.each._forward_hooks


def test_a_parameter_that_an_unperturbed_module_uses_too_is_refused():
    net = nn.ModuleDict({"table": nn.Bilinear(6, 6, 1), "head": PerturbedLinear(6, 1, D)})
    net["head"].bias = net["table"].bias
    with pytest.raises(ValueError, match=r"table.bias is shared .* table \(Bilinear\) is not"):
        PerturbedModel(net, D)
    net["head"].bias.requires_grad_(False)
    PerturbedModel(net, D).set_noise()


class Holder(nn.Module):
    """It holds the bias of a layer in it, as the heads of masked language models do."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(6, 3)
        self.bias = self.decoder.bias

    def forward(self, x):
        return self.decoder(x)


def test_a_module_may_hold_the_parameter_of_a_layer_in_it():
    net = perturbed.convert(Holder().double(), D)
    pm = PerturbedModel(net, D, sigma=0.3)
    pm.set_noise()
    x = inputs()
    same(pm(x)[1], pm.member(1)(x[1]))
