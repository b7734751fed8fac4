"""Windows of a population: a part of it, evaluated as it is in the whole."""

import pytest
import torch
from families import FAMILIES
from torch import nn
from zoo import same

from perturbed import Explicit, PerturbedModel, convert

D = 5
WINDOWS = [(0, 2), (2, 2), (4, 1)]

each_family = pytest.mark.parametrize("noise", FAMILIES.values(), ids=FAMILIES)


class Net(nn.Module):
    """A convolution, a norm, a Linear and an Embedding, so that every way of drawing is there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 7)
        self.table = nn.Embedding(9, 7)

    def forward(self, x, index):
        y = torch.tanh(self.conv(x)).mean((2, 3))
        return self.linear(self.norm(y)) * self.table(index)


def population(noise, antithetic=True):
    torch.manual_seed(0)
    net = convert(Net().double(), D, noise)
    pm = PerturbedModel(net, D, antithetic, sigma=0.3, seed=7)
    pm.set_noise()
    return pm


def examples(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(9, (n,), generator=generator)


def evaluate(pm, short=True):
    rows = [pm.replicate(x) for x in examples()]
    y = pm(*(rows if short else [r.full() for r in rows]))
    return y.view(2, 3, pm.directions, 7)


@each_family
@pytest.mark.parametrize("short", [True, False], ids=["replicated", "rows"])
def test_a_window_shows_its_members(noise, short):
    pm = population(noise)
    with torch.no_grad():
        whole = evaluate(pm, short)
        for first, count in WINDOWS:
            with pm.window(first, count) as shown:
                assert shown is pm
                assert (pm.directions, pm.population) == (count, D)
                same(evaluate(pm, short), whole[:, :, first : first + count])
        same(evaluate(pm, short), whole)
    assert pm.directions == D


@each_family
def test_estimates_of_windows_add_up(noise):
    pm = population(noise)
    weights = torch.linspace(-1, 2, D, dtype=torch.float64)
    pm.set_grad(weights)
    whole = [p.grad.clone() for p in pm.model.parameters()]
    for i, (first, count) in enumerate(WINDOWS):
        with pm.window(first, count):
            pm.set_grad(weights[first : first + count], accumulate=i > 0)
    for p, expected in zip(pm.model.parameters(), whole, strict=True):
        same(p.grad, expected)


@each_family
def test_members_are_counted_from_the_first_of_the_window(noise):
    pm = population(noise)
    expected = [p.clone() for p in pm.member(3, -1).parameters()]
    with pm.window(2, 2):
        for p, q in zip(pm.member(1, -1).parameters(), expected, strict=True):
            same(p, q)
        with pytest.raises(ValueError, match="between 0 and 1"):
            pm.member(2)


def test_fresh_noise_in_a_window_is_that_of_the_whole():
    pm, other = population(FAMILIES["dense-normal"]), population(FAMILIES["dense-normal"])
    with pm.window(1, 3):
        pm.set_noise(0.1)
    other.set_noise(0.1)
    with torch.no_grad():
        assert torch.equal(evaluate(pm), evaluate(other))


def test_a_window_ends_when_its_block_raises():
    pm = population(FAMILIES["low-rank-1"])
    with pytest.raises(KeyError), pm.window(1, 3):
        raise KeyError
    assert pm.directions == D


def test_members_that_are_given():
    torch.manual_seed(0)
    pm = PerturbedModel(convert(Net().double(), D, Explicit()), D)
    members = {n: torch.randn(D, *p.shape).double() for n, p in pm.model.named_parameters()}
    with pm.window(1, 2):
        pm.set_members(members)  # those of the whole population
    x, index = examples()
    with torch.no_grad():
        whole = pm(pm.replicate(x), pm.replicate(index)).view(3, D, 7)
        for first, count in WINDOWS:
            with pm.window(first, count):
                y = pm(pm.replicate(x), pm.replicate(index)).view(3, count, 7)
            same(y, whole[:, first : first + count])
        members["linear.bias"] += 1
        with pm.window(3, 2):
            y = pm(pm.replicate(x), pm.replicate(index))
        assert not torch.allclose(y.view(3, 2, 7), whole[:, 3:])


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (4, 2), (5, 1)])
def test_directions_outside_of_the_population(first, count):
    pm = population(FAMILIES["low-rank-1"])
    with pytest.raises(ValueError, match="directions of the population, 0 to 4"):
        pm.window(first, count).__enter__()
    assert pm.directions == D


def test_rows_replicated_for_the_whole_population_are_refused():
    pm = population(FAMILIES["low-rank-1"])
    rows = [pm.replicate(x) for x in examples()]
    with pm.window(0, 2), pytest.raises(ValueError, match="inside the closure"):
        pm(*rows)
