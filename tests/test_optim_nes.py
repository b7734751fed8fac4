"""NES: the estimate against exact gradients, the bookkeeping around it, and resumed runs."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed import NES, Dense, PerturbedLinear, PerturbedModel
from perturbed.optim import SHAPINGS

NAN, INF = math.nan, math.inf


def make(directions=8, antithetic=None, sigma=0.1, seed=0, noise=None, **options):
    """A linear model with 3 x 4 weights, its NES on plain gradient descent."""
    torch.manual_seed(1)
    layer = PerturbedLinear(4, 3, directions, noise=noise)
    pm = PerturbedModel(layer, directions, antithetic, sigma, seed)
    return pm, NES(pm, torch.optim.SGD(layer.parameters(), lr=0.1), **options)


def snapshot(pm):
    return [p.detach().clone() for p in pm.model.parameters()]


def unchanged(pm, before):
    return all(torch.equal(a, b) for a, b in zip(pm.model.parameters(), before, strict=True))


# ---- the estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize("shaping", sorted(SHAPINGS))
def test_gradient_is_the_formula_with_materialised_noise(noise, signs, shaping):
    d, sigma = 8, 0.3
    pm, nes = make(d, signs == 2, sigma, noise=Dense(noise), shaping=shaping)
    values = torch.randn(signs, d)
    nes.ask()
    layer = pm.model
    want = {}
    for name in ("weight", "bias"):
        eps = layer.parameter_noise(name, 0, d)
        u = SHAPINGS[shaping](values)
        want[name] = sum(
            sign * u[s, j] * eps[j]
            for (s, sign), j in itertools.product(enumerate((1, -1)[:signs]), range(d))
        ) / (signs * d * sigma)
    nes.tell(values)
    torch.testing.assert_close(layer.weight.grad, want["weight"])
    torch.testing.assert_close(layer.bias.grad, want["bias"])


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_estimate_is_unbiased_for_the_gradient_of_a_quadratic(noise):
    d = 20_000
    pm, nes = make(d, True, 0.2, noise=Dense(noise), shaping="identity")
    x, target = torch.randn(4), torch.randn(3)
    layer = pm.model
    exact = torch.autograd.grad(0.5 * (layer(x) - target).square().sum(), layer.parameters())
    nes.step(lambda: 0.5 * (pm(x.expand(2 * d, 4)) - target).square().sum(1))
    # A pair contributes (g . eps) eps; its elements vary by |g|^2 + g_i^2, less for signs.
    norm = sum(g.square().sum() for g in exact)
    for parameter, g in zip(layer.parameters(), exact, strict=True):
        z = (parameter.grad - g) / ((norm + g.square()) / d).sqrt()
        assert z.abs().max() < 5
        assert (parameter.grad - g).norm() < 0.1 * g.norm()


def test_unpaired_estimate_is_unbiased_too():
    d = 20_000
    pm, nes = make(d, False, 0.2, shaping="identity")
    x, c = torch.randn(4), torch.randn(3)
    layer = pm.model
    exact = torch.outer(c, x)
    nes.step(lambda: pm(x.expand(d, 4)) @ c)
    loss = (layer(x) @ c).item()
    # L eps / sigma: the loss itself is part of the variance.
    bound = 5 * math.sqrt(((loss / 0.2) ** 2 + 2 * float(exact.square().sum() + c @ c)) / d)
    assert (layer.weight.grad - exact).abs().max() < bound
    assert (layer.bias.grad - c).abs().max() < bound


@pytest.mark.parametrize("shaping", ["centered_rank", "nes_utilities", "zscore"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_training_lowers_the_loss(shaping, antithetic):
    net = perturbed.convert(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), directions=32
    )
    pm = PerturbedModel(net, 32, antithetic, sigma=0.1)
    nes = NES(pm, torch.optim.Adam(net.parameters(), 0.05), shaping)
    x = torch.randn(16, 6)
    y = x[:, :1] * x[:, 1:2]
    rows = pm.replicate(x)
    targets = y.repeat_interleave(32, 0).repeat(pm.signs, 1)
    before = (net(x) - y).square().mean()
    for _ in range(60):
        nes.step(lambda: (pm(rows) - targets).square().squeeze(1))
    assert (net(x) - y).square().mean() < 0.5 * before


# ---- values ------------------------------------------------------------------------------------


def test_rows_are_averaged_per_member():
    d, n = 8, 3
    rows = torch.randn(2, n, d)
    grads = []
    for values in (rows.flatten(), rows.mean(1), rows.mean(1).numpy()):
        pm, nes = make(d, shaping="identity")
        nes.ask()
        mean = nes.tell(values)
        torch.testing.assert_close(mean, rows.mean())
        grads.append(pm.model.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_values_of_other_types_are_converted(dtype):
    values = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).to(dtype)
    pm, nes = make(4, shaping="identity")
    nes.ask()
    assert nes.tell(values) == 0.5
    other, reference = make(4, shaping="identity")
    reference.ask()
    reference.tell(values.float())
    assert torch.equal(pm.model.weight, other.model.weight)


def test_half_precision_rows_are_averaged_in_float():
    _, nes = make(2)
    nes.ask()
    mean = nes.tell(torch.full((2 * 64 * 2,), 60000.0, dtype=torch.float16))
    assert mean == 60000
    assert nes.stats["nonfinite"] == 0


def test_maximize_flips_the_sign_once():
    values = torch.randn(2, 8)
    down, nes = make()
    nes.ask()
    nes.tell(values)
    up, ascent = make(maximize=True)
    ascent.ask()
    assert torch.equal(ascent.tell(-values), -values.mean())
    assert torch.equal(down.model.weight, up.model.weight)
    assert nes.stats["best"] == values.min()
    assert ascent.stats["best"] == (-values).max()


def test_maximize_climbs():
    pm, nes = make(32, maximize=True, shaping="zscore")
    first = nes.step(lambda: pm(torch.ones(64, 4)).sum(1))
    for _ in range(20):
        last = nes.step(lambda: pm(torch.ones(64, 4)).sum(1))
    assert last > first + 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shaping", [*sorted(SHAPINGS), lambda losses: losses.square()])
def test_lost_members_never_win_and_never_poison(bad, maximize, shaping):
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]])
    values[0, 1] = bad
    pm, nes = make(4, shaping=shaping, maximize=maximize)
    nes.ask()
    mean = nes.tell(values)
    assert mean == (values.nansum() if bad is NAN else values[values.isfinite()].sum()) / 7
    assert all(p.isfinite().all() for p in pm.model.parameters())
    assert nes.stats["nonfinite"] == 1
    assert nes.stats["best"] == (8 if maximize else 1)
    # The lost member counts as the worst: as if it had scored far beyond everybody's.
    if shaping in ("centered_rank", "nes_utilities"):
        other, reference = make(4, shaping=shaping, maximize=maximize)
        values[0, 1] = -1e3 if maximize else 1e3
        reference.ask()
        reference.tell(values)
        assert torch.equal(pm.model.weight, other.model.weight)


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("shaping", sorted(SHAPINGS))
def test_a_generation_without_any_finite_loss_moves_nothing(bad, shaping):
    pm, nes = make(shaping=shaping)
    before = snapshot(pm)
    nes.ask()
    assert nes.tell(torch.full((16,), bad)).isnan()
    assert unchanged(pm, before)
    assert (pm.model.weight.grad == 0).all()
    assert nes.stats["nonfinite"] == nes.stats["nonfinite_total"] == 16
    nes.ask()
    nes.tell(torch.randn(16))
    assert nes.stats["nonfinite"] == 0
    assert nes.stats["nonfinite_total"] == 16


def test_one_bad_row_loses_its_member():
    _, nes = make(4)
    rows = torch.zeros(2, 3, 4)
    rows[1, 2, 3] = NAN
    nes.ask()
    nes.tell(rows.flatten())
    assert nes.stats["nonfinite"] == 1


# ---- options -----------------------------------------------------------------------------------


def test_weight_decay_adds_to_the_estimate():
    values = torch.randn(2, 8)
    plain, nes = make()
    nes.ask()
    nes.tell(values)
    pm, decayed = make(weight_decay=0.25)
    before = snapshot(pm)
    decayed.ask()
    decayed.tell(values)
    for p, q, theta in zip(pm.model.parameters(), plain.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, q.grad + 0.25 * theta)


def test_sigma_schedule_sets_the_scale_of_each_step():
    asked, scales = [], []

    def schedule(step):
        asked.append(step)
        return 0.1 * 0.5**step

    pm, nes = make(sigma_schedule=schedule)
    for _ in range(3):
        nes.step(lambda: scales.append(pm.sigma) or pm(torch.ones(16, 4)).sum(1))
    assert asked == [0, 1, 2]
    assert scales == [0.1, 0.05, 0.025]


def test_schedulers_drive_the_learning_rate():
    pm, nes = make()
    scheduler = torch.optim.lr_scheduler.StepLR(nes.optimizer, 1, gamma=0.0)
    nes.step(lambda: pm(torch.ones(16, 4)).sum(1))
    scheduler.step()
    before = snapshot(pm)
    nes.step(lambda: pm(torch.ones(16, 4)).sum(1))
    assert unchanged(pm, before)


def test_frozen_parameters_and_foreign_gradients_are_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    perturbed.convert(net, directions=8, exclude=nn.LayerNorm)
    pm = PerturbedModel(net, 8)
    nes = NES(pm, torch.optim.SGD(net.parameters(), 0.1), weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    nes.step(lambda: pm(torch.randn(16, 4)).sum(1))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "2.weight", "2.bias"}


def test_stats_count_steps_and_evaluations():
    _, nes = make(8)
    assert nes.stats["steps"] == nes.stats["evaluations"] == 0
    assert math.isnan(nes.stats["mean"])
    for _ in range(3):
        nes.ask()
        mean = nes.tell(torch.arange(16.0).view(2, 8))
    assert mean.shape == ()
    assert nes.stats == {
        "steps": 3,
        "evaluations": 48,
        "mean": 7.5,
        "best": 0.0,
        "nonfinite": 0,
        "nonfinite_total": 0,
    }


def test_gradients_are_not_recorded_in_a_step():
    pm, nes = make()
    recorded = []

    def closure():
        y = pm(torch.ones(16, 4))
        recorded.append(y.requires_grad)
        return y.sum(1)

    assert not nes.step(closure).requires_grad
    assert recorded == [False]
    nes.ask()
    assert not nes.tell(pm(torch.ones(16, 4)).sum(1)).requires_grad  # told with a graph attached


# ---- errors ------------------------------------------------------------------------------------


class BoomError(Exception):
    pass


def test_a_closure_that_raises_leaves_no_trace():
    pm, nes = make()
    closure = lambda: pm(torch.ones(16, 4)).sum(1)  # noqa: E731
    nes.step(closure)
    before, draw = snapshot(pm), pm.get_extra_state()

    def fail():
        with pm.perturbed():
            raise BoomError

    with pytest.raises(BoomError):
        nes.step(fail)
    with pytest.raises(ValueError, match="values must be one per row"):
        nes.step(lambda: torch.zeros(3))
    assert pm.get_extra_state() == draw
    assert unchanged(pm, before)
    assert torch.equal(pm.model(torch.ones(2, 4))[0], pm.model(torch.ones(2, 4))[1])  # no noise
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        nes.tell(torch.zeros(16))
    nes.step(closure)
    other, reference = make()
    for _ in range(2):
        reference.step(lambda: other(torch.ones(16, 4)).sum(1))
    assert torch.equal(pm.model.weight, other.model.weight)


def test_tell_needs_an_ask_each_time():
    _, nes = make()
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        nes.tell(torch.zeros(16))
    nes.ask()
    nes.tell(torch.zeros(16))
    with pytest.raises(RuntimeError, match=r"call ask\(\) first"):
        nes.tell(torch.zeros(16))


@pytest.mark.parametrize(
    ("antithetic", "shape"),
    [
        (None, (7,)),
        (None, (0,)),
        (None, ()),
        (None, (3, 8)),
        (None, (8, 2)),
        (None, (16, 3)),
        (True, (1, 8)),
        (True, (8,)),
        (True, (24,)),
        (None, (24,)),
        (False, (2, 8)),
    ],
    ids=str,
)
def test_a_wrong_number_of_values_is_refused(antithetic, shape):
    pm, nes = make(8, antithetic)
    nes.ask()
    before = snapshot(pm)
    with pytest.raises(ValueError, match=r"D = 8"):
        nes.tell(torch.zeros(shape))
    assert unchanged(pm, before)
    nes.tell(torch.zeros(1 if antithetic is False else 2, 8))  # the population is still there


@pytest.mark.parametrize(
    "values", [torch.zeros(16, dtype=torch.complex64), "losses", None, [None] * 16]
)
def test_values_that_are_no_numbers_are_refused(values):
    _, nes = make()
    nes.ask()
    with pytest.raises(TypeError, match="values must be"):
        nes.tell(values)


def test_sigma_zero_is_refused():
    pm, nes = make(sigma=0.0)
    with pytest.raises(ValueError, match="sigma must be greater than 0"):
        nes.ask()
    assert pm.get_extra_state()["generation"] == -1
    pm, nes = make()
    nes.ask()
    pm.set_noise_scale(0)
    with pytest.raises(ValueError, match="sigma must be greater than 0"):
        nes.tell(torch.zeros(16))
    for bad in (0, -1.0, NAN):
        pm, nes = make(sigma_schedule=lambda step, bad=bad: bad)
        with pytest.raises(ValueError, match="sigma must be"):
            nes.ask()


def test_arguments_are_checked():
    pm, nes = make()
    optimizer = nes.optimizer
    with pytest.raises(TypeError, match="pm must be a PerturbedModel, got PerturbedLinear"):
        NES(pm.model, optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got float"):
        NES(pm, 0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters that the model perturbs"):
        NES(pm, torch.optim.SGD(nn.Linear(4, 3).parameters(), 0.1))
    with pytest.raises(ValueError, match="shaping must be one of"):
        NES(pm, optimizer, "ranks")
    with pytest.raises(TypeError, match="maximize must be True or False, got 1"):
        NES(pm, optimizer, maximize=1)
    with pytest.raises(TypeError, match="sigma_schedule must be a function"):
        NES(pm, optimizer, sigma_schedule=0.1)
    with pytest.raises(ValueError, match=r"weight_decay must be finite and at least 0, got -0\.1"):
        NES(pm, optimizer, weight_decay=-0.1)
    with pytest.raises(TypeError, match="weight_decay must be a number, got '1'"):
        NES(pm, optimizer, weight_decay="1")


# ---- resumed runs ------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def fresh_run(name, weights_seed):
    torch.manual_seed(weights_seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    pm = PerturbedModel(perturbed.convert(net, directions=6), 6, sigma=0.1, seed=weights_seed)
    nes = NES(pm, OPTIMIZERS[name](net.parameters()), sigma_schedule=lambda step: 0.1 / (1 + step))
    scheduler = torch.optim.lr_scheduler.StepLR(nes.optimizer, 2, gamma=0.5)
    return pm, nes, scheduler


def advance(run, first, count):
    pm, nes, scheduler = run
    for step in range(first, first + count):
        x = torch.randn(24, 5, generator=torch.Generator().manual_seed(step))
        nes.step(lambda x=x: pm(x).square().sum(1))
        scheduler.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name):
    straight = fresh_run(name, 3)
    advance(straight, 0, 10)
    stopped = fresh_run(name, 3)
    advance(stopped, 0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    del stopped
    file.seek(0)
    resumed = fresh_run(name, 99)  # other weights and another seed, all to be overwritten
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    advance(resumed, 5, 5)
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight[1].stats == resumed[1].stats


def test_a_run_saved_between_ask_and_tell_resumes_there():
    values = torch.randn(2, 8)
    pm, nes = make()
    nes.ask()
    state, weights = nes.state_dict(), copy.deepcopy(pm.model.state_dict())
    nes.tell(values)
    again, resumed = make(seed=5)
    again.model.load_state_dict(weights)  # the draw comes with the state of NES
    resumed.load_state_dict(state)
    resumed.tell(values)
    assert torch.equal(pm.model.weight, again.model.weight)


def test_load_state_dict_refuses_what_is_no_state():
    _, nes = make()
    with pytest.raises(TypeError, match=r"state must be a dict from NES\.state_dict, got list"):
        nes.load_state_dict([])
    with pytest.raises(ValueError, match="state must have the entries"):
        nes.load_state_dict({"optimizer": {}})


@pytest.mark.parametrize("part", ["stats", "noise", "optimizer"])
def test_a_state_with_a_damaged_part_is_refused_and_changes_nothing(part):
    _, nes = make()
    before, state = copy.deepcopy(nes.state_dict()), copy.deepcopy(nes.state_dict())
    state["stats"]["steps"] = state["noise"]["generation"] = 7
    for damaged in (
        *({n: v for n, v in state[part].items() if n != lost} for lost in state[part]),
        {},
    ):
        with pytest.raises(ValueError, match=rf"state\['{part}'\] must have the entries"):
            nes.load_state_dict({**state, part: damaged})
        assert nes.state_dict() == before
    with pytest.raises(TypeError, match=rf"state\['{part}'\] must be a dict, got NoneType"):
        nes.load_state_dict({**state, part: None})
    with pytest.raises(ValueError, match="estimate must be one of"):
        nes.load_state_dict({**state, "estimate": "x"})
    with pytest.raises(TypeError, match="generation must be an int, got None"):
        nes.load_state_dict({**before, "noise": {**before["noise"], "generation": None}})
    assert nes.state_dict() == before


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_closure_that_draws_noise_is_refused(chunk):
    pm, nes = make(chunk=chunk)
    before, x = snapshot(pm), torch.ones(1, 4)

    def draws():
        pm.set_noise()
        return pm(pm.replicate(x)).sum(1)

    with pytest.raises(ValueError, match="closure must score the noise that the step has drawn"):
        nes.step(draws)
    assert unchanged(pm, before)
    assert nes.steps == 0
    other_pm, other = make(chunk=chunk)
    for model, optimizer in ((pm, nes), (other_pm, other)):
        optimizer.step(lambda model=model: model(model.replicate(x)).sum(1))
    assert torch.equal(pm.model.weight, other_pm.model.weight)


def test_a_parameter_that_is_frozen_on_the_way_stays():
    pm, nes = make()
    x = torch.ones(1, 4)
    nes.step(lambda: pm(pm.replicate(x)).sum(1))  # leaves a gradient
    pm.model.bias.requires_grad_(False)
    weight, bias = snapshot(pm)
    nes.step(lambda: pm(pm.replicate(x)).sum(1))
    assert torch.equal(pm.model.bias, bias)
    assert not torch.equal(pm.model.weight, weight)
    pm.model.bias.requires_grad_(True)
    nes.step(lambda: pm(pm.replicate(x)).sum(1))
    assert not torch.equal(pm.model.bias, bias)


def test_a_state_of_another_kind_of_run_is_refused():
    def optimizers(**options):
        net = perturbed.convert(nn.Linear(3, 2), 4)
        pm = PerturbedModel(net, 4, True, sigma=0.1)
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        return NES(pm, sgd, **options), perturbed.ARS(pm, sgd, **options)

    nes, ars = optimizers()
    raised, _ = optimizers(maximize=True)
    with pytest.raises(ValueError, match="state is of class NES, this one is ARS"):
        ars.load_state_dict(nes.state_dict())
    with pytest.raises(ValueError, match="state is of maximize False, this one is True"):
        raised.load_state_dict(nes.state_dict())


@pytest.mark.parametrize("shaping", sorted(SHAPINGS))
def test_one_member_has_nothing_to_be_compared_with(shaping):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pm = PerturbedModel(perturbed.convert(net, 1), 1, antithetic=False, sigma=0.1)
    x, before = torch.ones(1, 2), net.weight.clone()
    if shaping == "identity":  # the one that weighs a loss by itself
        NES(pm, optimizer, shaping=shaping).step(lambda: pm(x)[:, 0] - 5)
        assert not torch.equal(net.weight, before)
        return
    with pytest.raises(ValueError, match=f"{shaping} compares members, and one alone"):
        NES(pm, optimizer, shaping=shaping)
    # Where the rows say how many members there are, they are known with the losses.
    pm = PerturbedModel(net, 1, sigma=0.1)
    nes = NES(pm, optimizer, shaping=shaping)
    with pytest.raises(ValueError, match=f"{shaping} compares members, and one alone"):
        nes.step(lambda: pm(x)[:, 0])
    assert (nes.steps, pm.state.generation) == (0, -1)
    nes.step(lambda: pm(x.expand(2, 2))[:, 0])  # a pair: one compares with the other
    assert not torch.equal(net.weight, before)
