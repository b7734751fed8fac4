"""PSO: what is kept and where, starts and bounds, minibatches, NaN, resumed runs, bad input."""

import copy
import io
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import perturbed
from perturbed import PSO, Explicit, PerturbedModel, WorkerPool, evaluate_one_by_one
from perturbed.optim import VARIANTS, Accelerated, Inertia

NAN, INF = math.nan, math.inf


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def make(particles=8, dtype=torch.float32, **options):
    """A swarm of a small network, and the closure of its losses."""
    net = perturbed.convert(network(dtype), particles, Explicit())
    pm = PerturbedModel(net, particles)
    x = torch.rand(16, 2).to(dtype)
    rows = pm.replicate(x)
    y = (x[:, :1] * x[:, 1:]).repeat_interleave(particles, 0)
    return PSO(pm, **options), lambda: (pm(rows) - y).float().square().squeeze(1)


def values_of(pso):
    """Everything that a run depends on."""
    flight = pso.flight
    names = ("positions", "velocities", "bests", "best_values", "record", "record_value")
    parts = {name: getattr(flight, name).clone() for name in names}
    parts.update({name: tensor.clone() for name, tensor in flight.extra.items()})
    parts["module"] = pso.swarm.read()
    return parts


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the best ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_recorded_best_is_what_the_best_evaluates_to(variant, dtype):
    """Not an alias of a particle that has moved on, as in the program this is after."""
    pso, closure = make(dtype=dtype, variant=variant)
    before = []
    for _ in range(10):
        pso.step(closure)
        before.append(pso.best_value)
        # All particles at the recorded best: the forward that scored it, bit for bit.
        at_best = pso.flight.record.expand(pso.swarm.particles, -1).contiguous()
        again = pso.swarm.values(pso.swarm.score(closure, at_best))
        assert (again == pso.best_value).any()
        assert torch.equal(pso.best.to(dtype), pso.swarm.read())
    assert before == sorted(before, reverse=True)
    assert before[-1] < before[0]
    best = pso.best
    pso.step(closure)
    pso.flight.record.add_(1)
    assert not torch.equal(pso.best, best)  # `best` was a copy


def test_the_module_itself_is_the_best_and_members_are_the_particles():
    pso, closure = make()
    for _ in range(5):
        pso.step(closure)
    net = pso.swarm.module
    plain = pso.best_model()
    assert type(plain[0]) is nn.Linear
    x = torch.rand(7, 2)
    torch.testing.assert_close(net(x), plain(x))
    assert torch.equal(nn.utils.parameters_to_vector(plain.parameters()), pso.best)
    assert not (pso.swarm.positions == pso.best).all(1).any()


@pytest.mark.parametrize("variant", ["constriction", "accelerated"])
def test_maximize_is_the_mirrored_run(variant):
    low, _ = make(variant=variant)
    high, _ = make(variant=variant, maximize=True)
    for _ in range(4):
        low.ask()
        high.ask()
        values = torch.rand(8)
        assert low.tell(values) == -high.tell(-values)
    assert torch.equal(low.best, high.best)
    assert low.best_value == -high.best_value
    assert low.stats["best"] == -high.stats["best"]


def test_no_gradients_and_no_global_random_state():
    state = torch.random.get_rng_state()
    pso, closure = make(jiggle=0.01, velocity_spread=0.1)
    inputs = torch.random.get_rng_state()
    pso.step(closure)
    assert torch.equal(torch.random.get_rng_state(), inputs)
    assert not torch.equal(state, inputs)  # the inputs themselves are drawn from it
    assert all(p.grad is None and p.requires_grad for p in pso.swarm.module.parameters())
    assert not pso.best.requires_grad


def test_seeds_differ_and_repeat():
    runs = []
    for seed in (0, 0, 1):
        pso, closure = make(seed=seed)
        for _ in range(3):
            pso.step(closure)
        runs.append(pso.best)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# ---- NaN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_losses_that_are_not_finite_never_win(variant, bad):
    pso, closure = make(variant=variant)
    for step in range(6):
        losses = pso.swarm.values(pso.swarm.score(closure)).clone()
        losses[step % 8] = bad
        losses[0] = bad  # never a best of its own
        pso.ask()
        pso.tell(losses)
        assert math.isfinite(pso.best_value)
        assert pso.flight.positions.isfinite().all()
    assert pso.stats["nonfinite_total"] == 11
    if len(pso.flight.bests):
        assert pso.stats["without_best"] == 1
        assert pso.flight.best_values[0] == INF


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("topology", [None, "ring"])
def test_a_swarm_without_any_finite_loss_keeps_searching(variant, topology):
    if not VARIANTS[variant].social:
        topology = None
    pso, closure = make(variant=variant, topology=topology)
    start = pso.swarm.read()
    for _ in range(4):
        before = pso.flight.positions.clone()
        assert math.isnan(pso.step(lambda: torch.full((8,), NAN)))
        moved = (pso.flight.positions != before).any(1)
        assert moved.sum() >= 4
    assert pso.flight.positions.isfinite().all()
    assert pso.best_value == INF
    assert torch.equal(pso.swarm.read(), start)
    assert torch.equal(pso.best, start)
    stats = pso.stats
    assert (stats["nonfinite"], stats["without_best"], stats["steps"]) == (8, 8, 4)
    for _ in range(5):
        pso.step(closure)
    assert pso.best_value < INF


# ---- devices -----------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Refuses what would wait for a GPU: numbers read from tensors, results of unknown size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", sorted({*VARIANTS} - {"comprehensive"}))
def test_tell_reads_no_numbers(variant):
    """Comprehensive learning reads some on a CPU, to save work; the topologies are on the CPU."""
    options = {"topology": "global"} if VARIANTS[variant].social else {}
    pso, _ = make(variant=variant, best_decay=0.1, bounds=3.0, jiggle=0.1, **options)
    values = torch.rand(8)
    for _ in range(2):
        pso.ask()
        with Reads():
            pso.tell(values)
    with pytest.raises(AssertionError), Reads():
        float(pso.flight.record_value)


@pytest.mark.cuda
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_gpu_is_not_waited_for_and_flies_as_the_cpu(variant):
    runs = []
    for device in ("cpu", "cuda"):
        net = perturbed.convert(network(), 8, Explicit()).to(device)
        pso = PSO(PerturbedModel(net, 8), variant=variant, best_decay=0.1, bounds=3.0)
        losses = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).to(device)
        pso.ask()
        pso.tell(losses[0])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for values in losses[1:]:
                pso.ask()
                pso.tell(values)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        runs.append(pso.flight.positions.cpu())
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)  # normals differ in their last bits


# ---- starts and bounds -------------------------------------------------------------------------


def test_around_the_model_with_the_model_itself_first():
    net = network()
    pso = PSO(net, 200)
    own = pso.swarm.read()
    away = pso.swarm.positions - own
    assert (away[0] == 0).all()
    spread = [0.5**0.5] * 10 + [0.1] * 5 + [0.2**0.5] * 5 + [0.1]
    reached = away[1:].abs().amax(0) / torch.tensor(spread)
    assert (reached <= 1).all()
    assert (reached > 0.9).all()
    pso = PSO(net, 4, spread={"0.bias": 3.0})
    assert torch.equal((pso.swarm.positions != own).any(0).nonzero()[:, 0], torch.arange(10, 15))


def test_fan_in_start_is_that_of_the_original():
    pso = PSO(network(), 200, start="fan_in")
    x = pso.swarm.positions
    assert (x[:, 10:15] == 0).all()
    assert 0.65 < x[:, :10].abs().max() <= 0.5**0.5
    assert 0.4 < x[:, 15:20].abs().max() <= 0.2**0.5


def test_uniform_start_fills_the_bounds_of_each_parameter():
    bounds = {"0.weight": (1, 3), "0.bias": 2.0, "2.weight": (-1.0, torch.full((5,), 0.5))}
    bounds["2.bias"] = [torch.tensor([4.0]), 6]
    pso = PSO(network(), 300, start="uniform", bounds=bounds)
    x = pso.swarm.positions
    low = torch.tensor([1.0] * 10 + [-2.0] * 5 + [-1.0] * 5 + [4.0])
    high = torch.tensor([3.0] * 10 + [2.0] * 5 + [0.5] * 5 + [6.0])
    share = (x - low) / (high - low)
    assert ((share >= 0) & (share <= 1)).all()
    assert (share.amin(0) < 0.05).all()
    assert (share.amax(0) > 0.95).all()
    again = PSO(network(), 300, start="uniform", bounds=(low, high.tolist()))
    assert torch.equal(again.swarm.positions, x)


def test_a_start_that_is_given_is_copied_and_held_to_the_bounds():
    start = 3 * torch.randn(4, 21, dtype=torch.float64)
    pso = PSO(network(), 4, start=start, bounds=1.0)
    assert torch.equal(pso.swarm.positions, start.float().clamp(-1, 1))


def test_the_largest_velocity_and_its_fraction_of_the_bounds():
    net = network()
    for options in ({"max_velocity": 0.1}, {"bounds": (-1, 1), "velocity_fraction": 0.05}):
        pso = PSO(net, 8, spread=2.0, velocity_spread=5.0, **options)
        before = pso.swarm.positions.clone()
        pso.step(lambda net: sum(p.sum().item() for p in net.parameters()))
        assert pso.flight.velocities.abs().max() <= 0.1 + 1e-7
        assert (pso.swarm.positions - before).abs().max() == pytest.approx(0.1, rel=1e-4)


def test_jiggle_is_normal_noise_that_a_schedule_can_end():
    def run(jiggle):
        pso = PSO(nn.Linear(200, 50), 4, jiggle=jiggle, seed=1)
        moves = []
        for _ in range(2):
            pso.ask()
            pso.tell(torch.arange(4.0))
            moves.append(pso.swarm.positions.clone())
        return moves

    with torch.random.fork_rng():
        torch.manual_seed(0)
        still = run(0.0)
        torch.manual_seed(0)
        shaken = run(lambda step: 0.3 * (step == 0))
    noise = (shaken[0] - still[0]) / 0.3
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 0.02
    assert noise.flatten().unique().numel() > 0.9 * noise.numel()


# ---- minibatches -------------------------------------------------------------------------------


def test_bests_are_scored_again_on_the_same_batch():
    pso, _ = make(reevaluate=True)
    pm = pso.swarm.pm
    batches = torch.rand(5, 16, 2)
    for x in batches:
        rows = pm.replicate(x)

        def closure(rows=rows):
            return (pm(rows) - 1).square().squeeze(1)

        bests = pso.flight.bests.clone()
        particles = pso.swarm.positions.clone()
        here = pso.swarm.values(closure())
        there = pso.swarm.values(pso.swarm.score(closure, bests))
        mean = pso.step(closure)
        torch.testing.assert_close(mean, here.mean())
        want = torch.minimum(here, there).double()
        assert torch.equal(pso.flight.best_values, want)
        kept = torch.where((here < there)[:, None], particles, bests)
        assert torch.equal(pso.flight.bests, kept)
        assert torch.equal(pso.best, kept[want.argmin()])
        assert pso.best_value == want.min()
    assert pso.stats["evaluations"] == 5 * 2 * 8


def test_reevaluation_forgets_a_lucky_batch():
    def run(**options):
        net = nn.Linear(1, 1)
        pso = PSO(net, 12, seed=3, spread=1.0, **options)
        for step in range(60):
            lucky = -1000.0 if step == 2 else 0.0
            pso.step(lambda net, add=lucky: (net.weight - 2).square().item() + add)
        return (net.weight - 2).square().item()

    assert run() > 0.05  # stuck with the bests of the lucky step
    assert run(reevaluate=True) < 1e-3
    assert run(best_decay=0.5) < 1e-2


def test_remembered_values_rise_to_what_a_step_reaches():
    pso, _ = make(best_decay=0.25)
    pso.ask()
    pso.tell(torch.arange(8.0))
    pso.ask()
    pso.tell(torch.tensor([NAN, 100, 5, 200, 300, -INF, 400, 500]))
    old = torch.arange(8.0)
    want = old + 0.25 * (5 - old).clamp(min=0)
    torch.testing.assert_close(pso.flight.best_values, want.double())
    assert pso.best_value == 1.25
    pso.ask()
    pso.tell(torch.full((8,), NAN))  # nothing was reached: nothing ages
    assert pso.best_value == 1.25


def test_values_of_both_populations_can_be_told():
    pso, _ = make(reevaluate=True)
    pso.ask()
    pso.tell(torch.stack((torch.arange(8.0), torch.arange(8.0) + 1)))
    assert pso.best_value == 0
    pso.ask()
    with pytest.raises(ValueError, match=r"\(2, P\) = \(2, 8\), got \(8,\)"):
        pso.tell(torch.zeros(8))


# ---- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(variant, dtype):
    options = {"variant": variant, "jiggle": lambda step: 0.1 * 0.9**step, "dtype": dtype}
    straight, closure = make(**options)
    for _ in range(3):
        straight.step(closure)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    held = straight.state_dict()
    copied = copy.deepcopy(held)
    for _ in range(4):
        straight.step(closure)
    assert same(held["swarm"], copied["swarm"])  # what is held does not move on
    file.seek(0)
    with torch.random.fork_rng():
        resumed, _ = make(**options, seed=77)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    own = resumed.swarm.pm
    # The same batch for both.
    rows, y = (c.cell_contents for c in closure.__closure__ if torch.is_tensor(c.cell_contents))
    for _ in range(4):
        resumed.step(lambda: (own(rows) - y).float().square().squeeze(1))
    assert same(values_of(resumed), values_of(straight))
    assert resumed.stats == straight.stats


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    pso, closure = make()
    pso.step(closure)
    state = pso.state_dict()
    for other, message in [
        (make(variant="inertia")[0], "must be of the variant Inertia, got 'Constriction'"),
        (make(particles=6)[0], r"positions must have shape \(6, 21\), got \(8, 21\)"),
    ]:
        before = values_of(other)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert same(values_of(other), before)


# ---- plain modules -----------------------------------------------------------------------------


def test_any_python_function_of_a_plain_module():
    net = network()
    pso = PSO(net, 12, bounds=5.0)
    x = torch.rand(30, 2)
    y = (x[:, 0] > x[:, 1]).tolist()

    def errors(net):
        return sum((s > 0) != t for s, t in zip(net(x)[:, 0].tolist(), y, strict=True))

    for _ in range(15):
        pso.step(errors)
    assert errors(net) == pso.best_value < 5
    assert pso.stats["evaluations"] == 180


def test_a_function_that_raises_changes_nothing():
    pso, closure = make()
    plain = PSO(network(), 4)
    for swarm, good in ((pso, closure), (plain, lambda net: net[0].weight.sum().item())):
        swarm.step(good)
        before, stats = values_of(swarm), swarm.stats

        def bad(*args):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            swarm.step(bad)
        assert same(values_of(swarm), before)
        assert swarm.stats == stats
        swarm.step(good)


def distance(net):
    """From parameters of 1."""
    return sum((p - 1).square().sum().item() for p in net.parameters())


@pytest.mark.parametrize("kind", ["plain", "converted"])
def test_a_pool_of_processes_is_the_same_run(kind):
    runs = []
    for pooled in (False, True):
        net = network(torch.float64)
        plain = copy.deepcopy(net)
        if kind == "converted":
            net = perturbed.convert(net, 6, Explicit())
            net = PerturbedModel(net, 6)
        pso = PSO(net, 6, reevaluate=True)
        with WorkerPool(distance, plain, workers=2, start_method="fork") as pool:
            for _ in range(4):
                if pooled:
                    pso.step(pool)
                else:
                    both = (pso.flight.positions, pso.flight.bests)
                    pso.ask()
                    pso.tell(torch.stack([evaluate_one_by_one(distance, plain, m) for m in both]))
        runs.append(values_of(pso))
    assert same(*runs)


def test_a_worker_that_dies_is_replaced_or_changes_nothing(tmp_path):
    net = network()
    pso = PSO(net, 4)

    def dies(net):
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return distance(net)

    with WorkerPool(dies, net, workers=2, start_method="fork") as pool:
        pso.step(pool)
        assert pool.replaced == 1
    assert pso.best_value == distance(net)

    def always(net):
        os.kill(os.getpid(), signal.SIGKILL)

    before = values_of(pso)
    with (
        WorkerPool(always, net, workers=1, retries=0, start_method="fork") as pool,
        pytest.raises(RuntimeError, match="member 0"),
    ):
        pso.step(pool)
    assert same(values_of(pso), before)
    assert pso.steps == 1


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "classic"}, ValueError, "variant must be of constriction, .* got 'classic'"),
        ({"variant": Inertia}, TypeError, "variant must be a name or a Variant, got 'Inertia'"),
        ({"variant": Inertia(), "c1": 1}, ValueError, "c1: give them to Inertia"),
        ({"inertia": 0.9}, ValueError, "constriction got inertia"),
        ({"variant": "accelerated", "c2": 1}, ValueError, "accelerated got c2"),
        ({"c1": 1.0}, ValueError, r"c1 \+ c2 must be greater than 4 for a constriction, got 3.05"),
        ({"c1": NAN}, ValueError, "c1 must be finite"),
        (
            {"variant": "inertia", "inertia": -1},
            ValueError,
            "inertia must be finite and at least 0",
        ),
        (
            {"topology": "star"},
            ValueError,
            "topology must be of global, ring, von_neumann, got 'st",
        ),
        ({"topology": 3}, TypeError, "topology must be a name or a function"),
        ({"variant": "competitive", "topology": "ring"}, ValueError, "has none, got 'ring'"),
        ({"per_dimension": 1}, TypeError, "per_dimension must be True or False, got 1"),
        ({"max_velocity": 0}, ValueError, "max_velocity must be greater than 0, got 0"),
        ({"max_velocity": torch.ones(3)}, ValueError, r"max_velocity must be a number, a vector"),
        ({"max_velocity": "fast"}, TypeError, "max_velocity must be a number or a tensor"),
        ({"max_velocity": {"0.w": 1}}, ValueError, r"max_velocity must name parameters of \['0.w"),
        ({"velocity_fraction": 0.5}, ValueError, "there are none"),
        (
            {"velocity_fraction": 0.5, "max_velocity": 1, "bounds": 1},
            ValueError,
            "max_velocity or velocity_fraction, not both",
        ),
        ({"variant": "bare_bones", "max_velocity": 1}, ValueError, "has no velocities"),
        ({"bounds": 0}, ValueError, "bounds must be finite and greater than 0"),
        ({"bounds": (1, -1)}, ValueError, "lower ends that are at most the upper"),
        ({"bounds": (0, NAN)}, ValueError, "bounds must not be NaN"),
        ({"bounds": (0, 1, 2)}, ValueError, "bounds must be a number or a pair"),
        ({"bounds": (torch.zeros(20), 1)}, ValueError, r"vector \(N,\) = \(21,\)"),
        ({"bounds": {"0.weight": (torch.zeros(3), 1)}}, ValueError, r"must broadcast to \(5, 2\)"),
        ({"bounds": {"1.weight": 1}}, ValueError, "bounds must name parameters"),
        ({"bounds": {"0.weight": 1}, "start": "uniform"}, ValueError, "needs finite bounds of all"),
        ({"boundary": "wrap"}, ValueError, "boundary must be of clip, reflect, got 'wrap'"),
        ({"start": "zero"}, ValueError, "start must be of around, fan_in, uniform or a tensor"),
        ({"start": torch.zeros(3, 21)}, ValueError, r"shape \(P, N\) = \(4, 21\)"),
        ({"start": torch.full((4, 21), NAN)}, ValueError, "start must be finite"),
        ({"start": torch.zeros(4, 21), "antithetic": True}, ValueError, "start must be a name"),
        ({"start": "fan_in", "spread": 1.0}, ValueError, "spread is that of"),
        ({"spread": -1.0}, ValueError, "spread must be finite and at least 0, got -1"),
        ({"velocity_spread": INF}, ValueError, "velocity_spread must be finite"),
        ({"jiggle": -1}, ValueError, "jiggle must be finite and at least 0"),
        ({"particles": 5, "antithetic": True}, ValueError, "an even number of particles, got 5"),
        ({"best_decay": 2}, ValueError, "best_decay must be finite .* at most 1"),
        ({"best_decay": 0.1, "reevaluate": True}, ValueError, "best_decay is for values"),
        ({"variant": "accelerated", "reevaluate": True}, ValueError, "remember no bests"),
        ({"maximize": 1}, TypeError, "maximize must be True or False"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        PSO(network(), **{"particles": 4, **options})


def test_bad_options_of_variants_are_named():
    for name, options in {
        "fully_informed": {"phi": 3},
        "comprehensive": {"patience": 0},
        "competitive": {"phi": -1},
        "accelerated": {"beta": 2},
    }.items():
        with pytest.raises(ValueError, match=f"{next(iter(options))}|phi|constriction"):
            VARIANTS[name](**options)
    assert Accelerated(0.5) == Accelerated(beta=0.5)


@pytest.mark.parametrize("wrong", [torch.zeros(7), torch.zeros(2, 8), torch.zeros(())])
def test_values_of_another_length_change_nothing(wrong):
    pso, closure = make()
    pso.step(closure)
    before = values_of(pso)
    pso.ask()
    with pytest.raises(ValueError, match="values must be"):
        pso.tell(wrong)
    with pytest.raises(ValueError, match="values must be"):
        pso.step(lambda: wrong)
    assert same(values_of(pso), before)
    pso.tell(torch.zeros(8))
    with pytest.raises(RuntimeError, match="call ask"):
        pso.tell(torch.zeros(8))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"topology": lambda p, step: torch.zeros(p - 1, 2, dtype=torch.int64)}, ValueError),
        ({"topology": lambda p, step: torch.full((p, 2), p)}, ValueError),
        ({"topology": lambda p, step: [[0]] * p}, TypeError),
        ({"jiggle": lambda step: NAN}, ValueError),
        ({"variant": Inertia(lambda step: -1.0)}, ValueError),
        ({"variant": Inertia(lambda step: "0.5")}, TypeError),
    ],
)
def test_functions_that_return_nonsense_change_nothing(options, error):
    pso, closure = make(**options)
    before = values_of(pso)
    with pytest.raises(error, match=r"topology must return|jiggle must|inertia must"):
        pso.step(closure)
    assert same(values_of(pso), before)
    assert pso.steps == 0


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("particles", [1, 2, 3])
def test_tiny_swarms(variant, particles):
    pso, closure = make(particles=particles, variant=variant)
    for _ in range(3):
        pso.step(closure)
    assert math.isfinite(pso.best_value)
    assert pso.flight.positions.isfinite().all()
