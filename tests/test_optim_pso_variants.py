"""Moves of a swarm: one step of each variant against a plain loop, and what all of them reach."""

import math

import pytest
import torch
from torch import nn

from perturbed import _C, PSO, _ops, reference
from perturbed.noise.base import (
    OPTIMIZER_ID,
    STREAM_SWARM,
    STREAM_SWARM_OTHER,
    stream_word,
)
from perturbed.optim import (
    VARIANTS,
    Accelerated,
    BareBones,
    CompetitiveSwarm,
    ComprehensiveLearning,
    Constriction,
    FullyInformed,
    Inertia,
    ring,
    von_neumann,
)

P, N = 6, 5
SEED = 3


class Flat(nn.Module):
    """A module that is its parameters."""

    def __init__(self, size=N, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=dtype))


def key(step):
    return torch.tensor([_C.splitmix64(SEED), step, 0])


def words(step, stream, first, cols):
    word = stream_word(OPTIMIZER_ID, stream)
    found = reference.noise.words(key(step), word, first, 1, 0, -(-cols // 4))
    return found.flatten()[:cols].tolist()


def uniform(step, first, cols, stream=STREAM_SWARM_OTHER):
    return [(2 * (w >> 9) + 1) / 2**24 for w in words(step, stream, first, cols)]


def normal(step, first, cols):
    word = stream_word(OPTIMIZER_ID, STREAM_SWARM_OTHER)
    z = reference.noise.dense_materialise(key(step), word, first, 1, 1, cols, False, torch.float64)
    return z.flatten().tolist()


def after_some_steps(variant, **options):
    """A swarm after two steps, its tensors as lists, and the losses of the third."""
    net = Flat()
    start = torch.randn(P, N, dtype=torch.float64)
    pso = PSO(net, P, variant, start=start, velocity_spread=0.0, seed=SEED, **options)
    for _ in range(2):
        pso.ask()
        pso.tell(torch.rand(P, dtype=torch.float64) + 1)
    pso.ask()
    losses = torch.rand(P, dtype=torch.float64) + torch.tensor([0, 2, 1, 0, 2, 0.5])
    f = pso.flight
    x, v, bests = (t.tolist() for t in (f.positions, f.velocities, f.bests))
    values = f.best_values.tolist()
    record, value = f.record.tolist(), float(f.record_value)
    for p in range(P):  # the bests, as the third step knows them
        if losses[p] < values[p]:
            values[p] = float(losses[p])
            if bests:
                bests[p] = list(x[p])
        if losses[p] < value:
            value, record = float(losses[p]), list(x[p])
    return pso, losses, x, v, bests, values, record


def check(pso, losses, x, v=None):
    pso.tell(losses)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(pso.flight.positions, torch.tensor(x, dtype=torch.float64), **close)
    if v is not None:
        want = torch.tensor(v, dtype=torch.float64)
        torch.testing.assert_close(pso.flight.velocities, want, **close)


def neighbourhoods(topology):
    tables = {"global": [list(range(P))] * P}
    tables["ring"] = [[(p - 1) % P, p, (p + 1) % P] for p in range(P)]
    grid = {(r, c): 3 * r + c for r in range(2) for c in range(3)}
    tables["von_neumann"] = [
        [
            grid[r, c],
            grid[r, (c + 1) % 3],
            grid[r, (c - 1) % 3],
            grid[(r + 1) % 2, c],
            grid[(r - 1) % 2, c],
        ]
        for r in range(2)
        for c in range(3)
    ]
    return tables[topology]


# ---- one step against a loop -------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["global", "ring", "von_neumann"])
@pytest.mark.parametrize("per_dimension", [True, False])
@pytest.mark.parametrize("antithetic", [True, False])
def test_classic_step_is_the_formula(topology, per_dimension, antithetic):
    weight, c1, c2 = 0.7, 1.3, 1.7
    variant = Inertia(lambda step: weight - 0.1 * (step < 2), c1, c2)
    pso = PSO(Flat(), P, variant, topology=topology, seed=SEED, max_velocity=0.5)
    options = {"topology": topology, "per_dimension": per_dimension, "max_velocity": 0.5}
    pso, losses, x, v, bests, values, _ = after_some_steps(variant, **options)
    if antithetic:
        pso.flight.mirrored = True
    for p, near in enumerate(neighbourhoods(topology)):
        guide = min(near, key=lambda q: values[q])
        mirror = antithetic and p >= P // 2
        drawn = words(2, STREAM_SWARM, p - P // 2 if mirror else p, N)
        for j in range(N):
            w = drawn[j if per_dimension else 0]
            r1, r2 = ((2 * half + 1) / 2**17 for half in (w >> 16, w & 0xFFFF))
            if mirror:
                r1, r2 = 1 - r1, 1 - r2
            now = x[p][j]
            speed = (
                weight * v[p][j] + c1 * r1 * (bests[p][j] - now) + c2 * r2 * (bests[guide][j] - now)
            )
            v[p][j] = min(0.5, max(-0.5, speed))
            x[p][j] += v[p][j]
    check(pso, losses, x, v)


def test_constriction_is_inertia_with_the_factor():
    chi = 2 / abs(2 - 4.1 - math.sqrt(4.1**2 - 4 * 4.1))
    assert Constriction().numbers(0) == (chi, chi * 2.05, chi * 2.05)
    assert chi == pytest.approx(0.7298, abs=5e-5)
    finals = []
    for variant in (Constriction(), Inertia(chi, chi * 2.05, chi * 2.05)):
        torch.manual_seed(1)
        pso = after_some_steps(variant)[0]
        finals.append(pso.flight.positions)
    assert torch.equal(*finals)


def test_bare_bones_step_is_the_formula():
    pso, losses, x, _, bests, values, _ = after_some_steps(BareBones())
    guide = values.index(min(values))
    for p in range(P):
        z = normal(2, p, N)
        for j in range(N):
            a, b = bests[p][j], bests[guide][j]
            x[p][j] = (a + b) / 2 + z[j] * abs(a - b)
    check(pso, losses, x)


@pytest.mark.parametrize("topology", [None, "von_neumann", "global"])
def test_fully_informed_step_is_the_formula(topology):
    pso, losses, x, v, bests, _, _ = after_some_steps(FullyInformed(4.2), topology=topology)
    chi = 2 / abs(2 - 4.2 - math.sqrt(4.2**2 - 4 * 4.2))
    for p in range(P):
        # In the order in which the topology names them, which is the order of the draws.
        near = {
            None: ring(P)[p].tolist(),
            "von_neumann": von_neumann(P)[p].tolist(),
            "global": list(range(P)),
        }[topology]
        u = uniform(2, p, len(near) * N)
        for j in range(N):
            pull = sum(
                u[k * N + j] * 4.2 / len(near) * (bests[q][j] - x[p][j]) for k, q in enumerate(near)
            )
            v[p][j] = chi * (v[p][j] + pull)
        x[p] = [a + b for a, b in zip(x[p], v[p], strict=True)]
    check(pso, losses, x, v)


def test_comprehensive_learning_step_is_the_formula():
    variant = ComprehensiveLearning(0.8, 1.4, patience=1)  # every particle without progress chooses
    pso, losses, x, v, bests, values, _ = after_some_steps(variant)
    before = pso.flight.extra["teachers"].tolist()
    improved = [float(losses[p]) == values[p] for p in range(P)]
    assert len(set(improved)) == 2
    teachers = []
    for p in range(P):
        u = uniform(2, p, 4 * N)
        if improved[p]:
            teachers.append(before[p])
        else:
            pc = 0.05 + 0.45 * math.expm1(10 * p / (P - 1)) / math.expm1(10)
            choice = u[N : 2 * N]
            chosen = []
            for j in range(N):
                others = [q for q in range(P) if q != p]
                a, b = (others[int(u[k * N + j] * (P - 1))] for k in (2, 3))
                learns = choice[j] < pc or choice[j] == min(choice)
                chosen.append((b if values[b] < values[a] else a) if learns else p)
            teachers.append(chosen)
        for j in range(N):
            v[p][j] = 0.8 * v[p][j] + 1.4 * u[j] * (bests[teachers[p][j]][j] - x[p][j])
            x[p][j] += v[p][j]
    check(pso, losses, x, v)
    assert pso.flight.extra["teachers"].tolist() == teachers
    assert all(any(t != p for t in teachers[p]) for p in range(P))


@pytest.mark.parametrize("phi", [0.0, 0.2])
def test_competitive_step_is_the_formula(phi):
    pso, losses, x, v, _, _, _ = after_some_steps(CompetitiveSwarm(phi))
    assert len(pso.flight.bests) == 0
    draws = uniform(2, P, P)
    order = sorted(range(P), key=lambda p: draws[p])
    mean = [sum(x[p][j] for p in range(P)) / P for j in range(N)]
    moved = [list(row) for row in x]
    for k, (a, b) in enumerate(zip(order[: P // 2], order[P // 2 :], strict=True)):
        winner, loser = (a, b) if losses[a] <= losses[b] else (b, a)
        u = uniform(2, k, 3 * N)
        for j in range(N):
            now = x[loser][j]
            v[loser][j] = (
                u[j] * v[loser][j]
                + u[N + j] * (x[winner][j] - now)
                + phi * u[2 * N + j] * (mean[j] - now)
            )
            moved[loser][j] = now + v[loser][j]
    check(pso, losses, moved, v)


def test_accelerated_step_is_the_formula():
    pso, losses, x, _, _, _, record = after_some_steps(Accelerated(0.4, 0.3, 0.9))
    for p in range(P):
        z = normal(2, p, N)
        for j in range(N):
            x[p][j] = 0.6 * x[p][j] + 0.4 * record[j] + 0.3 * 0.9**2 * z[j]
    check(pso, losses, x)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_chunks_do_not_change_the_result(variant, monkeypatch):
    torch.manual_seed(2)
    whole = after_some_steps(variant, antithetic=False)[0].flight.positions
    torch.manual_seed(2)
    monkeypatch.setattr("perturbed.optim.pso.variant.per_scratch", lambda device, size: 1)
    assert torch.equal(after_some_steps(variant)[0].flight.positions, whole)


# ---- pairs, walls, topologies ------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("start", ["around", "uniform"])
def test_antithetic_pairs_start_as_mirror_images(variant, start):
    options = {"bounds": (-1, 2)} if start == "uniform" else {}
    if VARIANTS[variant].velocities:
        options["velocity_spread"] = 0.5
    pso = PSO(Flat(), 8, variant, antithetic=True, seed=SEED, start=start, **options)
    centre = 0.5 if start == "uniform" else 0.0
    x = pso.flight.positions - centre
    torch.testing.assert_close(x[:4], -x[4:])
    assert x.abs().min() > 0
    v = pso.flight.velocities
    assert torch.equal(v[: len(v) // 2], -v[len(v) // 2 :])


def test_antithetic_pairs_move_as_mirror_images():
    """Attracted by the best of all at the centre alone, (r2, 1 - r2) sum up to 1."""
    start_at = 0.4
    net = Flat()
    with torch.no_grad():
        net.x.fill_(start_at)
    pso = PSO(net, 8, Accelerated(beta=0.5), antithetic=True, seed=SEED)
    pso.step(lambda net: -1.0)  # a tie: the first particle is the best
    x = pso.flight.positions
    centre = (x[:4] + x[4:]) / 2
    torch.testing.assert_close(centre, (start_at + pso.best).expand(4, -1) / 2)


def test_mirrored_numbers():
    pso = PSO(Flat(), 8, "bare_bones", antithetic=True, seed=SEED)
    chunks = list(pso.flight.chunks(1))
    assert [c.start for c in chunks] == [0, 4]
    first, second = (pso.flight.uniforms(c, 2) for c in chunks)
    assert all(torch.equal(a, 1 - b) for a, b in zip(first, second, strict=True))
    first, second = (pso.flight.normals(c)[0] for c in chunks)
    assert torch.equal(first, -second)


@pytest.mark.parametrize("boundary", ["clip", "reflect"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_nobody_leaves_the_bounds(variant, boundary):
    pso = PSO(Flat(), 24, variant, bounds=(-0.5, 0.25), boundary=boundary, start="uniform")
    for _ in range(40):
        assert ((pso.flight.positions >= -0.5) & (pso.flight.positions <= 0.25)).all()
        pso.tell((pso.ask() - 3).square().sum(1))
    # The corner nearest to the optimum. A uniform point is 0.375 away on the average.
    assert (pso.best - 0.25).abs().mean() < 0.15


@pytest.mark.parametrize("mode", ["clip", "reflect"])
def test_walls_in_torch_are_those_of_the_operator(mode):
    pso = PSO(Flat(7), P, "inertia", inertia=0.9, bounds=(-0.4, 0.6), boundary=mode, max_velocity=2)
    space = pso.flight.space
    x, v = torch.rand(P, 7, dtype=torch.float64) - 0.4, 3 * torch.randn(P, 7, dtype=torch.float64)
    mine = x.clone(), 0.9 * v
    space.advance(*mine)
    # Nobody is attracted: own best and guide are where everybody is.
    coefficients = torch.tensor([0.9, 0.0, 0.0], dtype=torch.float64)
    nobody = torch.zeros(P, dtype=torch.bool)
    _ops.swarm_move_(
        x, v, x.clone(), nobody, torch.arange(P), key(0), coefficients, space.limit, space.lower,
        space.upper, 0, True, False, space.mode,
    )  # fmt: skip
    torch.testing.assert_close(mine[0], x)
    torch.testing.assert_close(mine[1], v)
    assert (v == 0).any() == (mode == "clip")


def test_topologies():
    assert ring(5, reach=2).sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 5
    table = von_neumann(12)
    for p in range(12):
        r, c = divmod(p, 4)
        near = {(r, c), (r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c)}
        assert set(table[p].tolist()) == {4 * (a % 3) + b % 4 for a, b in near}
    assert set(von_neumann(7)[0].tolist()) == {0, 1, 6}
    assert ring(1).tolist() == [[0, 0, 0]]


def test_a_topology_of_ones_own_is_asked_every_step():
    asked = []

    def pairs(particles, step):
        asked.append(step)
        return torch.stack((torch.arange(particles), torch.arange(particles).flip(0)), 1)

    pso = PSO(Flat(), P, topology=pairs)
    for _ in range(2):
        pso.step(lambda net: (net.x - 1).square().sum())
    assert set(asked) == {0, 1}
    assert pso.flight.neighbours.tolist() == [[p, P - 1 - p] for p in range(P)]


# ---- what they reach ---------------------------------------------------------------------------


def sphere(net):
    return (net.x - 1).square().sum().item()


def rosenbrock(x):
    a, b = x[..., :-1], x[..., 1:]
    return (100 * (b - a.square()).square() + (1 - a).square()).sum(-1)


def rastrigin(x):
    x = x - 0.5
    return (x.square() - 10 * torch.cos(2 * math.pi * x) + 10).sum(-1)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_descends_a_sphere(variant):
    pso = PSO(Flat(dtype=torch.float32), 24, variant, start="uniform", bounds=4.0)
    for _ in range(120):
        pso.step(sphere)
    # Worst of four seeds: 0.04 (comprehensive), 2e-5 the others; a random search would reach 3.
    assert pso.best_value < (0.2 if variant == "comprehensive" else 1e-3)
    assert pso.best_value == sphere(pso.swarm.module)


@pytest.mark.parametrize("topology", ["global", "ring", "von_neumann"])
def test_constriction_finds_the_valley_of_rosenbrock(topology):
    pso = PSO(Flat(3), 24, start="uniform", bounds=2.0, topology=topology)
    for _ in range(400):
        pso.tell(rosenbrock(pso.ask()))
    assert pso.best_value < 0.02  # the start's best is at 1 to 10


def test_inertia_falls_by_schedule():
    falling = Inertia(lambda step: 0.9 - 0.5 * step / 120)
    pso = PSO(Flat(), 24, falling, start="uniform", bounds=4.0)
    for _ in range(120):
        pso.step(sphere)
    assert pso.best_value < 1e-9  # worst of four seeds: 1e-12


def test_learning_from_several_escapes_the_traps_of_rastrigin():
    """What CLPSO is for. Six seeds: 0 to 6 for the classic swarm, at most 0.002 for this one."""

    def search(variant, seed, steps=400):
        pso = PSO(Flat(), 20, variant, start="uniform", bounds=5.0, seed=seed)
        for _ in range(steps):
            pso.tell(rastrigin(pso.ask()))
        return pso.best_value

    learning = ComprehensiveLearning(lambda step: 0.9 - 0.5 * step / 400)
    assert max(search(learning, seed) for seed in (1, 2)) < 0.1
    assert min(search("constriction", seed) for seed in (1, 2)) > 0.9
