"""Differential evolution whose generations are single forwards of a PerturbedModel."""

import numpy as np
import pytest
import torch
from torch import nn

import perturbed

pytest.importorskip("scipy", reason="Minimize needs scipy (the extra `scipy`)")


def make(members=24, dtype=torch.float32, **options):
    """A network, its population, and an optimizer that is to learn x1 x2."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    perturbed.convert(net, members, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, members)
    # Not the order of the model's: the vectors of both must be told apart.
    groups = [{"params": list(net[2].parameters())}, {"params": list(net[0].parameters())}]
    optimizer = perturbed.Minimize(
        groups, "differential_evolution", bounds=(-3, 3), model=pm, **options
    )
    x = torch.rand(30, 2, dtype=dtype) * 2 - 1
    y = x[:, :1] * x[:, 1:]
    forwards = []

    def closure():
        forwards.append(1)
        return (pm(pm.replicate(x)) - pm.replicate(y)).square().mean(1)

    def loss():
        return (net(x) - y).square().mean().item()

    return net, optimizer, closure, loss, forwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_generation_is_a_forward(dtype):
    _, optimizer, closure, loss, forwards = make(dtype=dtype, options={"maxiter": 200})
    before = loss()
    found = optimizer.step(closure)
    assert len(forwards) == 201  # the first population, then one for each generation
    assert optimizer.evaluations == 201 * 24
    assert loss() == pytest.approx(found.item(), rel=1e-5)
    assert found < 0.4 * before
    assert optimizer.result.fun == pytest.approx(found.item())


def test_same_as_members_one_by_one():
    """scipy alone, with the same generator and population, takes the same path."""
    from scipy.optimize import differential_evolution

    from perturbed import _C
    from perturbed.optim.minimize.population import Population

    net, optimizer, closure, _, _ = make(dtype=torch.float64, options={"maxiter": 5}, seed=7)
    start = np.concatenate([p.detach().numpy().ravel() for p in (*net[2].parameters(),)])
    start = np.concatenate([start, *(p.detach().numpy().ravel() for p in net[0].parameters())])
    optimizer.step(closure)
    plain = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    torch.manual_seed(1)
    nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.rand(30, 2, dtype=torch.float64) * 2 - 1

    @torch.no_grad()
    def function(vector):
        order = [*plain[2].parameters(), *plain[0].parameters()]
        parts = torch.from_numpy(vector.copy()).split([p.numel() for p in order])
        for p, part in zip(order, parts, strict=True):
            p.copy_(part.view(p.shape))
        return (plain(x) - x[:, :1] * x[:, 1:]).square().mean().item()

    rng = np.random.Generator(np.random.Philox(key=[_C.splitmix64(7), 0]))
    problem = type("Bounds", (), {"lower": np.full(17, -3.0), "upper": np.full(17, 3.0)})
    members = type("Members", (), {"positions": torch.empty(24, 17)})
    first = Population.start(type("P", (), {"swarm": members, "problem": problem}), rng)
    expected = differential_evolution(
        function,
        [(-3, 3)] * 17,
        init=first,
        x0=start,
        rng=rng,
        polish=False,
        updating="deferred",
        maxiter=5,
    )
    assert optimizer.result.fun == pytest.approx(expected.fun, rel=1e-9)
    np.testing.assert_allclose(optimizer.result.x, expected.x, rtol=1e-9)


def test_never_worse_than_the_start():
    _, optimizer, closure, loss, _ = make(options={"maxiter": 1})
    before = loss()
    assert optimizer.step(closure).item() <= before * (1 + 1e-6)


def test_losses_that_are_not_finite():
    net, optimizer, closure, loss, _ = make(options={"maxiter": 10})

    def broken():
        values = closure()
        values[::2] = torch.tensor(float("nan"))  # even members, in every generation
        values[1::4] = -torch.inf
        return values

    found = optimizer.step(broken)
    assert torch.isfinite(found)
    assert loss() == pytest.approx(found.item(), rel=1e-5)
    assert all(p.isfinite().all() for p in net.parameters())


def test_resumed_bit_for_bit():
    net, optimizer, closure, _, _ = make(options={"maxiter": 3})
    optimizer.step(closure)
    weights, state = {k: v.clone() for k, v in net.state_dict().items()}, optimizer.state_dict()
    expected = optimizer.step(closure)
    other, resumed, closure, _, _ = make(options={"maxiter": 3}, seed=9)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.step(closure) == expected
    pairs = zip(other.parameters(), net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_windows_of_points_that_are_more_or_fewer_than_members():
    from perturbed.optim.minimize.population import Population
    from perturbed.optim.minimize.problem import Problem

    net = perturbed.convert(nn.Linear(3, 1, bias=False), 5, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, 5)
    bounds = np.full(3, -1.0), np.full(3, 1.0)

    def closure():
        return pm(torch.tensor([[1.0, 2.0, 4.0]]).expand(5, 3))[:, 0]

    problem = Problem(closure, [net.weight], 0, bounds, None)
    population = Population(pm, closure, problem)
    for count in (1, 4, 5, 12):
        points = np.random.default_rng(0).uniform(-1, 1, (3, count)).astype(np.float32)
        expected = np.array([1.0, 2.0, 4.0]) @ points
        np.testing.assert_allclose(population.losses(points), expected, rtol=1e-5, atol=1e-6)
    assert problem.evaluations == 22
    single = population.losses(np.zeros(3))
    assert single.shape == (1,)
