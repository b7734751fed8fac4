"""Noise reuse: when the draw moves on, what stays exact, and what it is for."""

import pytest
import torch
from torch import nn

import perturbed
from perturbed import ARS, NES, LowRank, PerturbedLinear, PerturbedModel

both = pytest.mark.parametrize("kind", [NES, ARS])


def make(kind, reuse, seed=0, noise=None, **options):
    torch.manual_seed(1)
    layer = PerturbedLinear(4, 3, 8, noise=noise)
    pm = PerturbedModel(layer, 8, sigma=0.1, seed=seed)
    return pm, kind(pm, torch.optim.SGD(layer.parameters(), lr=0.1), reuse=reuse, **options)


def advance(pm, strategy, steps):
    """Take steps; return the generation and the noise of each."""
    seen = []
    for _ in range(steps):

        def closure():
            seen.append(
                (pm.get_extra_state()["generation"], pm.model.parameter_noise("weight", 0, 8))
            )
            return pm(torch.ones(16, 4)).square().sum(1)

        strategy.step(closure)
    return seen


@both
@pytest.mark.parametrize("reuse", [1, 2, 3])
def test_the_draw_moves_on_every_k_steps(kind, reuse):
    pm, strategy = make(kind, reuse)
    weights = []
    seen = []
    for _ in range(7):
        weights.append(pm.model.weight.detach().clone())
        seen += advance(pm, strategy, 1)
    assert [generation for generation, _ in seen] == [step // reuse for step in range(7)]
    for step in range(1, 7):
        assert torch.equal(seen[step][1], seen[step - 1][1]) == (step % reuse != 0)
        assert not torch.equal(weights[step], weights[step - 1])  # parameters move all the time


@both
def test_held_noise_stays_held(kind):
    pm, strategy = make(kind, 2, noise=perturbed.Dense(storage="stored"))
    advance(pm, strategy, 1)
    held = {word: noise.data_ptr() for word, noise in pm.state.held.items()}
    assert held
    advance(pm, strategy, 1)
    assert {word: noise.data_ptr() for word, noise in pm.state.held.items()} == held


@both
def test_sigma_may_change_while_the_random_numbers_stay(kind):
    scales = []
    pm, strategy = make(kind, 4, sigma_schedule=lambda step: 0.1 * 0.5**step)
    for _ in range(3):
        strategy.step(lambda: scales.append(pm.sigma) or pm(torch.ones(16, 4)).sum(1))
    assert scales == [0.1, 0.05, 0.025]
    assert pm.get_extra_state()["generation"] == 0


@both
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_closure_that_raises_does_not_count(kind, failing):
    pm, strategy = make(kind, 3)
    want = advance(*make(kind, 3), 6)
    seen = advance(pm, strategy, failing)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            strategy.step(lambda: 1 / 0)
    seen += advance(pm, strategy, 6 - failing)
    for (a, x), (b, y) in zip(seen, want, strict=True):
        assert a == b
        assert torch.equal(x, y)


@both
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_resumed_between_draws_is_the_uninterrupted_one(kind, stop):
    pm, strategy = make(kind, 3)
    advance(pm, strategy, 8)
    stopped, before = make(kind, 3)
    advance(stopped, before, stop)
    again, resumed = make(kind, 3, seed=9)
    again.load_state_dict(stopped.state_dict())
    resumed.load_state_dict(before.state_dict())
    advance(again, resumed, 8 - stop)
    assert torch.equal(again.model.weight, pm.model.weight)


def test_a_new_seed_draws_at_once():
    pm, nes = make(NES, 10)
    first = advance(pm, nes, 2)
    pm.set_seed(5)
    (generation, noise), *_ = advance(pm, nes, 1)
    assert generation == 0
    assert not torch.equal(noise, first[0][1])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="reuse must be at least 1, got 0"):
        make(NES, 0)
    with pytest.raises(TypeError, match=r"reuse must be an int, got 2\.0"):
        make(ARS, 2.0)
    layer = PerturbedLinear(4, 3, 8, noise=perturbed.Explicit())
    with pytest.raises(ValueError, match="pm must have layers with noise"):
        NES(PerturbedModel(layer, 8), torch.optim.SGD(layer.parameters(), 0.1))


@pytest.mark.parametrize("noise", [None, LowRank(1)], ids=["dense", "low-rank"])
def test_windows_of_an_episode_add_up_to_it(noise):
    """With a rate of 0, K windows with the same noise are the whole episode, scored at once."""
    horizon, reuse = 12, 3
    push = torch.randn(horizon, 4, generator=torch.Generator().manual_seed(0))

    def play(pm, state, first, count):
        loss = torch.zeros(16)
        for t in range(first, first + count):
            state = torch.tanh(state + pm(state) + push[t])
            loss += state.square().sum(1)
        return loss, state

    def make_one(reuse):
        torch.manual_seed(1)
        policy = perturbed.convert(nn.Linear(4, 4), directions=8, noise=noise)
        pm = PerturbedModel(policy, 8, sigma=0.1)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        return pm, NES(pm, optimizer, shaping="identity", reuse=reuse)

    pm, nes = make_one(1)
    nes.step(lambda: play(pm, torch.zeros(16, 4), 0, horizon)[0])
    whole = pm.model.weight.grad.clone()

    pm, nes = make_one(reuse)
    windows, total, state = horizon // reuse, torch.zeros_like(whole), None
    for _ in range(reuse):
        if nes.steps % nes.reuse == 0:
            state = torch.zeros(16, 4)
        first = nes.steps % nes.reuse * windows

        def closure(state=state, first=first):
            closure.loss, closure.state = play(pm, state, first, windows)
            return closure.loss

        nes.step(closure)
        state = closure.state
        total += pm.model.weight.grad
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-4)
