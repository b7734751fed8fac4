"""swarm_move_ and uniforms: the bits of their twins, whatever the cutting of the work.

In float64 torch has no fused multiply-add, so that there the operator is held to the twin's digits
and, like float32, to itself on every instruction set and number of threads. Argument errors and
empty problems are in test_ops_swarm_rules.py.
"""

import itertools
import math
import random

import pytest
import torch
from ops import (
    assert_close,
    check_registration,
    documented_program,
    each_accumulator,
    each_device,
    make_key,
    stream,
)

from perturbed import _C, _ops, reference
from perturbed.testing import assert_bitwise_equal, cpu_capability

WALLS = {"free": (0, None, None), "clip": (1, -0.6, 0.7), "reflect": (2, -0.6, 0.7)}
each_bounds = pytest.mark.parametrize("walls", WALLS)

# (P, N): one element, odd sizes, cut blocks of columns (4096), and more than one tile of particles.
SIZES = [(1, 1), (2, 3), (5, 51), (4, 64), (6, 1025), (3, 4096), (10, 4100), (1300, 60), (2, 40000)]


def swarm(particles, cols, dtype=torch.float32, device="cpu", walls="free", seed=0, **changes):
    """Arguments of swarm_move_: every other particle has improved, guides go in all directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    bounds, lower, upper = WALLS[walls]

    def wall(value):
        return None if value is None else torch.tensor([value], dtype=dtype, device=device)

    arguments = {
        "position": draw(particles, cols),
        "velocity": 0.3 * draw(particles, cols),
        "best": draw(particles, cols),
        "improved": (torch.arange(particles) % 2 == 0).to(device),
        "guide": torch.randint(particles, (particles,), generator=generator).to(device),
        "key": make_key(device, first=5),
        "coefficients": torch.tensor([0.73, 1.5, 1.4], dtype=torch.float64, device=device),
        "limit": torch.tensor([0.8], dtype=dtype, device=device),
        "lower": wall(lower),
        "upper": wall(upper),
        "stream": stream(11),
        "per_dimension": True,
        "antithetic": False,
        "bounds": bounds,
    }
    return arguments | changes


def move(arguments):
    """What swarm_move_ makes of position, velocity and best; it leaves the rest alone."""
    changed = {n: arguments[n].clone() for n in ("position", "velocity", "best")}
    others = {n: v.clone() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    assert _ops.swarm_move_(**arguments | changed) is None
    for name, value in others.items():
        assert_bitwise_equal(arguments[name], value)
    return tuple(changed.values())


def check(arguments):
    for got, expected in zip(move(arguments), reference.swarm_move(**arguments), strict=True):
        if got.dtype == torch.float64:
            assert_close(got, None, expected, None)
        else:
            assert_bitwise_equal(got, expected)


# ---- the step ------------------------------------------------------------------------------------


@each_bounds
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_on_every_instruction_set(capability, size, walls):
    check(swarm(*size, walls=walls))


@each_bounds
@each_accumulator
@each_device
def test_every_dtype_and_device(device, dtype, walls):
    check(swarm(7, 70, dtype, device, walls))


@each_accumulator
@pytest.mark.parametrize("antithetic", [False, True], ids=["plain", "antithetic"])
@pytest.mark.parametrize("per_dimension", [False, True], ids=["whole", "per_dimension"])
@pytest.mark.parametrize("size", [(2, 5), (6, 1030), (4, 17000)], ids=str)
@each_device
def test_random_pairs(device, size, per_dimension, antithetic, dtype):
    changes = {"per_dimension": per_dimension, "antithetic": antithetic}
    check(swarm(*size, dtype, device, **changes))


@each_accumulator
@each_device
def test_limits_of_each_element(device, dtype):
    generator = torch.Generator().manual_seed(1)
    limit, lower, upper = torch.rand(3, 2000, generator=generator, dtype=torch.float64).to(dtype)
    walls = {"limit": limit, "lower": -lower, "upper": upper}
    walls = {name: value.to(device) for name, value in walls.items()}
    for bounds, n in itertools.product((1, 2), (2000, 33)):
        cut = {name: value[:n].contiguous() for name, value in walls.items()}
        check(swarm(4, n, dtype, device, **cut, bounds=bounds))


@each_device
def test_one_wall_leaves_the_other_side_open(device):
    for bounds, name in itertools.product((1, 2), ("lower", "upper")):
        arguments = swarm(4, 100, device=device, walls="clip", bounds=bounds) | {name: None}
        check(arguments)
        position = move(arguments)[0]
        assert (position < -0.6).any() == (name == "lower")
        assert (position > 0.7).any() == (name == "upper")


@each_bounds
@each_accumulator
def test_float64_has_one_result(dtype, walls):
    """The same bits on every instruction set and number of threads."""
    for size in ((40, 51), (200, 300), (3, 20000), (64, 17000)):
        arguments = swarm(*size, dtype, walls=walls)
        expected = move(arguments)
        before = torch.get_num_threads()
        try:
            for name, threads in itertools.product(_C.cpu_capabilities(), (1, 2, 5)):
                torch.set_num_threads(threads)
                with cpu_capability(name):
                    for got, bits in zip(move(arguments), expected, strict=True):
                        assert_bitwise_equal(got, bits)
        finally:
            torch.set_num_threads(before)


@each_device
def test_a_guide_has_its_new_best(device):
    """However particles are ordered: all follow one that has improved, and it follows itself."""
    arguments = swarm(6, 5000, device=device, guide=torch.full((6,), 2, device=device))
    assert arguments["improved"][2]
    check(arguments)
    _, velocity, best = move(arguments)
    assert_bitwise_equal(best[2], arguments["position"][2])
    # Nothing attracts the guide: it is at both bests, and only slows down.
    inertia = torch.tensor(0.73, device=device)
    assert_bitwise_equal(velocity[2], (inertia * arguments["velocity"][2]).clamp(-0.8, 0.8))


@each_device
def test_particles_of_a_shard_move_as_in_the_whole(device):
    """Particles that follow themselves know nothing of the others but for their index."""
    whole = swarm(9, 300, device=device, guide=torch.arange(9, device=device))
    expected = move(whole)
    for begin, end in ((0, 4), (4, 9)):
        rows = {n: whole[n][begin:end].contiguous() for n in ("position", "velocity", "best")}
        rows["improved"] = whole["improved"][begin:end].contiguous()
        rows["guide"] = torch.arange(end - begin, device=device)
        key = whole["key"] + torch.tensor([0, 0, begin], device=device)
        for got, bits in zip(move(whole | rows | {"key": key}), expected, strict=True):
            assert_bitwise_equal(got, bits[begin:end])


@each_device
def test_mirrored_particles_have_mirrored_pulls(device):
    """With the same start, the moves of a pair add up to that of the pulls' means."""
    arguments = swarm(6, 400, torch.float64, device, antithetic=True)
    for name in ("position", "velocity", "best"):
        arguments[name] = arguments[name][:3].repeat(2, 1)
    arguments["improved"] = torch.zeros(6, dtype=torch.bool, device=device)
    arguments["guide"] = torch.tensor([1, 2, 0] * 2, device=device)
    arguments["limit"] = torch.tensor([math.inf], dtype=torch.float64, device=device)
    x, best = arguments["position"][:3], arguments["best"][:3]
    # r1 + (1 - r1) = 1, and so for r2.
    total = 2 * 0.73 * arguments["velocity"][:3] + 1.5 * (best - x) + 1.4 * (best[[1, 2, 0]] - x)
    velocity = move(arguments)[1]
    torch.testing.assert_close(velocity[:3] + velocity[3:], total, rtol=0, atol=1e-14)
    assert not torch.equal(velocity[:3], velocity[3:])


@each_bounds
@each_device
def test_nan_stays_where_it_is(device, walls):
    """A lost particle, not improved, is nobody's guide: no other element notices."""
    arguments = swarm(6, 200, device=device, walls=walls)
    arguments["guide"] = torch.tensor([0, 2, 2, 4, 4, 0], device=device)
    expected = move(arguments)
    arguments["position"][1] = math.nan
    arguments["velocity"][3, 7] = math.nan
    position, velocity, best = move(arguments)
    assert position[1].isnan().all()
    assert velocity[1].isnan().all()
    assert position[3, 7].isnan()
    assert velocity[3, 7].isnan()
    others = torch.ones(6, 200, dtype=torch.bool, device=device)
    others[1], others[3, 7] = False, False
    for got, bits in zip((position, velocity), expected[:2], strict=True):
        assert_bitwise_equal(got[others], bits[others])
    assert_bitwise_equal(best, expected[2])


@each_device
def test_infinite_steps_are_limited(device):
    arguments = swarm(2, 40, device=device)
    arguments["velocity"][0] = math.inf
    arguments["velocity"][1] = -math.inf
    position, velocity, _ = move(arguments)
    assert (velocity[0] == 0.8).all()
    assert (velocity[1] == -0.8).all()
    assert_bitwise_equal(position, arguments["position"] + velocity)


@each_device
def test_walls_hold(device):
    """Clipped particles stop, mirrored ones turn round; none leaves, however fast."""
    arguments = swarm(8, 500, device=device, walls="reflect")
    arguments["limit"] = torch.tensor([math.inf], device=device)
    arguments["velocity"] *= 20
    free = move(arguments | {"bounds": 0, "lower": None, "upper": None})
    outside = (free[0] < -0.6) | (free[0] > 0.7)
    assert outside.any()
    assert not outside.all()
    for bounds in (1, 2):
        position, velocity, _ = move(arguments | {"bounds": bounds})
        assert (position >= -0.6000001).all()
        assert (position <= 0.7000001).all()
        assert_bitwise_equal(position[~outside], free[0][~outside])
        assert_bitwise_equal(velocity[~outside], free[1][~outside])
        turned = torch.zeros_like(free[1]) if bounds == 1 else -free[1]
        assert_bitwise_equal(velocity[outside], turned[outside])


def test_the_contract_by_hand():
    """One element of each half of an antithetic swarm, from the program of docs/conventions.md."""
    program = documented_program()
    # 0.5 and the like are exact, so that two roundings are one: inertia 0, c1 = 1, c2 = 2.
    arguments = swarm(
        4,
        9,
        torch.float64,
        position=torch.zeros(4, 9, dtype=torch.float64),
        best=torch.full((4, 9), 0.5, dtype=torch.float64),
        improved=torch.zeros(4, dtype=torch.bool),
        coefficients=torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
        limit=torch.tensor([math.inf], dtype=torch.float64),
        antithetic=True,
    )
    velocity = move(arguments)[1]
    for p, col in itertools.product(range(4), range(9)):
        r1, r2 = program["uniform_pair"](99, 3, 2, 11, 5 + p % 2, col)
        if p >= 2:
            r1, r2 = 1 - r1, 1 - r2
        assert velocity[p, col] == 0.5 * r1 + 2 * 0.5 * r2


# ---- uniform numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 64), (4, 1023), (3, 3000), (700, 6)], ids=str)
def test_uniforms_on_every_instruction_set(capability, size):
    arguments = (make_key(first=3), stream(12), 2, *size)
    single = _ops.uniforms(*arguments, torch.float32)
    assert_bitwise_equal(single, reference.uniforms(*arguments, torch.float32))
    double = _ops.uniforms(*arguments, torch.float64)
    assert_bitwise_equal(double, single.double())
    assert_bitwise_equal(double, reference.uniforms(*arguments, torch.float64))


@each_device
def test_uniforms_are_those_of_the_contract(device):
    program = documented_program()
    numbers = _ops.uniforms(make_key(device, first=3), stream(12), 2, 3, 10, torch.float64)
    for d, col in itertools.product(range(3), range(10)):
        assert numbers[d, col].item() == program["uniform"](99, 3, 2, 12, 5 + d, col)


@each_device
def test_any_range_of_uniforms_is_a_slice_of_the_whole(device):
    key = make_key(device)
    whole = _ops.uniforms(key, stream(12), 0, 20, 77, torch.float32)
    for first, count in ((0, 20), (3, 5), (19, 1)):
        part = _ops.uniforms(key, stream(12), first, count, 77, torch.float32)
        assert_bitwise_equal(part, whole[first : first + count])


def test_threads_do_not_change_uniforms():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(_ops.uniforms(make_key(), stream(12), 0, 30, 5000, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert_bitwise_equal(results[1], results[0])
    assert_bitwise_equal(results[2], results[0])


def test_words_at_the_edges():
    """The smallest and the largest word stay inside (0, 1), and complements mirror exactly."""
    words = [0, 1, 2**31, 2**32 - 1, *random.Random(0).choices(range(2**32), k=200)]

    def uniform(word):
        return (2 * (word >> 9) + 1) / 2**24

    for word in words:
        u = uniform(word)
        assert torch.tensor(u, dtype=torch.float32).item() == u
        assert 0 < u < 1
        assert uniform(~word % 2**32) == 1 - u


def test_uniforms_are_uniform():
    """Mean, variance and the largest gap to the distribution (Kolmogorov), within 5 sigma."""
    n = 1 << 20
    u = _ops.uniforms(make_key(), stream(12), 0, 16, n // 16, torch.float64).flatten()
    assert 0 < u.min()
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (u.sort().values - ranks).abs().max() < 2.7 / math.sqrt(n)  # p = 1e-6


def test_pairs_are_uniform_and_independent():
    """The pulls of a step, read off swarm_move_ with c1 = 1 or c2 = 1 alone."""
    n = 1 << 18

    def pulls(own, social):
        arguments = swarm(8, n // 8, torch.float64)
        arguments["position"].zero_()
        arguments["best"].fill_(1.0)
        arguments["improved"].zero_()
        arguments["coefficients"] = torch.tensor([0.0, own, social], dtype=torch.float64)
        arguments["limit"].fill_(math.inf)
        return move(arguments)[1].flatten()

    r1, r2 = pulls(1.0, 0.0), pulls(0.0, 1.0)
    for r in (r1, r2):
        assert 0 < r.min()
        assert r.max() < 1
        assert abs(r.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs(r.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert abs(torch.corrcoef(torch.stack([r1, r2]))[0, 1]) < 5 / math.sqrt(n)
    # Neighbours in a row, and particles.
    for pair in ((r1[:-1], r2[1:]), (r1[: n // 2], r1[n // 2 :]), (r1[:-1], r1[1:])):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 5 / math.sqrt(n // 2)


# ---- registration --------------------------------------------------------------------------------


@each_bounds
def test_registration(walls):
    check_registration("swarm_move_", swarm(4, 20, walls=walls))


def test_registration_of_uniforms():
    arguments = {"key": make_key(), "stream": 11, "first": 0, "count": 3, "cols": 5}
    check_registration("uniforms", arguments | {"dtype": torch.float32})
