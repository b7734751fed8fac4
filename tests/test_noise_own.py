"""A family of a user's own: one method in Python, and every layer, sign, window and sum with it."""

import pytest
import torch
from torch import nn

import perturbed
from perturbed.noise import NoiseFamily
from perturbed.testing import assert_bitwise_equal

D, SIGMA = 3, 0.3


class Uniform(NoiseFamily):
    """That of docs/howto/new-family.md."""

    def __init__(self, width=3**0.5):
        self.width = width

    def materialise_weight(self, site, first, count, rows, cols, like):
        key, _ = site.state.tensors(like.device)
        u = torch.ops.perturbed.uniforms(key, site.weight, first, count, rows * cols, torch.float32)
        return ((2 * u - 1) * self.width).view(count, rows, cols).to(like.dtype)


# Name -> layer, and rows of its input.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda n: torch.randn(n, 6)),
    "tokens": (lambda: nn.Linear(6, 5), lambda n: torch.randn(n, 4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda n: torch.randn(n, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 2, 3), lambda n: torch.randn(n, 3, 7)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda n: torch.randint(7, (n, 3))),
    "norm": (lambda: nn.LayerNorm(6), lambda n: torch.randn(n, 6)),
}


def population(name, noise=None):
    make, rows = LAYERS[name]
    layer = perturbed.convert(make().double(), D, noise or Uniform())
    pm = perturbed.PerturbedModel(layer, D, sigma=SIGMA)
    pm.set_noise()
    return layer, pm, lambda n: rows(n).double() if rows(n).is_floating_point() else rows(n)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_their_members(name):
    _, pm, rows = population(name)
    for x, shown in [(y, y) for y in (rows(D), rows(4 * D))] + [
        (pm.replicate(y), pm.replicate(y).full()) for y in (rows(2),)
    ]:
        output, repeats = pm(x), len(shown) // D
        for b, y in enumerate(output):
            sign = -1 if repeats > 1 and b // D >= repeats / 2 else 1
            torch.testing.assert_close(y, pm.member(b % D, sign)(shown[b : b + 1])[0])


@pytest.mark.parametrize("name", LAYERS)
def test_the_estimate_is_the_sum_of_members(name):
    layer, pm, _ = population(name)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    pm.set_grad(weights)
    for key, parameter in layer.named_parameters():
        noise = [pm.member(d).get_parameter(key) - parameter for d in range(D)]
        expected = sum(w * e for w, e in zip(weights, noise, strict=True))
        torch.testing.assert_close(parameter.grad, expected.detach())


def test_the_estimate_of_half_precision_is_summed_in_single():
    layer = perturbed.convert(nn.Linear(6, 5).bfloat16(), 512, Uniform())
    pm = perturbed.PerturbedModel(layer, 512, sigma=SIGMA)
    pm.set_noise()
    pm.set_grad(torch.full((512,), 1 / 512))
    exact = SIGMA * layer.parameter_noise("weight", 0, 512).double().mean(0)
    torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=2**-8, atol=1e-4)


def test_windows_and_chunks_draw_what_the_whole_population_does():
    _, pm, rows = population("linear")
    pm.state.antithetic = False
    x = rows(D)
    whole = pm(x)
    with pm.window(1, 2):
        torch.testing.assert_close(pm(x[1:]), whole[1:])


def test_gradients_flow_through_products():
    layer, pm, rows = population("linear")
    x = rows(D).requires_grad_()
    pm(x).sum().backward()
    expected = torch.stack([pm.member(d).weight.sum(0) for d in range(D)])
    torch.testing.assert_close(x.grad, expected.detach())
    assert layer.weight.grad.shape == (5, 6)


def test_it_is_a_value_and_says_so():
    assert Uniform() == Uniform() != Uniform(1.0)
    assert hash(Uniform()) == hash(Uniform())
    assert repr(Uniform(2.0)) == "Uniform(width=2.0)"
    layer = perturbed.PerturbedLinear(6, 5, 4000, noise=Uniform())
    perturbed.PerturbedModel(layer, 4000).set_noise()
    noise = layer.parameter_noise("weight", 0, 4000)
    assert noise.abs().max() <= 3**0.5
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 5 * (9 / 5 - 1) ** 0.5 / noise.numel() ** 0.5


def test_the_same_draw_has_the_same_bits():
    layer, pm, _ = population("linear")
    before = layer.parameter_noise("weight", 0, D)
    pm.set_seed(0)
    pm.set_noise()
    assert_bitwise_equal(layer.parameter_noise("weight", 0, D), before)
    pm.set_noise()
    assert not torch.equal(layer.parameter_noise("weight", 0, D), before)
