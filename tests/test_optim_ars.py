"""ARS: the update against the paper's loop, what does not count, and resumed runs."""

import io
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed import ARS, Dense, PerturbedLinear, PerturbedModel
from perturbed.optim.ars import ars_weights
from perturbed.rl import CartPole, ObservationNorm, rollout
from perturbed.testing import devices

NAN, INF = math.nan, math.inf


def make(directions=8, antithetic=None, sigma=0.1, seed=0, noise=None, **options):
    """A linear policy with 3 x 4 weights and its ARS."""
    torch.manual_seed(1)
    layer = PerturbedLinear(4, 3, directions, noise=noise)
    pm = PerturbedModel(layer, directions, antithetic, sigma, seed)
    return pm, ARS(pm, **options)


def papers_update(returns, delta, top, lr):
    """What Mania et al. (2018), algorithm 1, add to the parameters: returns (2, N), to be raised.

    Args:
        returns: of W + nu delta and of W - nu delta.
        delta: (N, ...).
    """
    n = returns.shape[1]
    order = sorted(range(n), key=lambda k: -max(returns[0, k].item(), returns[1, k].item()))
    used = order[:top]
    rewards = [returns[s, k].item() for k in used for s in (0, 1)]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    step = torch.zeros_like(delta[0])
    for k in used:
        step += (returns[0, k] - returns[1, k]) * delta[k]
    return lr / (top * std) * step


# ---- the update --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("top", [None, 8, 3, 1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_step_is_the_papers(noise, top, scale):
    returns = scale * (torch.randn(2, 8) + 5)
    pm, ars = make(sigma=0.3, noise=Dense(noise), top=top, lr=0.05, maximize=True)
    layer = pm.model
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    ars.ask()
    want = {
        name: p + papers_update(returns, layer.parameter_noise(name, 0, 8), top or 8, 0.05)
        for name, p in before.items()
    }
    torch.testing.assert_close(ars.tell(returns), returns.mean())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter, want[name])


def test_losses_are_returns_with_the_other_sign():
    returns = torch.randn(2, 8)
    up, ascent = make(maximize=True, top=3)
    down, descent = make(top=3)
    for ars, values in ((ascent, returns), (descent, -returns)):
        ars.ask()
        ars.tell(values)
    assert torch.equal(up.model.weight, down.model.weight)
    assert ascent.stats["best"] == returns.max()
    assert descent.stats["best"] == (-returns).min()


def test_rows_are_averaged_per_member():
    rows = torch.randn(2, 5, 8)
    weights = []
    for values in (rows.flatten(), rows.mean(1)):
        pm, ars = make(top=4)
        ars.ask()
        ars.tell(values)
        weights.append(pm.model.weight)
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("top", [8, 3])
def test_weights_know_neither_offset_nor_scale(top):
    losses = torch.randn(2, 8, dtype=torch.float64)
    want = ars_weights(losses, top)
    assert (want != 0).sum() == top
    for scale, offset in ((1e-200, 0), (1e150, 0), (1e307, 0), (2.0**-3, 1024.0)):
        torch.testing.assert_close(ars_weights(scale * losses + offset, top), want)


def test_equal_directions_count_in_their_order():
    losses = torch.tensor([[1.0, 0.0, 0.0, 0.0, 5.0], [2.0, 1.0, 2.0, 3.0, 9.0]])
    assert (ars_weights(losses, 2) != 0).tolist() == [False, True, True, False, False]
    many = torch.zeros(2, 1000)
    many[1] = 1
    assert (ars_weights(many, 10) != 0).nonzero().flatten().tolist() == list(range(10))


# ---- what does not count -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("top", [2, 4])
def test_a_direction_with_a_lost_member_does_not_count(bad, maximize, top):
    returns = torch.tensor([[9.0, 2.0, 8.0, 4.0], [1.0, 7.0, 3.0, 6.0]])
    returns[1, 0] = bad  # its partner has the best return
    values = returns if maximize else -returns
    pm, ars = make(4, top=top, lr=0.1, maximize=maximize)
    before = pm.model.weight.detach().clone()
    ars.ask()
    delta = pm.model.parameter_noise("weight", 1, 3)
    ars.tell(values)
    update = papers_update(returns[:, 1:], delta, min(top, 3), 0.1)
    torch.testing.assert_close(pm.model.weight, before + update)
    assert ars.stats["nonfinite"] == 1
    assert ars.stats["best"] == (9.0 if maximize else -9.0)  # it is finite, though of no use here


@pytest.mark.parametrize(
    "losses",
    [
        torch.full((2, 4), NAN),
        torch.tensor([[1.0, INF, 2.0, NAN], [NAN, 1.0, -INF, 0.0]]),
        torch.ones(2, 4),
        torch.full((2, 4), 0.1),  # whose mean may not be 0.1
        torch.zeros(2, 4),
        torch.tensor([[NAN, 3.0, 3.0, 9.0], [0.0, 3.0, 3.0, 8.0]]),  # the two in use are equal
    ],
    ids=["nan", "one-of-each", "ones", "tenths", "zeros", "used"],
)
def test_without_a_difference_nothing_moves(losses):
    pm, ars = make(4, top=2)
    before = [p.detach().clone() for p in pm.model.parameters()]
    ars.ask()
    ars.tell(losses)
    for parameter, old in zip(pm.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert (parameter.grad == 0).all()
    ars.ask()
    ars.tell(torch.randn(2, 4))
    assert not torch.equal(pm.model.weight, before[0])


def test_a_pair_of_equal_losses_among_others_adds_nothing():
    weights = ars_weights(torch.tensor([[1.0, 4.0], [1.0, 2.0]]), 2)
    assert weights[0] == 0
    assert weights[1] > 0


@pytest.mark.parametrize("device", devices())
def test_nothing_waits_for_the_device(device):
    losses = torch.tensor([[3.0, NAN, 1.0, 0.5], [1.0, 2.0, INF, 0.5]])
    want = ars_weights(losses, 2)
    there = losses.to(device)
    if torch.device(device).type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = ars_weights(there, 2)
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), want)


# ---- options and errors ------------------------------------------------------------------------


def test_other_optimizers_and_their_schedulers():
    torch.manual_seed(0)
    layer = PerturbedLinear(4, 3, 8)
    pm = PerturbedModel(layer, 8, sigma=0.1)
    ars = ARS(pm, torch.optim.Adam(layer.parameters(), 0.1), top=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ars.optimizer, lambda step: float(step == 0))
    closure = lambda: pm(torch.ones(16, 4)).square().sum(1)  # noqa: E731
    before = layer.weight.detach().clone()
    ars.step(closure)
    assert not torch.equal(layer.weight, before)
    scheduler.step()
    before = layer.weight.detach().clone()
    ars.step(closure)
    assert torch.equal(layer.weight, before)


def test_sigma_schedule_and_step_decay():
    scales = []
    pm, ars = make(sigma_schedule=lambda step: 0.1 * 0.5**step, lr=0.5)
    decay = torch.optim.lr_scheduler.ExponentialLR(ars.optimizer, 0.5)
    lengths = []
    for _ in range(3):
        before = pm.model.weight.detach().clone()
        ars.step(lambda: scales.append(pm.sigma) or pm(torch.ones(16, 4)).sum(1))
        lengths.append((pm.model.weight - before).norm())
        decay.step()
    assert scales == [0.1, 0.05, 0.025]
    # delta has no sigma in it, and the losses' scale is divided out: only the rate decays.
    assert lengths[2] < 0.7 * lengths[0]


def test_arguments_are_checked():
    pm, ars = make(8)
    for bad in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"top must be between 1 and .* D = 8, got {bad}"):
            ARS(pm, top=bad)
    with pytest.raises(TypeError, match=r"top must be an int, got 2\.5"):
        ARS(pm, top=2.5)
    with pytest.raises(ValueError, match="lr must be None beside an optimizer"):
        ARS(pm, ars.optimizer, lr=0.1)
    with pytest.raises(ValueError, match="lr must be finite and greater than 0, got 0"):
        ARS(pm, lr=0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got float"):
        ARS(pm, 0.1)
    with pytest.raises(TypeError, match="normalizer must have state_dict"):
        ARS(pm, normalizer=object())
    with pytest.raises(TypeError, match="pm must be a PerturbedModel, got PerturbedLinear"):
        ARS(pm.model)


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="pm must have antithetic pairs"):
        make(8, antithetic=False)
    _, ars = make(8)
    for single in (torch.zeros(8), torch.zeros(1, 8)):
        ars.ask()
        with pytest.raises(ValueError, match="values must be of antithetic pairs"):
            ars.tell(single)
    ars.tell(torch.zeros(2, 8))  # the population is still there


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 4], ids=["V1", "V1-t"])
def test_a_linear_quadratic_regulator_is_stabilised(top):
    """Three coupled integrators (Dean et al., 2017); the unsteered system diverges."""
    a = torch.tensor([[1.01, 0.01, 0.0], [0.01, 1.01, 0.01], [0.0, 0.01, 1.01]])

    def cost(policy, state):
        """Mean over 30 steps of what states and actions cost, for each row."""
        total = torch.zeros(len(state))
        for _ in range(30):
            action = policy(state)
            total += 0.1 * state.square().sum(1) + action.square().sum(1)
            state = state @ a.T + action
        return total / 30

    policy = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(policy.weight)
    starts = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    untrained = cost(policy, starts).mean()
    pm = PerturbedModel(perturbed.convert(policy, directions=8), 8, sigma=0.02)
    ars = ARS(pm, top=top, lr=0.03)
    decay = torch.optim.lr_scheduler.ExponentialLR(ars.optimizer, 0.97)
    # Every member steers from the same starts; rows as pm.replicate lays them out.
    rows = starts.repeat_interleave(8, 0).repeat(2, 1)
    for _ in range(80):
        ars.step(lambda: cost(pm, rows))
        decay.step()
    # The best that a linear policy can do, by gradient descent through the simulation.
    exact = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(exact.weight)
    adam = torch.optim.Adam(exact.parameters(), 0.02)
    for _ in range(150):
        adam.zero_grad()
        cost(exact, starts).mean().backward()
        adam.step()
    trained, best = cost(policy, starts).mean(), cost(exact, starts).mean()
    assert trained < 1.05 * best < 0.1 * untrained


@pytest.mark.parametrize(("top", "normalise"), [(None, False), (4, True)], ids=["V1", "V2-t"])
def test_it_balances_the_pole(top, normalise):
    policy = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(policy.weight)
    pm = PerturbedModel(perturbed.convert(policy, directions=8), 8, True, sigma=0.1)
    norm = ObservationNorm(4) if normalise else None
    ars = ARS(pm, top=top, lr=0.1, maximize=True, normalizer=norm)
    env = CartPole(lanes=16)
    returns = []
    while len(returns) < 15 and max(returns, default=0) < 400:  # 500 is the most there is
        returns.append(ars.step(lambda: rollout(pm, env, norm=norm).returns).item())
    assert returns[0] < 100 < 400 < returns[-1]
    if norm is not None:  # every observation of every member, once
        assert norm.count > 16 * sum(returns) * 0.99


# ---- resumed runs ------------------------------------------------------------------------------


def fresh_run(seed):
    torch.manual_seed(seed)
    policy = perturbed.convert(nn.Linear(4, 2, bias=False), directions=6)
    pm = PerturbedModel(policy, 6, sigma=0.1, seed=seed)
    ars = ARS(
        pm,
        top=3,
        lr=0.1,
        maximize=True,
        sigma_schedule=lambda step: 0.1 / (1 + step),
        reuse=3,
        normalizer=ObservationNorm(4),
    )
    return pm, ars, torch.optim.lr_scheduler.StepLR(ars.optimizer, 2, gamma=0.5)


def observe(norm, x):
    """Normalise as the closure of a policy would, counting the observations."""
    norm.update(x)
    norm.sync()
    return norm(x)


def advance(run, first, count):
    pm, ars, scheduler = run
    for step in range(first, first + count):
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(step))
        ars.step(lambda x=x: -pm(observe(ars.normalizer, x)).square().sum(1))
        scheduler.step()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    straight = fresh_run(3)
    advance(straight, 0, 10)
    stopped = fresh_run(3)
    advance(stopped, 0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = fresh_run(99)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    advance(resumed, 5, 5)
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight[1].stats == resumed[1].stats
    assert torch.equal(straight[1].normalizer.mean, resumed[1].normalizer.mean)


def test_a_closure_that_raises_leaves_no_trace_in_the_normalizer():
    run = fresh_run(3)
    advance(run, 0, 2)
    pm, ars, _ = run
    state = ars.state_dict()
    mean = ars.normalizer.mean.clone()

    def fail():
        pm(observe(ars.normalizer, torch.ones(24, 4)))
        raise OSError("the simulator is gone")

    with pytest.raises(OSError, match="the simulator"):
        ars.step(fail)
    assert torch.equal(ars.normalizer.mean, mean)
    assert ars.normalizer.count == 2 * 24
    assert pm.get_extra_state() == state["noise"]


def test_a_state_in_memory_is_not_changed_by_further_steps():
    run = fresh_run(3)
    advance(run, 0, 2)
    pm, ars, _ = run
    state, weights = ars.state_dict(), pm.model.weight.detach().clone()
    advance(run, 2, 2)
    after = pm.model.weight.detach().clone()
    with torch.no_grad():
        pm.model.weight.copy_(weights)
    ars.load_state_dict(state)
    advance(run, 2, 2)
    assert torch.equal(pm.model.weight, after)


def test_a_state_without_the_normalizer_is_refused():
    _, ars, _ = fresh_run(3)
    state = ars.state_dict()
    del state["normalizer"]
    with pytest.raises(ValueError, match="state must have the entries"):
        ars.load_state_dict(state)
