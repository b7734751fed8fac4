"""SNES and PGPE: a step against a loop over the papers' formulas, convergence, and resumed runs."""

import io
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed import PGPE, SNES, ClipUp, Explicit, PerturbedModel
from perturbed.optim import centered_rank, nes_utilities
from perturbed.testing import devices

NAN, INF = math.nan, math.inf
both = pytest.mark.parametrize("kind", [SNES, PGPE])
KINDS = {
    "snes": lambda model, **options: SNES(model, **options),
    "snes-mirrored": lambda model, **options: SNES(model, mirrored=True, **options),
    "pgpe": lambda model, **options: PGPE(model, **options),
}
kinds = pytest.mark.parametrize("name", KINDS)


def make(name, members=8, dtype=torch.float32, device="cpu", **options):
    """A linear model with 3 x 4 weights and its search, all members in one forward."""
    torch.manual_seed(1)
    net = perturbed.convert(nn.Linear(4, 3), members, Explicit()).to(device, dtype)
    pm = PerturbedModel(net, members)
    return pm, KINDS[name](pm, **{"sigma": 0.3, **options})


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def unchanged(module, before):
    return torch.equal(vector(module), before)


def squares(pm):
    """A closure: sum of squares of each member's parameters, from its outputs."""
    x = torch.cat((torch.zeros(1, 4), torch.eye(4)))  # the bias, and each column with it

    def closure():
        y = pm.member_rows(pm(pm.replicate(x)))[0]  # (P, 5, 3)
        return ((y[:, 1:] - y[:, :1]).square().sum((1, 2)) + y[:, 0].square().sum(1))[None]

    return closure


# ---- a step ------------------------------------------------------------------------------------


@kinds
def test_members_are_the_mean_and_scaled_noise(name):
    pm, search = make(name, 6, sigma=torch.linspace(0.1, 0.5, 15))
    mean = vector(pm.model)
    swarm = search.ask()
    eps = (swarm.positions - mean) / search.std
    assert eps.abs().max() < 6
    if name == "snes":
        assert eps.std() == pytest.approx(1, abs=0.3)
        assert (eps[:3] + eps[3:]).abs().min() > 1e-4
    else:
        torch.testing.assert_close(swarm.positions[:3] - mean, mean - swarm.positions[3:])
    rows = torch.randn(5, 4)
    outputs = pm.member_rows(pm(pm.replicate(rows)))[0]
    for p in range(6):
        torch.testing.assert_close(outputs[p], swarm.member(swarm.positions[p])(rows))
    first = swarm.positions.clone()
    assert not torch.equal(search.ask().positions, first)
    again = make(name, 6, sigma=torch.linspace(0.1, 0.5, 15))[1]
    assert torch.equal(again.ask().positions, first)
    assert not torch.equal(make(name, 6, seed=1)[1].ask().positions, first)


def epsilons(search):
    """Every member's eps, drawn by the plain-torch twin."""
    key = search._noise.tensors(torch.device("cpu"))[0]
    layer = (2**24 - 1) << 8
    count = search.swarm.particles // (2 if search.mirrored else 1)
    size = search.std.numel()
    eps = perturbed.reference.dense_materialise(key, layer, 0, count, 1, size, False, torch.float32)
    eps = eps.view(count, size)
    return torch.cat((eps, -eps)) if search.mirrored else eps


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("std_lr", [None, 0.7])
def test_snes_is_the_papers(mirrored, std_lr):
    losses = torch.randn(8)
    pm, snes = make("snes-mirrored" if mirrored else "snes", std_lr=std_lr)
    mean, std = vector(pm.model), snes.std.clone()
    snes.ask()
    eps = epsilons(snes)
    torch.testing.assert_close(snes.swarm.positions, mean + std * eps)
    # Wierstra et al. (2014), algorithm 6, with utilities of a fitness.
    utilities = -nes_utilities(losses)
    rate = (3 + math.log(15)) / (5 * math.sqrt(15)) if std_lr is None else std_lr
    spread = torch.zeros(15)
    for u, s in zip(utilities, eps, strict=True):
        mean = mean + std * u * s
        spread += u * (s.square() - 1)
    snes.tell(losses[None])
    torch.testing.assert_close(vector(pm.model), mean)
    torch.testing.assert_close(snes.std, std * torch.exp(rate / 2 * spread))


@pytest.mark.parametrize("max_change", [0.2, 1e-3])
def test_pgpe_is_the_papers(max_change):
    losses = torch.randn(8)
    pm, pgpe = make("pgpe", std_lr=0.4, max_change=max_change)
    sgd = torch.optim.SGD(pm.model.parameters(), 0.5)
    pgpe = PGPE(pm, sigma=0.3, optimizer=sgd, std_lr=0.4, max_change=max_change)
    mean, std = vector(pm.model), pgpe.std.clone()
    pgpe.ask()
    eps = epsilons(pgpe)[:4] * std
    u = -centered_rank(losses).view(2, 4)  # of a fitness
    gradient, change = torch.zeros(15), torch.zeros(15)
    for p in range(4):
        gradient += (u[0, p] - u[1, p]) / 2 * eps[p] / 4
        change += ((u[0, p] + u[1, p]) / 2 - u.mean()) * (eps[p].square() - std**2) / std / 4
    pgpe.tell(losses[None])
    torch.testing.assert_close(vector(pm.model), mean + 0.5 * gradient)
    limit = max_change * std
    torch.testing.assert_close(pgpe.std, std + (0.4 * change).clamp(-limit, limit))


@kinds
def test_chunks_are_of_no_consequence(name, monkeypatch):
    pm, whole = make(name)
    other, parts = make(name)
    losses = torch.randn(1, 8)
    whole.ask()
    whole.tell(losses)
    monkeypatch.setattr("perturbed.optim.distribution.per_scratch", lambda *_: 3)
    parts.ask()
    parts.tell(losses)
    torch.testing.assert_close(vector(other.model), vector(pm.model))
    torch.testing.assert_close(parts.std, whole.std)


@kinds
def test_a_plain_module_learns_the_same(name):
    pm, together = make(name)
    torch.manual_seed(1)
    net = nn.Linear(4, 3)
    apart = KINDS[name](net, members=8, sigma=0.3)
    for _ in range(3):
        together.step(squares(pm))
        apart.step(lambda net: sum(p.square().sum().item() for p in net.parameters()))
    torch.testing.assert_close(vector(net), vector(pm.model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.std, together.std)
    assert apart.stats["evaluations"] == 24


@kinds
def test_a_pool_scores_the_members(name):
    class Pool:  # what a WorkerPool has
        def evaluate(self, members):
            return members.square().sum(1)

    pm, together = make(name)
    other, pooled = make(name)
    for _ in range(3):
        together.step(squares(pm))
        pooled.step(Pool())
    torch.testing.assert_close(vector(other.model), vector(pm.model), rtol=1e-4, atol=1e-5)


# ---- learning ----------------------------------------------------------------------------------


def ellipsoid(members, name, condition, steps, scheduler=None, **options):
    """Minimise sum h w^2 over 20 weights that start at 1; return the loss, h and the search."""
    n = 20
    net = nn.Linear(n, 1, bias=False)
    nn.init.ones_(net.weight)
    pm = PerturbedModel(perturbed.convert(net, members, Explicit()), members)
    search = KINDS[name](pm, sigma=0.5, **options)
    h = condition ** (torch.arange(n) / (n - 1))
    eye = pm.replicate(torch.eye(n))
    schedule = scheduler and scheduler(search.optimizer)
    for _ in range(steps):
        search.step(lambda: (pm.member_rows(pm(eye)[:, 0]).square() * h).sum(2))
        if schedule:
            schedule.step()
    return (net.weight.detach()[0].square() * h).sum(), h, search


@pytest.mark.parametrize("name", ["snes", "snes-mirrored"])
@pytest.mark.parametrize("seed", [0, 1])
def test_snes_converges_whatever_the_scale_of_the_parameters(name, seed):
    for condition, start in ((1.0, 20), (1e4, 2.6e4)):
        loss, h, snes = ellipsoid(16, name, condition, 250, seed=seed)
        assert loss < 1e-6 * start
        # The distribution took the shape of the level sets: std is 1 / sqrt(h) up to a factor.
        shape = snes.std * h.sqrt()
        assert shape.max() < 8 * shape.min()
        assert snes.std.max() < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_pgpe_learns_scales_too(seed):
    def decay(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    loss, _, _ = ellipsoid(40, "pgpe", 1.0, 200, decay, seed=seed)
    assert loss < 0.02 * 20
    loss, h, pgpe = ellipsoid(40, "pgpe", 1e4, 300, decay, seed=seed)
    assert loss < 1e-3 * 2.6e4
    shape = pgpe.std * h.sqrt()
    assert shape.max() < 8 * shape.min()  # it was 100 times


@kinds
def test_maximize_flips_the_sign_once(name):
    losses = torch.randn(1, 8)
    down, descent = make(name)
    up, ascent = make(name, maximize=True)
    for search, values in ((descent, losses), (ascent, -losses)):
        search.ask()
        search.tell(values)
    assert unchanged(up.model, vector(down.model))
    assert torch.equal(descent.std, ascent.std)
    assert ascent.stats["best"] == -descent.stats["best"]


# ---- lost members ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@kinds
def test_lost_members_count_as_the_worst(name, bad):
    losses = torch.randn(1, 8)
    lost, worst = losses.clone(), losses.clone()
    lost[0, 3], worst[0, 3] = bad, 1e6
    pm, search = make(name)
    other, reference = make(name)
    for s, values in ((search, lost), (reference, worst)):
        s.ask()
        s.tell(values)
    assert unchanged(pm.model, vector(other.model))
    assert torch.equal(search.std, reference.std)
    assert search.stats["nonfinite"] == 1


@pytest.mark.parametrize("value", [NAN, INF, 0.5], ids=str)
@kinds
def test_without_a_difference_nothing_moves(name, value):
    pm, search = make(name)
    before, std = vector(pm.model), search.std.clone()
    search.ask()
    search.tell(torch.full((1, 8), value))
    assert unchanged(pm.model, before)
    assert torch.equal(search.std, std)


def test_what_overflows_leaves_std_alone():
    _, pgpe = make("pgpe", shaping=lambda losses: 1e38 * losses, max_change=1.0)
    for _ in range(5):
        pgpe.ask()
        pgpe.tell(1e3 * torch.randn(1, 8))
        assert pgpe.std.isfinite().all()
        assert (pgpe.std >= 1e-10).all()


# ---- options -----------------------------------------------------------------------------------


@kinds
def test_standard_deviations_stay_within_their_bounds(name):
    pm, search = make(name, sigma=0.3, std_bounds=(0.29, 0.31), std_lr=5.0)
    for _ in range(5):
        search.step(squares(pm))
    assert (search.std >= 0.29 * (1 - 1e-6)).all()
    assert (search.std <= 0.31 * (1 + 1e-6)).all()
    assert search.std.unique().numel() > 1


@kinds
def test_frozen_parameters_stay(name):
    torch.manual_seed(1)
    net = nn.Linear(4, 3)
    net.bias.requires_grad_(False)
    bias = net.bias.clone()
    pm = PerturbedModel(perturbed.convert(net, 8, Explicit()), 8)
    search = KINDS[name](pm, sigma=0.1)
    assert search.std.shape == (12,)
    search.step(lambda: pm(torch.ones(8, 4)).sum(1))
    assert torch.equal(net.bias, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@kinds
def test_other_dtypes(name, dtype):
    pm, search = make(name, dtype=dtype)
    assert search.std.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before = vector(pm.model)
    x = torch.ones(8, 4, dtype=dtype)
    for _ in range(3):
        search.step(lambda: pm(x).square().sum(1))
    assert pm.model.weight.dtype == dtype
    assert vector(pm.model).isfinite().all()
    assert not unchanged(pm.model, before)


@kinds
def test_schedulers_and_other_optimizers(name):
    pm, search = make(name)
    optimizer = ClipUp(pm.model.parameters(), 0.5)
    search = KINDS[name](pm, optimizer=optimizer, sigma=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    before = vector(pm.model)
    search.step(squares(pm))
    assert (vector(pm.model) - before).norm() == pytest.approx(0.5)
    scheduler.step()
    before, std = vector(pm.model), search.std.clone()
    search.step(squares(pm))
    assert unchanged(pm.model, before)
    assert not torch.equal(search.std, std)  # it has a rate of its own


def test_pgpes_own_optimizer_has_the_papers_speed():
    _, pgpe = make("pgpe", sigma=0.3)
    radius = 0.3 * math.sqrt(15)
    (group,) = pgpe.optimizer.param_groups
    assert isinstance(pgpe.optimizer, ClipUp)
    assert group["lr"] == pytest.approx(radius / 30)


@pytest.mark.cuda
@pytest.mark.parametrize("device", [d for d in devices() if "cuda" in str(d)])
@kinds
def test_nothing_waits_for_the_device(name, device):
    pm, search = make(name, device=device)
    values = torch.randn(1, 8, device=device)
    search.ask()
    search.tell(values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        search.ask()
        search.tell(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert vector(pm.model).isfinite().all()


# ---- errors ------------------------------------------------------------------------------------


@kinds
def test_a_closure_that_raises_leaves_no_trace(name):
    pm, search = make(name)
    search.step(squares(pm))
    shown, before, std = search.swarm.positions.clone(), vector(pm.model), search.std.clone()
    # The population of the last step is shown again: around the mean that it moved.
    with pytest.raises(ZeroDivisionError):
        search.step(lambda: 1 / 0)
    with pytest.raises(ValueError, match="values must be"):
        search.step(lambda: torch.zeros(3))
    assert unchanged(pm.model, before)
    assert torch.equal(search.std, std)
    search.step(squares(pm))
    other, reference = make(name)
    for _ in range(2):
        reference.step(squares(other))
    assert unchanged(pm.model, vector(other.model))
    assert torch.equal(search.std, reference.std)
    assert not torch.equal(search.swarm.positions, shown)


@kinds
def test_a_failed_step_leaves_the_asked_population_there(name):
    pm, search = make(name)
    positions = search.ask().positions.clone()
    with pytest.raises(ZeroDivisionError):
        search.step(lambda: 1 / 0)
    assert torch.equal(search.swarm.positions, positions)
    search.tell(squares(pm)())
    other, reference = make(name)
    reference.step(squares(other))
    assert unchanged(pm.model, vector(other.model))


def test_arguments_are_checked():
    pm, _ = make("snes")
    net = pm.model
    for kind in (SNES, PGPE):
        for bad in (0, -1.0, NAN):
            with pytest.raises(ValueError, match="sigma must be finite and greater than 0"):
                kind(pm, sigma=bad)
        with pytest.raises(ValueError, match="sigma must be finite and within std_bounds"):
            kind(pm, sigma=0.1, std_bounds=(0.2, 1.0))
        with pytest.raises(ValueError, match="sigma must be finite and within std_bounds"):
            kind(pm, sigma=torch.full((15,), NAN))
        with pytest.raises(ValueError, match=r"sigma must be a number or .* \(N,\) = \(15,\)"):
            kind(pm, sigma=torch.ones(3))
        with pytest.raises(ValueError, match=r"std_bounds\[1\] must be finite and at least 0\.2"):
            kind(pm, std_bounds=(0.2, 0.1))
        with pytest.raises(TypeError, match="std_bounds must be two numbers"):
            kind(pm, std_bounds=0.1)
        with pytest.raises(ValueError, match="std_lr must be finite and at least 0, got -1"):
            kind(pm, std_lr=-1)
        with pytest.raises(ValueError, match="optimizer must hold parameters"):
            kind(pm, optimizer=torch.optim.SGD(nn.Linear(4, 3).parameters(), 0.1))
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
            kind(pm, optimizer=0.1)
        with pytest.raises(ValueError, match="Explicit"):
            kind(PerturbedModel(perturbed.convert(nn.Linear(2, 2), 4), 4))
        with pytest.raises(TypeError, match="maximize must be True or False"):
            kind(pm, maximize=1)
    with pytest.raises(ValueError, match="members must be even to be mirrored, got 7"):
        PGPE(nn.Linear(2, 2), members=7)
    with pytest.raises(TypeError, match="mirrored must be True or False, got 1"):
        SNES(pm, mirrored=1)
    with pytest.raises(ValueError, match="max_change must be finite and at least 0 and at most 1"):
        PGPE(pm, max_change=2.0)
    with pytest.raises(ValueError, match="shaping must be one of"):
        PGPE(pm, shaping="ranks")
    assert net is pm.model


# ---- resumed runs ------------------------------------------------------------------------------


@kinds
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name):
    straight, search = make(name, seed=3)
    for _ in range(10):
        search.step(squares(straight))
    stopped, half = make(name, seed=3)
    for _ in range(5):
        half.step(squares(stopped))
    file = io.BytesIO()
    torch.save([stopped.model.state_dict(), half.state_dict()], file)
    kept = half.state_dict()["std"]
    half.step(squares(stopped))
    assert not torch.equal(kept, half.std)  # the state is no view of what changes
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, resumed = make(name, seed=99, sigma=0.7)
    again.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.step(squares(again))
    assert unchanged(again.model, vector(straight.model))
    assert torch.equal(resumed.std, search.std)
    assert resumed.stats == search.stats


@kinds
def test_a_run_saved_between_ask_and_tell_resumes_there(name):
    pm, search = make(name)
    search.ask()
    state, weights = search.state_dict(), {k: v.clone() for k, v in pm.model.state_dict().items()}
    search.tell(squares(pm)())
    again, resumed = make(name, seed=5)
    again.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.tell(squares(again)())
    assert unchanged(again.model, vector(pm.model))


@both
def test_a_state_of_another_model_is_refused(kind):
    _, search = make("snes" if kind is SNES else "pgpe")
    other = kind(nn.Linear(2, 2), members=4)
    with pytest.raises(ValueError, match=r"state\['std'\] must have shape \(6,\), got \(15,\)"):
        other.load_state_dict(search.state_dict())
    assert other.steps == 0


@pytest.mark.parametrize("kind", [SNES, PGPE])
def test_messages_name_the_argument_members(kind):
    with pytest.raises(ValueError, match=r"^members must be given for a plain module"):
        kind(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"^members must be at least 1, got 0"):
        kind(nn.Linear(2, 1), members=0)
    with pytest.raises(TypeError, match=r"^members must be an int"):
        kind(nn.Linear(2, 1), members=2.0)


def test_one_member_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="nes_utilities compares members, and one alone"):
        SNES(nn.Linear(2, 1), members=1)
    with pytest.raises(ValueError, match="members must be even to be mirrored, got 1"):
        PGPE(nn.Linear(2, 1), members=1)
