"""SwarmOfOptimizers: batch against one by one, life and death, crossover, resuming, NaN."""

import math

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

import perturbed
from perturbed.description import digest
from perturbed.optim import CROSSOVERS, RandomGrad, SignGrad, SwarmOfOptimizers
from perturbed.optim.crossover import cross, one_point

INPUT = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
TARGET = torch.tensor([0.5, -0.25])


def network():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return net


def adam(parameters):
    return Adam(parameters, 0.02)


def one_by_one(optimizers=adam, members=5, gradients="backward", **options):
    net = network()
    swarm = SwarmOfOptimizers(net, optimizers, members, gradients=gradients, **options)

    def closure():
        loss = (net(INPUT) - TARGET).square().mean()
        if gradients == "closure" and torch.is_grad_enabled():
            net.zero_grad()
            loss.backward()
        return loss

    return swarm, closure


def batch(optimizers=adam, members=5, **options):
    net = perturbed.convert(network(), members, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, members)
    swarm = SwarmOfOptimizers(pm, optimizers, **options)
    return swarm, lambda: (pm(pm.replicate(INPUT)) - TARGET).square().mean(1)


def run(swarm, closure, steps):
    return [swarm.step(closure).item() for _ in range(steps)]


LIFE = {"old_steps": 3, "die_after": 2, "noise": 0.02, "crossover_p": 0.8}


@pytest.mark.parametrize("gradients", ["backward", SignGrad(1e-2), SignGrad(1e-2, "rademacher")])
@pytest.mark.parametrize("optimizer", [adam, lambda p: SGD(p, 0.05, momentum=0.9)])
def test_a_batch_does_what_one_by_one_does(gradients, optimizer):
    options = {"gradients": gradients, "gravity": 0.05, "mean_momentum": 0.3, **LIFE}
    (a, of_a), (b, of_b) = one_by_one(optimizer, **options), batch(optimizer, **options)
    for _ in range(20):
        assert float(a.step(of_a)) == pytest.approx(float(b.step(of_b)), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(a.swarm.positions, b.swarm.positions, rtol=0, atol=2e-6)
    assert a.stats["deaths"] == b.stats["deaths"] > 3
    assert a.evaluations == b.evaluations == 20 * 5 * (1 if gradients == "backward" else 2)
    for p, q in zip(a.swarm.parameters.values(), b.swarm.parameters.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
    assert b.best_loss < 0.5 * run(*batch(), 1)[0]


def test_one_member_is_its_optimizer():
    swarm, closure = one_by_one(members=1, gradients="closure")
    run(swarm, closure, 10)
    net = network()
    plain = adam(net.parameters())
    for _ in range(10):
        plain.zero_grad()
        (net(INPUT) - TARGET).square().mean().backward()
        plain.step()
    for p, q in zip(net.parameters(), swarm.swarm.parameters.values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [one_by_one, batch])
def test_age_and_death(make):
    """Old from step old_steps + 1; dead after more than die_after steps without being the best."""
    swarm, closure = make(lambda p: SGD(p, 0.0), 3, old_steps=2, die_after=3)
    with torch.no_grad():
        swarm.swarm.positions[1:] += 1.0  # member 0 stays the best
    deaths = []
    for _ in range(14):
        swarm.step(closure)
        deaths.append(swarm.stats["deaths"])
    # Age 3 at step 3; streak 4 > 3 at step 6; ages and streaks start over, so again at step 12.
    assert deaths == [0] * 5 + [2] * 6 + [4] * 3
    assert swarm.stats["leader"] == 0
    swarm, closure = make(lambda p: SGD(p, 0.0), 3, noise=0.1)
    run(swarm, closure, 20)
    assert swarm.stats["deaths"] == 0


@pytest.mark.parametrize("make", [one_by_one, batch])
def test_a_child_has_a_fresh_optimizer_and_the_scheduled_rate(make):
    swarm, closure = make(lambda p: Adam(p, 0.02), 3, **LIFE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(swarm, 0.9)
    for _ in range(12):
        swarm.step(closure)
        schedule.step()
    assert all(g["lr"] == pytest.approx(0.02 * 0.9**12) for g in swarm.param_groups)
    inner = swarm.inner

    def steps(i):
        if make is batch:
            return int(inner.optimizer.state[inner.rows[i]].get("step", torch.tensor(0)))
        state = inner.optimizers[i].state
        return int(next(iter(state.values()))["step"]) if state else 0

    ages = swarm.progress["ages"]
    assert [steps(i) for i in range(3)] == ages
    assert min(ages) < 12


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_buffers_belong_to_members():
    net = Normed()
    swarm = SwarmOfOptimizers(
        net, adam, 3, gradients="backward", old_steps=1, die_after=1, noise=0.3
    )
    x = torch.randn(16, 2)
    for _ in range(2):
        swarm.step(lambda: (net(x) - 1).square().mean())
    means = [b["norm.running_mean"] for b in swarm.inner.buffers]
    assert not torch.equal(means[0], means[1])
    assert torch.equal(net.norm.running_mean, means[swarm.stats["leader"]])
    assert net.norm.num_batches_tracked == 2
    while swarm.stats["deaths"] == 0:
        swarm.step(lambda: (net(x) - 1).square().mean())
    means = [b["norm.running_mean"] for b in swarm.inner.buffers]
    leader, ages = swarm.stats["leader"], swarm.progress["ages"]
    for mean, age in zip(means, ages, strict=True):  # a child has those of the best
        assert age > 0 or torch.equal(mean, means[leader])


@pytest.mark.parametrize("make", [one_by_one, batch])
@pytest.mark.parametrize("gradients", ["backward", SignGrad(1e-2)])
def test_runs_resume_bit_for_bit(make, gradients, tmp_path):
    options = {"gradients": gradients, "gravity": 0.1, "mean_momentum": 0.5, **LIFE}
    a, of_a = make(smoothing=0.5, **options)
    run(a, of_a, 9)
    torch.save(a.state_dict(), tmp_path / "swarm.pt")
    state = torch.load(tmp_path / "swarm.pt", weights_only=True)
    b, of_b = make(smoothing=0.5, **options)
    rng = torch.get_rng_state()
    b.load_state_dict(state)
    for p, q in zip(a.swarm.parameters.values(), b.swarm.parameters.values(), strict=True):
        assert torch.equal(p, q)
    assert run(a, of_a, 9) == run(b, of_b, 9)
    assert torch.equal(a.swarm.positions, b.swarm.positions)
    assert digest(a.state_dict()) == digest(b.state_dict())
    assert a.stats["deaths"] > 0
    assert torch.equal(torch.get_rng_state(), rng)  # of steps; networks draw from it
    other, of_other = make(seed=1, smoothing=0.5, **options)
    run(other, of_other, 18)
    assert not torch.equal(other.swarm.positions, a.swarm.positions)


@pytest.mark.parametrize("make", [one_by_one, batch])
def test_a_step_that_raises_changes_nothing(make):
    calls = []
    swarm, closure = make(gradients=SignGrad(1e-2), **LIFE)
    run(swarm, closure, 4)
    before = digest(swarm.state_dict())
    own = [p.detach().clone() for p in swarm.swarm.parameters.values()]

    def broken():
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return closure()

    with pytest.raises(ZeroDivisionError):
        swarm.step(broken)
    assert digest(swarm.state_dict()) == before
    assert all(map(torch.equal, own, swarm.swarm.parameters.values()))
    for bad, error in ((None, TypeError), (torch.ones(2, 3, 4), ValueError)):
        with pytest.raises(error):
            swarm.step(lambda bad=bad: bad)
        assert digest(swarm.state_dict()) == before


@pytest.mark.parametrize("gradients", ["backward", SignGrad(1e-2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_members_that_are_no_numbers_never_win(gradients, value):
    swarm, closure = batch(members=4, gradients=gradients, noise=0.1)

    def spoiled():
        return closure().unflatten(0, (-1, 4)) * torch.tensor([1, value, 1, 1])

    def flat():
        return spoiled().flatten()

    for _ in range(6):
        assert math.isfinite(swarm.step(flat))
        assert swarm.stats["leader"] != 1
        assert swarm.swarm.positions.isfinite().all()
    assert swarm.stats["deaths"] == 6  # the second, each time
    before = swarm.best_loss
    assert math.isnan(swarm.step(lambda: closure() * value))
    assert swarm.best_loss == before
    assert swarm.swarm.positions.isfinite().all()


def test_parameters_that_are_no_numbers_are_replaced():
    swarm, closure = one_by_one(lambda p: SGD(p, 0.01), 3, gradients="closure", noise=0.01)

    class Bomb(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
            return loss

    parameters = list(swarm.swarm.parameters.values())
    swarm.inner.optimizers[2] = Bomb(parameters, 0.01)
    for _ in range(3):
        swarm.step(closure)
    assert swarm.swarm.positions.isfinite().all()
    assert swarm.stats["deaths"] == 3


def test_the_best_point_is_kept():
    swarm, closure = one_by_one(lambda p: SGD(p, 0.5), 3, noise=0.3)
    losses = run(swarm, closure, 10)
    assert swarm.best_loss == min(losses)
    with torch.no_grad():
        for p, b in zip(swarm.swarm.parameters.values(), swarm.best(), strict=True):
            p.copy_(b)
    assert closure().item() == pytest.approx(swarm.best_loss)


def test_any_optimizer_one_by_one():
    """Searches, L-BFGS, optimizers that exist, and lists of different ones."""
    net = network()
    parameters = list(net.parameters())
    members = [
        lambda p: RandomGrad(p, 1e-3, AdamW(p, 0.02), seed=1),
        lambda p: RandomGrad(p, 1e-3, AdamW(p, 0.02), seed=2),
        lambda p: LBFGS(p, 0.1),
        SGD(parameters, 0.05),
    ]
    swarm = SwarmOfOptimizers(net, members, old_steps=2, die_after=2)

    def closure():
        loss = (net(INPUT) - TARGET).square().mean()
        if torch.is_grad_enabled():
            net.zero_grad()
            loss.backward()
        return loss

    losses = run(swarm, closure, 12)
    assert losses[-1] < 0.1 * losses[0]
    assert swarm.stats["deaths"] > 0
    first = swarm.inner.optimizers[0]
    assert first.evaluations == 24  # counters and random numbers go on when a member is born anew
    assert not torch.equal(swarm.swarm.positions[0], swarm.swarm.positions[1])


def test_gravity_momentum_and_aggregation():
    p = nn.Parameter(torch.zeros(1))
    for mode, centre in (("best", 1.0), ("mean", 2.0)):
        swarm = SwarmOfOptimizers([p], lambda q: SGD(q, 0.0), 3, gravity=0.5, gravity_mode=mode)
        swarm.swarm.positions.copy_(torch.tensor([[1.0], [0.0], [5.0]]))
        swarm.step(lambda: (p - 1).abs().sum())
        wanted = [centre + (x - centre) / 2 for x in (1.0, 0.0, 5.0)]
        assert swarm.swarm.positions.flatten().tolist() == pytest.approx(wanted)
    # A power of the distance, of either sign.
    swarm = SwarmOfOptimizers([p], lambda q: SGD(q, 0.0), 2, gravity=0.1, gravity_p=0.5)
    swarm.swarm.positions.copy_(torch.tensor([[1.0], [-3.0]]))
    swarm.step(lambda: (p - 1).abs().sum())
    assert swarm.swarm.positions.flatten().tolist() == pytest.approx([1.0, -2.8])
    # A drift goes on: v_t = -0.1 + 0.5 v_{t-1}.
    swarm = SwarmOfOptimizers(
        [p], lambda q: SGD(q, 0.1), 2, gradients="backward", mean_momentum=0.5, agg_mode="mean"
    )
    swarm.swarm.positions.copy_(torch.tensor([[1.0], [3.0]]))
    for _ in range(3):
        swarm.step(lambda: p.sum())
    moved = -(0.1 + 0.15 + 0.175)
    assert swarm.swarm.positions.flatten().tolist() == pytest.approx([1 + moved, 3 + moved])
    assert p.item() == pytest.approx(2 + moved)


@pytest.mark.parametrize("name", CROSSOVERS)
def test_children_are_of_both_parents(name):
    generator = torch.Generator().manual_seed(0)
    best, second = torch.zeros(4, 6), torch.ones(4, 6)
    children = [CROSSOVERS[name](best, second, generator) for _ in range(200)]
    shares = torch.stack([c.mean() for c in children])
    assert abs(float(shares.mean()) - 0.5) < 5 * 0.5 / math.sqrt(200)
    if name != "mean":
        assert {float(x) for c in children for x in c.unique()} <= {0.0, 0.5, 1.0}
    if name == "swap":
        assert set(shares.tolist()) == {0.0, 1.0}


def test_one_point_crosses_every_size():
    generator = torch.Generator().manual_seed(0)
    two = {tuple(one_point(torch.zeros(2), torch.ones(2), generator).tolist()) for _ in range(50)}
    assert two == {(0.0, 1.0), (1.0, 0.0)}
    five = {tuple(one_point(torch.zeros(5), torch.ones(5), generator).tolist()) for _ in range(300)}
    assert len(five) == 8  # 4 cuts, 2 orders; the last element too
    assert one_point(torch.zeros(()), torch.ones(()), generator).shape == ()


def test_crossover_has_a_chance_and_may_be_a_function():
    generator = torch.Generator().manual_seed(0)
    parents = [torch.zeros(1)] * 400, [torch.ones(1)] * 400

    def second(a, b, _):
        return b, a

    count = sum(float(t) for t in cross(second, parents, 0.25, generator))
    assert abs(count - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)
    for bad, error in ((lambda a, b, g: 1, TypeError), (lambda a, b, g: a[:0], ValueError)):
        with pytest.raises(error, match="crossover must return a tensor"):
            cross(bad, parents, 1.0, generator)
    swarm, closure = one_by_one(crossover=lambda a, b, g: a * 0, **LIFE)
    run(swarm, closure, 6)
    assert (swarm.swarm.positions.abs().sum(1) < 1).any()


def test_small_moves_show_in_the_mean_of_rows():
    """Means of rows are of float64: float32 numbers near 1 are 1e-7 apart."""
    net = perturbed.convert(nn.Linear(2, 1), 2, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, 2)
    swarm = SwarmOfOptimizers(pm, lambda p: SGD(p, 0.1), gradients=SignGrad(1e-3))
    before = swarm.swarm.positions.clone()
    rise = torch.tensor([0.0, 0.0, 0.0, 2.0**-23]).repeat_interleave(2)
    rows = iter([torch.ones(8), torch.ones(8) + rise])  # of four rows of both, one hardly higher
    swarm.step(lambda: next(rows))
    assert (swarm.swarm.positions != before).any(1).all()


def test_flat_and_infinite_losses_give_no_gradient():
    signs = SignGrad().signs
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan, math.nan, 1.0])
    after = torch.tensor([2.0, 0.5, 1.0, math.nan, 1.0, math.inf, -math.inf])
    assert signs(before, after).tolist() == [1, -1, 0, 1, -1, 0, 1]
    assert SignGrad(step_opposite=False).signs(before, after).tolist() == [0, -1, 0, 0, -1, 0, 0]


def test_frozen_parameters_stay():
    net = network()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    swarm = SwarmOfOptimizers(net, adam, 3, gradients="backward", noise=0.1)
    run(swarm, lambda: (net(INPUT) - TARGET).square().mean(), 3)
    assert torch.equal(net[0].weight, before)
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to move"):
        SwarmOfOptimizers(net, adam, 3)


def test_half_precision():
    net = network().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be float32 or wider, got torch.bfloat16"):
        SwarmOfOptimizers(net, adam, 3)
    net = perturbed.convert(net, 3, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, 3)
    swarm = SwarmOfOptimizers(pm, lambda p: SGD(p, 1e-4))
    assert swarm.swarm.positions.dtype == torch.float32
    start = swarm.swarm.positions.clone()
    x = INPUT.to(torch.bfloat16)
    run(swarm, lambda: (pm(pm.replicate(x)).float() - TARGET).square().mean(1), 3)
    assert 0 < (swarm.swarm.positions - start).abs().max() < 1e-3  # below bfloat16's steps


def test_arguments():
    net = network()
    pm = perturbed.PerturbedModel(perturbed.convert(network(), 3, perturbed.Explicit()), 3)
    for options, message in [
        ({"die_after": -1}, "die_after must be at least 0"),
        ({"crossover_p": 1.5}, "crossover_p must be finite and at least 0 and at most 1"),
        ({"crossover": "x"}, "crossover must be one of"),
        ({"gravity_mode": "x"}, "gravity_mode must be one of"),
        ({"agg_mode": "x"}, "agg_mode must be one of"),
        ({"smoothing": 1}, "smoothing must be below 1"),
        ({"noise": -1.0}, "noise must be finite and at least 0"),
        ({"gradients": "x"}, "gradients must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            SwarmOfOptimizers(net, adam, 3, **options)
    for optimizer in (LBFGS, RandomGrad):
        with pytest.raises(ValueError, match="must work on single elements"):
            SwarmOfOptimizers(pm, optimizer)
    with pytest.raises(ValueError, match="gradients of a batch"):
        SwarmOfOptimizers(pm, adam, gradients="closure")
    with pytest.raises(TypeError, match="optimizers of a batch must be one function"):
        SwarmOfOptimizers(pm, [adam] * 3)
    with pytest.raises(TypeError, match="optimizers must be optimizers or functions"):
        SwarmOfOptimizers(net, lambda p: p, 3)
    with pytest.raises(ValueError, match="parameters of the model and no others"):
        SwarmOfOptimizers(net, lambda p: SGD(network().parameters(), 0.1), 3)
    with pytest.raises(ValueError, match="different objects"):
        SwarmOfOptimizers(net, [SGD(net.parameters(), 0.1)] * 3)
    with pytest.raises(TypeError, match="model must be a PerturbedModel"):
        SwarmOfOptimizers([torch.ones(2)], adam, 3)
    swarm, closure = batch()
    with pytest.raises(ValueError, match="can be differentiated"):
        swarm.step(lambda: closure().detach())
    with pytest.raises(RuntimeError, match="parameters are those of its model"):
        swarm.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    before = digest(swarm.state_dict())
    for state in ({}, one_by_one()[0].state_dict(), batch(members=3)[0].state_dict()):
        with pytest.raises(ValueError, match="state_dict"):
            swarm.load_state_dict(state)
        assert digest(swarm.state_dict()) == before
