"""PerturbedModel: which noise is drawn, for which parameters, and what comes back from it."""

import random

import numpy as np
import pytest
import torch
from families import signs
from torch import nn
from zoo import KINDS, D, Tied, Twice, inputs, mlp, population, same

import perturbed
from perturbed import Dense, PerturbedModel
from perturbed.testing import assert_bitwise_equal

each_noise = pytest.mark.parametrize(
    "noise", [Dense(), Dense("rademacher"), Dense(storage="stored")], ids=str
)


# ---- parameters --------------------------------------------------------------------------------


def test_a_tied_parameter_is_perturbed_and_set_once():
    net = perturbed.convert(Tied(), D)
    pm = PerturbedModel(net, D, sigma=0.1)
    pm.set_noise()
    weights = torch.randn(D)
    pm.set_grad(weights)
    noise = 0.1 * net.a.parameter_noise("weight", 0, D)
    assert_bitwise_equal(noise, 0.1 * net.b.parameter_noise("weight", 0, D))
    torch.testing.assert_close(net.a.weight.grad, torch.tensordot(weights, noise, 1))
    pm.set_grad(weights, accumulate=True)
    torch.testing.assert_close(net.a.weight.grad, 2 * torch.tensordot(weights, noise, 1))
    assert not torch.allclose(net.a.bias.grad, net.b.bias.grad)  # biases are not tied
    member = pm.member(0)
    assert member.a.weight is member.b.weight


def test_a_module_used_twice_is_perturbed_alike_in_both():
    net = perturbed.convert(Twice(), D)
    assert net.first is net.second
    pm = PerturbedModel(net, D)
    assert len(list(pm.layers())) == 1


def test_frozen_parameters_are_left_alone():
    net, pm = KINDS["heads"].convert()
    pm.set_grad(torch.ones(D))
    grads = {name for name, p in net.named_parameters() if p.grad is not None}
    assert grads == {"partly.bias"}


def test_freezing_takes_effect_at_the_next_draw():
    net, pm = population()
    x = inputs()
    before = pm(x)
    net[0].requires_grad_(False)
    assert_bitwise_equal(pm(x), before)  # the current draw is what it was
    pm.set_grad(torch.ones(D))
    assert net[0].weight.grad.any()
    net.zero_grad()
    pm.set_noise()
    pm.set_grad(torch.ones(D))
    assert net[0].weight.grad is None
    hidden = torch.tanh(net[0](x))
    same(pm(x)[1], pm.member(1)[2](hidden[1]))
    with torch.no_grad():
        net[0].requires_grad_(True)
    pm.set_noise()
    pm.set_grad(torch.ones(D))
    assert net[0].weight.grad.any()


def test_freezing_does_not_move_the_noise_of_others():
    grads = []
    for frozen in (False, True):
        net, pm = population()
        net[0].requires_grad_(not frozen)
        pm.set_noise()
        pm.set_grad(torch.ones(D))
        grads.append(net[2].weight.grad)
    assert_bitwise_equal(*grads)


def test_replaced_parameters_are_found_at_the_next_draw():
    net, pm = population()
    net[0].weight = nn.Parameter(torch.zeros(8, 6).double())
    pm.set_noise()
    pm.set_grad(torch.ones(D))
    assert net[0].weight.grad.any()
    x = inputs()
    same(pm(x)[0], pm.member(0)(x[0]))


def test_dtypes_and_moves():
    net, pm = population()
    y = pm(inputs())
    for dtype in (torch.bfloat16, torch.float32):
        pm.to(dtype)
        pm.set_grad(torch.ones(D))
        assert net[0].weight.grad.dtype == pm(inputs().to(dtype)).dtype == dtype
        net.zero_grad()
    net.double()  # without the wrapper's knowledge
    assert pm(inputs()).dtype == y.dtype
    pm.set_grad(torch.ones(D))
    assert net[0].weight.grad.dtype == torch.float64


# ---- set_grad ----------------------------------------------------------------------------------


def test_set_grad_replaces_or_adds():
    net, pm = population()
    w1, w2 = torch.randn(2, D)
    pm.set_grad(w1)
    first = net[0].weight.grad.clone()
    pm.set_grad(w2)
    second = net[0].weight.grad.clone()
    pm.set_grad(w1, accumulate=True)
    same(net[0].weight.grad, first + second)
    net.zero_grad()
    pm.set_grad(w1, accumulate=True)
    assert_bitwise_equal(net[0].weight.grad, first)


def test_set_grad_takes_any_layout_of_parameters_and_gradients():
    net, pm = population()
    pm.set_grad(torch.arange(4.0))
    expected = net[0].weight.grad.clone()
    net[0].weight.data = net[0].weight.data.t().contiguous().t()
    net[0].weight.grad = torch.ones(6, 8).double().t()
    pm.set_grad(torch.arange(4.0), accumulate=True)
    same(net[0].weight.grad, expected + 1)
    weights = torch.arange(8.0)[::2].half().requires_grad_()
    pm.set_grad(weights)
    same(net[0].weight.grad, 2 * expected)
    assert not net[0].weight.grad.requires_grad


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (torch.ones(D + 1), ValueError, r"shape \(D,\) = \(4,\), got \(5,\)"),
        (torch.ones(2, D), ValueError, r"got \(2, 4\)"),
        (torch.tensor(1.0), ValueError, r"got \(\)"),
        (torch.ones(D, dtype=torch.int64), TypeError, "floating-point tensor .* torch.int64"),
        (torch.ones(D, dtype=torch.complex64), TypeError, "torch.complex64"),
        ([1.0] * D, TypeError, "got list"),
        (np.ones(D), TypeError, "got ndarray"),
        (torch.ones(D, device="meta"), ValueError, "parameters' device cpu, got meta"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights, error, words):
    net, pm = population()
    with pytest.raises(error, match=words):
        pm.set_grad(weights)
    assert net[0].weight.grad is None


# ---- the draw ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda pm: pm(inputs()),
        lambda pm: pm.set_grad(torch.ones(D)),
        lambda pm: pm.member(0),
        lambda pm: pm.allocate_memory(),
    ],
    ids=["forward", "set_grad", "member", "allocate_memory"],
)
@pytest.mark.parametrize("how", ["new", "set_seed"])
def test_without_noise_there_is_nothing_to_use(use, how):
    net = perturbed.convert(mlp().double(), D)
    pm = PerturbedModel(net, D)
    if how == "set_seed":
        pm.set_noise()
        pm.set_seed(3)
    with pytest.raises(RuntimeError, match=r"call set_noise\(\) first"):
        use(pm)
    pm.set_noise()
    use(pm)


@each_noise
@torch.no_grad()
def test_every_draw_is_fresh_and_the_seed_reproduces_it(noise):
    _, pm = population(noise=noise, seed=1)
    x = inputs()

    def draws():
        results = [pm(x)]
        for _ in range(3):
            pm.set_noise()
            results.append(pm(x))
        return results

    first = draws()
    assert all(not torch.allclose(a, b) for i, a in enumerate(first) for b in first[:i])
    pm.set_seed(1)
    pm.set_noise()
    for again, before in zip(draws(), first, strict=True):
        assert_bitwise_equal(again, before)
    pm.set_seed(2)
    pm.set_noise()
    assert not torch.allclose(pm(x), first[0])
    assert pm.seed == 2


@each_noise
@torch.no_grad()
def test_the_scale_changes_alone(noise):
    net, pm = population(noise=noise)
    x = inputs()
    first = pm.member(0)[0].weight - net[0].weight
    pm.set_noise_scale(0.6)
    assert pm.sigma == 0.6
    same(pm.member(0)[0].weight - net[0].weight, 2 * first)
    same(pm(x)[0], pm.member(0)(x[0]))
    pm.set_noise_scale(0)
    same(pm(x), net(x))
    pm.set_noise(sigma=0.3)
    assert pm.sigma == 0.3
    assert not torch.allclose(pm.member(0)[0].weight - net[0].weight, first)


def test_layers_and_generations_are_independent():
    """Correlations of 1e5 draws: 5 standard deviations are 0.016."""
    net = perturbed.convert(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), 10)
    pm = PerturbedModel(net, 10)
    noises = []
    for _ in range(2):
        pm.set_noise()
        noises += [layer.parameter_noise("weight", 0, 10).flatten() for layer in pm.layers()]
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(4)
    assert correlations.abs().max() < 5 / 1e5**0.5


def test_the_global_random_states_are_not_touched():
    net = Tied()

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    pm = PerturbedModel(perturbed.convert(net, D), D, seed=None)
    for seed in (None, 3):
        pm.set_seed(seed)
        pm.set_noise()
        pm(pm.replicate(torch.ones(3, 6)))
        pm.set_grad(torch.ones(D))
        pm.member(0)
    assert states() == before


def test_a_seed_of_none_is_new_every_time():
    seeds = {population(seed=None)[1].seed for _ in range(8)}
    assert len(seeds) == 8


# ---- member values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeats", "antithetic", "s"), [(1, None, 1), (2, None, 2), (6, None, 2), (3, False, 1)]
)
def test_member_mean(repeats, antithetic, s):
    _, pm = population(antithetic=antithetic)
    values = torch.randn(repeats * D, dtype=torch.float64)
    means = pm.member_mean(values)
    assert means.shape == (s, D)
    negated = signs(len(values), D, s == 2) < 0
    for sign in range(s):
        for d in range(D):
            mine = (negated == (sign == 1)) & (torch.arange(len(values)) % D == d)
            same(means[sign, d], values[mine].mean())
    same(pm.member_mean(values[:, None].expand(-1, 7).unsqueeze(1)), means)
    hits = values > 0
    same(pm.member_mean(hits), pm.member_mean(hits.float()))
    same(pm.member_mean(hits.long()), pm.member_mean(hits.float()))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (torch.ones(7), ValueError, "D = 4 directions, got 7 rows"),
        (torch.ones(12), ValueError, "even number of repeats"),
        (torch.tensor(1.0), ValueError, "without dimensions"),
        ([1.0] * 8, TypeError, "got list"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, error, words):
    _, pm = population()
    with pytest.raises(error, match=words):
        pm.member_mean(values)
