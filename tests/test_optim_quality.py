"""The quality of an estimate: its formulae, chance, and that training does not notice it."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn

import perturbed
from perturbed import ARS, NES, EstimateQuality, PerturbedModel, estimate_quality
from perturbed.optim.quality import _measure

NAN = math.nan


def make(directions=8, antithetic=True, noise=None, size=(6, 5), kind=NES, lr=0.1, **options):
    """A linear layer without bias and its optimizer."""
    net = perturbed.convert(nn.Linear(*size, bias=False), directions, noise or perturbed.Dense())
    pm = PerturbedModel(net, directions, antithetic, sigma=0.1, seed=3)
    return pm, kind(pm, torch.optim.SGD(net.parameters(), lr), **options)


# ---- the formulae ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NES, ARS])
@pytest.mark.parametrize("directions", [2, 7, 8])
def test_numbers_are_those_of_materialised_halves(kind, directions):
    pm, optimizer = make(directions, kind=kind)
    values = torch.randn(2, directions)
    optimizer.ask()
    noise = 0.1 * pm.model.parameter_noise("weight", 0, directions).double().flatten(1)
    optimizer.tell(values)
    weights = optimizer._estimated[0].double()
    torch.testing.assert_close(
        (weights @ noise).float(), pm.model.weight.grad.flatten(), rtol=1e-4, atol=1e-5
    )
    n_a, n_b = directions // 2, directions - directions // 2
    a, b = weights[:n_a] @ noise[:n_a], weights[n_a:] @ noise[n_a:]
    signal = directions**2 * (a / n_a) @ (b / n_b)
    spread = n_a * n_b * (a / n_a - b / n_b).square().sum()
    found = estimate_quality(optimizer)
    assert found["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert found["snr"] == pytest.approx(float(signal / spread), rel=1e-4, abs=1e-5)
    assert found["chance"] == 30**-0.5


@pytest.mark.parametrize(("distribution", "more"), [("normal", 1), ("rademacher", -1)])
@pytest.mark.parametrize("directions", [15, 16])
def test_signal_and_noise_of_a_linear_loss_are_those_of_theory(directions, distribution, more):
    """A pair gives (g . eps) eps: its mean is g, the trace of its covariance (N +- 1) |g|^2."""
    n, draws = 30, 400
    pm, nes = make(directions, noise=perturbed.Dense(distribution), shaping="identity", lr=0.0)
    g, x = torch.randn(5), torch.randn(6)
    square = float(torch.outer(g, x).square().sum())
    rows = pm.replicate(x[None])
    log = EstimateQuality(every=1, average=draws)
    log.open(nes)
    found = []
    for step in range(1, draws + 1):
        nes.step(lambda: pm(rows) @ g)
        record = {"step": step}
        log(record)
        found.append(_measure(nes))
    for name, want in (("signal", square), ("noise", (n + more) * square / directions)):
        values = [getattr(f, name) for f in found]
        error = statistics.stdev(values) / math.sqrt(draws)
        assert error < 0.1 * want
        assert abs(statistics.mean(values) - want) < 5 * error
    assert record["snr"] == pytest.approx(
        sum(f.signal for f in found) / sum(f.noise for f in found), rel=1e-9
    )


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(
    "noise", [perturbed.Dense("rademacher"), perturbed.LowRank(1), perturbed.Sparse(0.5)], ids=repr
)
def test_losses_without_meaning_have_a_cosine_of_chance(noise, antithetic):
    draws, signs = 300, 1 + antithetic
    _, nes = make(32, antithetic, noise, size=(20, 20), lr=0.0)
    cosines = []
    for _ in range(draws):
        nes.ask()
        nes.tell(torch.randn(signs, 32))
        cosines.append(estimate_quality(nes)["cosine"])
    chance = estimate_quality(nes)["chance"]
    assert chance == 1 / 20
    assert abs(statistics.mean(cosines)) < 5 * chance / math.sqrt(draws)
    assert statistics.pstdev(cosines) == pytest.approx(chance, rel=5 / math.sqrt(2 * draws))


def test_more_directions_give_a_better_estimate():
    ratios = []
    for d in (8, 64, 512):
        pm, nes = make(d, size=(20, 20), lr=0.0)
        x = pm.replicate(torch.ones(1, 20))
        log = EstimateQuality(every=1)
        log.open(nes)
        for step in range(20):
            nes.step(lambda pm=pm, x=x: pm(x).sum(1))
            record = {"step": step}
            log(record)
        ratios.append(record["snr"])
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(512 / 401, rel=0.3)  # ranks lose a little


# ---- it only looks -----------------------------------------------------------------------------


def train(measured, reuse=1, **options):
    torch.manual_seed(0)
    storage = options.pop("storage", "regenerate")
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    perturbed.convert(net, 8, perturbed.Dense(storage=storage))
    pm = PerturbedModel(net, 8, sigma=0.1)
    nes = NES(pm, torch.optim.Adam(net.parameters(), 0.05), reuse=reuse, **options)
    x = torch.randn(5, 6)
    log = [EstimateQuality(every=2)] if measured else []

    def closure():
        return (pm(pm.replicate(x)) - 1).square().mean(1)

    records = list(perturbed.train(nes, closure, steps=8, log=log))
    return net, nes, records


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 3}, {"storage": "stored"}, {"reuse": 3}, {"weight_decay": 0.1}],
    ids=str,
)
def test_training_is_the_same_bit_for_bit(options):
    (one, nes, records), (other, blind, _) = train(True, **options), train(False, **options)
    assert [("snr" in r) for r in records] == [False, True] * 4
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert nes.pm.get_extra_state() == blind.pm.get_extra_state()
    assert nes.stats == blind.stats


def test_gradients_are_the_same_tensors():
    pm, nes = make()
    nes.step(lambda: pm(torch.randn(16, 6)).sum(1))
    grad, before = pm.model.weight.grad, pm.model.weight.grad.clone()
    random = torch.get_rng_state()
    first = estimate_quality(nes)
    assert pm.model.weight.grad is grad
    assert torch.equal(grad, before)
    assert torch.equal(torch.get_rng_state(), random)
    pm.model.weight.grad = None  # as zero_grad does
    assert estimate_quality(nes) == first
    assert pm.model.weight.grad is None
    assert pm.directions == 8


def test_chunks_do_not_change_the_numbers():
    whole, parts = train(True)[2][1::2], train(True, chunk=3)[2][1::2]
    for a, b in zip(whole, parts, strict=True):
        assert a["cosine"] == pytest.approx(b["cosine"], abs=1e-4)
        assert a["snr"] == pytest.approx(b["snr"], rel=1e-3)


# ---- losses that are not finite, and what is refused ------------------------------------------


def test_a_step_without_any_finite_loss_has_no_quality_and_leaves_the_average():
    _, nes = make()
    log = EstimateQuality(every=1)
    log.open(nes)

    def measure(values):
        nes.ask()
        nes.tell(values)
        record = {"step": nes.steps}
        log(record)
        return record

    before = measure(torch.randn(2, 8))
    nothing = measure(torch.full((2, 8), NAN))
    assert math.isnan(nothing["cosine"])
    assert math.isnan(estimate_quality(nes)["snr"])
    assert nothing["snr"] == pytest.approx(before["snr"])  # neither signal nor noise came
    partly = torch.randn(2, 8)
    partly[0, 3] = NAN
    assert math.isfinite(measure(partly)["cosine"])


def test_averages_go_on_from_a_state():
    pm, nes = make()
    x = torch.randn(16, 6)
    whole, first = EstimateQuality(every=1), EstimateQuality(every=1)
    whole.open(nes)
    first.open(nes)
    for step in range(6):
        nes.step(lambda: pm(x).square().sum(1))
        if step == 3:
            second = EstimateQuality(every=1)
            second.open(nes)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first = second
        one, other = {"step": step}, {"step": step}
        whole(one)
        first(other)
        assert one == other


def test_what_has_no_estimate_is_refused():
    pm, nes = make()
    with pytest.raises(RuntimeError, match=r"no estimate yet; call step\(\) first"):
        estimate_quality(nes)
    nes.step(lambda: pm(torch.ones(16, 6)).sum(1))
    nes.ask()
    with pytest.raises(RuntimeError, match="noise of the last estimate is gone"):
        estimate_quality(nes)
    pso = perturbed.PSO(nn.Linear(2, 1), particles=3)
    with pytest.raises(TypeError, match=r"\(NES, ARS\), got PSO"):
        estimate_quality(pso)
    with pytest.raises(TypeError, match=r"\(NES, ARS\), got PSO"):
        EstimateQuality().open(pso)
    with pytest.raises(ValueError, match="at least 2 directions"):
        EstimateQuality().open(make(1)[1])
    with pytest.raises(RuntimeError, match=r"call open\(optimizer\) first"):
        EstimateQuality()({"step": 50})


@pytest.mark.parametrize("name", ["every", "average"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EstimateQuality(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got 1.5"):
        EstimateQuality(**{name: 1.5})
