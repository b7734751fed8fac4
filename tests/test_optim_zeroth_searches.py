"""Random, shrinking, grid and sequential search, annealing, samplers: against plain loops."""

import itertools
import math

import pytest
import torch
from searches import quadratic, run
from torch import nn

from perturbed import _C, _ops
from perturbed.description import digest
from perturbed.noise.base import OPTIMIZER_ID, STREAM_TRIALS, stream_word
from perturbed.optim import (
    SAMPLERS,
    AcceleratedRandomSearch,
    GridSearch,
    RandomSearch,
    SequentialSearch,
    ShrinkingRandomSearch,
    SimulatedAnnealing,
    ThresholdAccepting,
)
from perturbed.optim.zeroth.domain import grid_size, grid_value
from perturbed.optim.zeroth.samplers import Source, sample


def noise(seed, draw, sizes, direction=0):
    """The contract's normals of a draw, as a plain loop draws them."""
    key = torch.tensor([_C.splitmix64(seed), draw, direction])
    word = stream_word(OPTIMIZER_ID, STREAM_TRIALS)
    row = _ops.dense_materialise(key, word, 0, 1, 1, sum(sizes), False, torch.float32)[0, 0]
    return row.split(sizes)


def pair():
    return [nn.Parameter(torch.tensor([0.5, -1.0, 2.0])), nn.Parameter(torch.tensor([[1.5]]))]


def valley(points):
    """Rosenbrock's function of two numbers; 0 at (1, 1)."""
    x, y = torch.cat([p.flatten() for p in points]).double()
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


# ---- random search -----------------------------------------------------------------------------


def test_random_search_is_the_plain_loop():
    points = pair()
    got = run(RandomSearch(points, lr=2.0, seed=9), points, 30)
    best, want = quadratic(pair()).item(), []
    for t in range(30):
        candidate = [2.0 * z for z in noise(9, t, [3, 1])]
        best = min(best, quadratic(candidate).item())
        want.append(best)
    assert got == want
    assert len(set(got)) > 2


def test_accelerated_search_is_the_plain_loop():
    points = [nn.Parameter(torch.tensor([0.5, -1.0, 9.0])), nn.Parameter(torch.tensor([[1.5]]))]
    search = AcceleratedRandomSearch(points, (-2.0, 3.0), shrink=0.8, restart=4, lr=0.5, seed=6)
    got = run(search, points, 60)
    x = torch.tensor([0.5, -1.0, 9.0, 1.5])
    best, want, failures, longest = quadratic([x]).item(), [], 0, 0
    for t in range(60):
        reach, centre = 5.0 * 0.5 * 0.8**failures, x.clamp(-2, 3)  # 9 is outside
        u = torch.cat(Source(6, t, 0).uniforms([torch.empty(3), torch.empty(1)]))
        low, high = (centre - reach).clamp(min=-2), (centre + reach).clamp(max=3)
        candidate = low + u * (high - low)
        loss = quadratic([candidate]).item()
        failures = (failures + 1) % 4
        if loss < best:
            x, best, failures = candidate, loss, 0
        longest = max(longest, failures)
        want.append(best)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(set(got)) > 5
    assert longest == 3
    assert search.evaluations == 61


@pytest.mark.parametrize("nsteps", [None, 40])
def test_shrinking_search_is_the_plain_loop(nsteps):
    points = pair()
    got = run(ShrinkingRandomSearch(points, lr=0.5, nsteps=nsteps, seed=3), points, 50)
    x = torch.cat([p.detach().flatten() for p in pair()])
    best, want = quadratic([x]).item(), []
    for t in range(50):
        scale = 0.5 * (max(0, 40 - t) / 40 if nsteps else 1.0)
        candidate = x + scale * torch.cat(noise(3, t, [3, 1]))
        loss = quadratic([candidate]).item()
        if loss < best:
            x, best = candidate, loss
        want.append(best)
    assert got == pytest.approx(want, rel=1e-6)
    assert len(set(got)) > 3


def test_the_scale_never_falls_below_zero():
    """TB7: torchzero's went on to negative scales after nsteps."""
    p = nn.Parameter(torch.ones(3))
    search = ShrinkingRandomSearch([p], nsteps=5)
    run(search, [p], 5)
    before = p.detach().clone()
    seen = []
    run(search, [p], 20, lambda ps: seen.append(ps[0].detach().clone()) or quadratic(ps))
    assert all(torch.equal(s, before) for s in seen)


def test_the_best_of_another_day_is_measured_again():
    p = nn.Parameter(torch.zeros(2))
    search = ShrinkingRandomSearch([p], lr=0.1, stochastic=True)
    days = iter([5.0] + [10.0, 9.0] * 20)
    search.step(lambda: 0.0 if search.evaluations else 1.0)  # a lucky day: 0
    at = p.detach().clone()
    search.step(lambda: next(days))  # 5 here, 10 there
    assert torch.equal(p, at)
    search.step(lambda: next(days))  # 9 here now
    assert search.evaluations == 6


def test_random_search_finds_the_valley():
    x = nn.Parameter(torch.tensor([-1.2, 1.0]))
    search = ShrinkingRandomSearch([x], lr=1.0, nsteps=3000)
    run(search, [x], 3000, valley)
    assert search.best_loss < 1e-3  # the start has 24.2


# ---- grid search -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "step", "values"),
    [
        ((0, 0.3), 0.1, [0, 0.1, 0.2, 0.3]),  # 0.3 / 0.1 is 2.9999999999999996
        ((-1, 1), 0.5, [-1, -0.5, 0, 0.5, 1]),
        ((0, 1), 0.4, [0, 0.4, 0.8, 1]),
        ((0, 1), 5, [0, 1]),
        ((0, 0.7), 0.1, [i / 10 for i in range(8)]),
    ],
)
def test_grids_have_both_ends(domain, step, values):
    found = [grid_value(domain, step, i) for i in range(grid_size(domain, step))]
    assert found == pytest.approx(values)
    assert (found[0], found[-1]) == domain


@pytest.mark.parametrize(("shapes", "count"), [([(5,)], 3), ([(1,), (2, 1)], 10), ([(), (3,)], 2)])
def test_every_point_of_a_grid_is_visited_once(shapes, count):
    """TB5: several tensors; 3^5 and 10^3, where digits by logarithms were wrong."""
    points = [nn.Parameter(torch.zeros(s)) for s in shapes]
    size = sum(p.numel() for p in points)
    search = GridSearch(points, domain=(0, count - 1), step=1)
    seen = []

    def closure():
        seen.append(tuple(torch.cat([p.flatten() for p in points]).tolist()))
        return 1.0

    for _ in range(count**size):
        search.step(closure)
    assert search.evaluations == len(seen) == count**size  # one a step
    assert set(seen) == set(itertools.product(map(float, range(count)), repeat=size))
    assert (search.progress["level"], search.progress["visited"]) == (1, 0)
    search.step(closure)
    assert search.progress["spacings"] == [0.5]
    assert all(v % 0.5 == 0 for v in seen[-1])


def test_grids_of_groups_and_the_best():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [a], "domain": (-1, 1)}, {"params": [b], "step": 2}]
    search = GridSearch(groups, domain=(0, 4), step=1)
    losses = run(search, (a, b), 3 * 9, lambda _: (a - 1).abs().sum() + (b - 2).abs().sum())
    assert min(losses) == search.best_loss == 0
    assert a.tolist() == [1]
    assert b.tolist() == [2, 2]
    assert len(set(losses)) > 3  # of the step's own point, not the best


def test_grids_too_large_to_count_in_floats():
    p = nn.Parameter(torch.zeros(15738))
    search = GridSearch([p], domain=(-1, 1), step=1)
    seen = []
    for _ in range(3):
        search.step(lambda: seen.append(p.detach().clone()) or -len(seen))
    assert torch.equal(p, seen[-1])
    assert seen[0].unique().tolist() == [-1]
    for later in seen[1:]:  # spread over the grid: every value about equally often
        shares = [(later == value).float().mean().item() for value in (-1, 0, 1)]
        assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


# ---- sequential search -------------------------------------------------------------------------


def test_sequential_search_is_coordinate_descent():
    points = pair()
    search = SequentialSearch(points, lr=0.5, domain=(-1, 2))
    seen = []
    run(search, points, 60, lambda p: seen.append(1) or quadratic(p))
    assert len(seen) == 61  # two at the first step, none wasted later
    x = torch.cat([p.detach().flatten() for p in pair()])
    for i in range(4):
        tried = [x.clone() for _ in range(7)]
        for k, candidate in enumerate(tried):
            candidate[i] = -1 + 0.5 * k
        x = min([x, *tried], key=lambda c: quadratic([c]).item())
    assert torch.equal(torch.cat([p.detach().flatten() for p in points]), x)


def test_a_parameter_that_is_not_contiguous_is_searched():
    """TB6."""
    p = nn.Parameter(torch.zeros(3, 2).t())
    assert not p.is_contiguous()
    target = torch.tensor([[1.0, 0, 0.5], [-0.5, 1, -1]])
    run(SequentialSearch([p], 0.5, (-1, 1)), [p], 40, lambda _: (p - target).abs().sum())
    assert torch.equal(p, target)


# ---- annealing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SimulatedAnnealing, ThresholdAccepting])
def test_annealing_is_the_plain_loop(kind):
    points = pair()
    search = kind(points, 0.3, 1.0, 0.8, iter_per_cool=10, max_bad_iter=None, seed=4)
    got = run(search, points, 60)
    x = torch.cat([p.detach().flatten() for p in pair()])
    present, want, worse = quadratic([x]).item(), [], 0
    for t in range(60):
        candidate = x + torch.cat(noise(4, t, [3, 1])) * 0.3
        loss = quadratic([candidate]).item()
        temperature = 0.8 ** (t // 10)
        rise = loss - present
        if kind is SimulatedAnnealing:
            (u,) = Source(4, t, 0).numbers(1)
            accepted = u < math.exp(-rise / temperature)
        else:
            accepted = rise < temperature
        worse += accepted and rise > 0
        if accepted:
            x, present = candidate, loss
        want.append(present)
    assert got == pytest.approx(want, rel=1e-5)
    assert worse > 5


def test_annealing_goes_back_to_the_best():
    p = nn.Parameter(torch.zeros(1))
    search = SimulatedAnnealing([p], 1.0, init_temp=1e9, max_bad_iter=4)
    run(search, [p], 4, lambda ps: ps[0].detach().abs().sum())
    assert p.item() != 0
    run(search, [p], 1, lambda ps: ps[0].detach().abs().sum())  # four after the best, the start
    assert search.best_loss == 0
    assert p.item() == 0
    run(search, [p], 3, lambda ps: ps[0].detach().abs().sum())
    assert p.item() != 0


def test_without_temperature_nothing_worse_is_accepted():
    points = pair()
    for search in (
        SimulatedAnnealing(points, 0.3, init_temp=0.0, max_bad_iter=None),
        ThresholdAccepting(points, 0.3, init_threshold=0.0, max_bad_iter=None),
    ):
        losses = run(search, points, 60)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [SimulatedAnnealing, ThresholdAccepting])
def test_annealing_leaves_a_local_minimum(kind):
    def waves(points):
        x = points[0].double()
        return (x.square() + 3 * (1 - torch.cos(6 * x))).sum()

    x = nn.Parameter(torch.tensor([2.09]))  # a minimum of loss 4.2; the wall to the next is 6
    search = kind([x], 0.2, 3.0, 0.9, iter_per_cool=50, max_bad_iter=None)
    run(search, [x], 2500, waves)
    assert search.best_loss < 0.05


# ---- samplers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_mean_zero(name):
    """... and variance 1, where their elements are independent; 5 standard errors."""
    like = [torch.empty(40, 50), torch.empty(7)]
    draws = 200 if name in ("constant", "randrect") else 20
    drawn = [sample(name, like, Source(1, 0, d)) for d in range(draws)]
    flat = torch.stack([torch.cat([t.flatten() for t in z]) for z in drawn]).double()
    independent = draws if name in ("constant", "randrect") else flat.numel()
    assert abs(flat.mean()) < 5 / math.sqrt(independent)
    if name not in ("constant", "randrect"):
        assert abs(flat.var() - 1) < 5 * math.sqrt(2 / independent)
    assert len({digest(row) for row in flat}) == draws
    again = sample(name, like, Source(1, 0, 3))
    assert all(torch.equal(a, b) for a, b in zip(again, drawn[3], strict=True))


def test_samplers_are_what_they_are_called():
    like = [torch.empty(30, 40), torch.empty(9), torch.empty(())]
    draw = {name: sample(name, like, Source(0, 2, 5)) for name in SAMPLERS}
    assert all(z.shape == t.shape for zs in draw.values() for z, t in zip(zs, like, strict=True))
    assert draw["rademacher"][0].unique().tolist() == [-1, 1]
    assert draw["uniform"][0].abs().max() <= math.sqrt(3)
    squares = sum(z.double().square().sum() for z in draw["sphere"])
    assert squares.item() == pytest.approx(30 * 40 + 9 + 1, rel=1e-5)
    assert all(len(z.unique()) == 1 for z in draw["constant"])
    box = draw["randrect"][0] != 0
    rows, cols = box.any(1).nonzero(), box.any(0).nonzero()
    assert 0 < box.sum() < box.numel()
    inside = box[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    assert inside.all()
    assert inside.sum() == box.sum()


def test_rectangles_reach_every_element():
    """TB12's slices never had the last element, nor any of dimensions of size 2."""
    seen = torch.zeros(2, 5, dtype=torch.bool)
    for d in range(60):
        (z,) = sample("randrect", [torch.empty(2, 5)], Source(0, 0, d))
        assert (z != 0).any()
        seen |= z != 0
    assert seen.all()


def test_functions_are_samplers():
    """TB16: they are called with the tensor and a generator of its device."""

    def signs(tensor, generator):
        return torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1

    a, b = pair(), pair()
    state = torch.get_rng_state()
    first = run(RandomSearch(a, signs, seed=2), a, 9)
    assert run(RandomSearch(b, signs, seed=2), b, 9) == first
    assert torch.equal(torch.get_rng_state(), state)
    saved = RandomSearch(a, signs).state_dict()
    assert saved["param_groups"][0]["sampler"] == "<function>"
    with pytest.raises(ValueError, match="sampler was a function when the state was saved"):
        RandomSearch(b).load_state_dict(saved)
    other = RandomSearch(b, lambda t, g: signs(t, g))
    other.load_state_dict(saved)
    assert callable(other.param_groups[0]["sampler"])
    for bad, error in [(lambda t, g: 1.0, TypeError), (lambda t, g: torch.ones(7), ValueError)]:
        with pytest.raises(error, match="sampler must return"):
            run(RandomSearch(a, bad), a, 1)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: RandomSearch(p, "gauss"), ValueError, "sampler must be one of"),
        (lambda p: RandomSearch(p, lr=-1), ValueError, "lr must be finite and at least 0"),
        (lambda p: RandomSearch(p, domain=(1, 1)), ValueError, "domain must be finite with low <"),
        (lambda p: RandomSearch(p, domain=3), TypeError, "domain must be a pair"),
        (lambda p: RandomSearch(p, seed="a"), TypeError, "seed must be an int"),
        (lambda p: ShrinkingRandomSearch(p, nsteps=0), ValueError, "nsteps must be at least 1"),
        (lambda p: ShrinkingRandomSearch(p, stochastic=1), TypeError, "stochastic must be True"),
        (lambda p: AcceleratedRandomSearch(p, (0, 1), 0), ValueError, "shrink must be finite"),
        (lambda p: AcceleratedRandomSearch(p, (0, 1), 1.1), ValueError, "and at most 1"),
        (lambda p: AcceleratedRandomSearch(p, (1, 0)), ValueError, "domain must be finite with"),
        (lambda p: AcceleratedRandomSearch(p, (0, 1), restart=0), ValueError, "restart must be"),
        (lambda p: GridSearch(p, (0, 1), 0), ValueError, "step must be finite and greater"),
        (lambda p: GridSearch(p, (0, math.inf), 1), ValueError, "domain must be finite"),
        (lambda p: SequentialSearch(p, 0.0, (0, 1)), ValueError, "spacing of a grid must be"),
        (lambda p: SimulatedAnnealing(p, temp_mul=2), ValueError, "temp_mul must be finite"),
        (lambda p: SimulatedAnnealing(p, iter_per_cool=0), ValueError, "iter_per_cool must be at"),
        (lambda p: ThresholdAccepting(p, max_bad_iter=1.5), TypeError, "max_bad_iter must be an"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make(pair())
