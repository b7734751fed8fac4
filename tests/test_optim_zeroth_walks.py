"""Random walks and estimates of a gradient, one candidate at a time, against plain loops."""

import math

import pytest
import torch
from searches import quadratic, run
from torch import nn

from perturbed import _C, _ops
from perturbed.noise.base import OPTIMIZER_ID, STREAM_TRIALS, stream_word
from perturbed.optim import RDSA, SPSA, RandomBestGrad, RandomGrad, RandomWalk
from perturbed.optim.zeroth.samplers import CANDIDATES

START = [0.5, -1.0, 2.0, 1.5]
SHAPES = [(3,), (1, 1)]


def pair():
    x = torch.tensor(START)
    return [nn.Parameter(x[:3].clone()), nn.Parameter(x[3:].view(1, 1).clone())]


def flat(points):
    return torch.cat([p.detach().flatten() for p in points])


def noise(draw, candidate, seed=0, rademacher=False):
    """The contract's numbers of a candidate of a draw, (4,)."""
    key = torch.tensor([_C.splitmix64(seed), draw, candidate])
    word = stream_word(OPTIMIZER_ID, STREAM_TRIALS)
    return _ops.dense_materialise(key, word, 0, 1, 1, 4, rademacher, torch.float32)[0, 0]


def loss_of(x):
    return quadratic([x]).item()


def valley(points):
    """Rosenbrock's function of two numbers; 0 at (1, 1)."""
    x, y = flat(points).double()
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


# ---- random walks ------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("opposite", [True, False])
@pytest.mark.parametrize("turn_away", [True, False])
@pytest.mark.parametrize(
    ("order", "momentum", "best_of", "retries"),
    [(1, None, 1, None), (1, 0.5, 2, None), (2, 1.0, 3, None), (3, 0.8, 2, None), (2, 1.0, 1, 2)],
)
def test_a_walk_is_the_plain_loop(
    order, momentum, best_of, retries, stochastic, opposite, turn_away
):
    points, lr = pair(), 0.15
    walk = RandomWalk(
        points, lr, order, best_of, opposite, turn_away, momentum, retries, stochastic=stochastic
    )
    got = run(walk, points, 50)
    decay = {None: 0.0}.get(momentum, momentum)
    x, draw, count, failures, want = torch.tensor(START), 0, 0, 0, []
    levels = order - 1 or (1 if decay else 0)
    directions = [torch.zeros(4) for _ in range(levels)]
    for t in range(50):
        present = loss_of(x)
        count += stochastic or t == 0
        centre = x + sum(directions) if levels else x
        moves = [lr * noise(draw, k) for k in range(best_of)]
        draw += 1
        losses = [loss_of(centre + z) for z in moves]
        count += best_of
        chosen, lowest = moves[losses.index(min(losses))], min(losses)
        success = lowest < present
        if not success:
            chosen = -moves[losses.index(max(losses))]
            if opposite:
                count += 1
                lowest = min(lowest, loss_of(centre + chosen))
                success = loss_of(centre + chosen) < present
        if success:
            x, failures = centre + chosen, 0
            for i in reversed(range(levels)):
                chosen = directions[i] + chosen
                directions[i] = chosen * decay
        else:
            failures += 1
            lowest = min(lowest, present)
            if failures == retries:
                failures = 0
                directions = [10 * lr * noise(draw, 0)] + [torch.zeros(4)] * (levels - 1)
                draw += 1
            elif levels:
                directions[-1] = directions[-1] + (chosen if turn_away else 0)
                directions = [d * decay for d in directions]
        want.append(lowest)
    assert got == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(flat(points), x, rtol=1e-4, atol=1e-5)
    assert walk.evaluations == count
    assert want[-1] < want[0]


def test_what_is_remembered_is_of_where_the_walk_is():
    """TB9: a quadratic diverged from 5 to 199 while the remembered loss stayed 5."""
    p = nn.Parameter(torch.ones(5))
    walk = RandomWalk([p], lr=2.0, stochastic=False)
    before = 5.0
    for _ in range(100):
        walk.step(lambda: p.square().sum())
        assert p.square().sum().item() == walk.progress["loss"] <= before
        before = walk.progress["loss"]
    assert before < 5
    assert 101 < walk.evaluations <= 201  # opposite moves are evaluated


@pytest.mark.parametrize("accept_equal", [False, True])
def test_plateaus(accept_equal):
    p = nn.Parameter(torch.zeros(3))
    run(RandomWalk([p], 0.1, accept_equal=accept_equal), [p], 5, lambda _: 1.0)
    assert bool(p.any()) is accept_equal


def test_penalties_and_decay():
    points = pair()
    walk = RandomWalk(points, 0.0, L1=0.5, L2=0.25, literal_wd=0.1, move_opposite=False)
    x = torch.tensor(START)

    def penalty(x):
        means = [x[:3].abs().mean() * 0.5 + x[:3].square().mean() * 0.25]
        return (means[0] + x[3].abs() * 0.5 + x[3].square() * 0.25).item() / 2

    assert run(walk, points, 1, lambda _: 1.0) == pytest.approx([1 + penalty(0.9 * x)])
    torch.testing.assert_close(flat(points), 0.9 * x)
    assert walk.best_loss == 1.0  # of the closure


@pytest.mark.parametrize("order", [1, 2])
def test_walks_find_the_valley(order):
    x = nn.Parameter(torch.tensor([-1.2, 1.0]))
    walk = RandomWalk([x], 0.1 if order == 1 else 0.02, order, best_of=3, stochastic=False)
    decay = torch.optim.lr_scheduler.ExponentialLR(walk, 0.999)
    for _ in range(2000):
        walk.step(lambda: valley([x]))
        decay.step()
    assert walk.best_loss < 0.05  # the start has 24.2


# ---- signs of moves ----------------------------------------------------------------------------


@pytest.mark.parametrize("step_opposite", [True, False])
def test_random_grad_is_the_plain_loop(step_opposite):
    points, lr, magn = pair(), 0.05, 0.01
    opt = torch.optim.SGD(points, lr)
    search = RandomGrad(points, magn, opt, step_opposite)
    got = run(search, points, 40)
    x, want = torch.tensor(START), []
    for t in range(40):
        z = noise(t, 0)
        want.append(loss_of(x))
        lower = loss_of(x + magn * z) < want[-1]
        x = x + lr * z if lower else x - lr * z if step_opposite else x
    assert got == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(flat(points), x, rtol=1e-4, atol=1e-5)
    assert search.evaluations == 80


@pytest.mark.parametrize("avgbest", [True, False])
@pytest.mark.parametrize("negate_worst", [True, False])
def test_random_best_grad_is_the_plain_loop(avgbest, negate_worst):
    points, lr, magn = pair(), 0.05, 0.1
    opt = torch.optim.SGD(points, lr)
    search = RandomBestGrad(points, magn, opt, 2, avgbest, negate_worst)
    got = run(search, points, 40)
    x, want, kinds = torch.tensor(START), [], set()
    for t in range(40):
        zs = [noise(t, k) for k in range(2)]
        want.append(loss_of(x))
        losses = [loss_of(x + magn * z) for z in zs]
        lower = [z for z, loss in zip(zs, losses, strict=True) if loss < want[-1]]
        kinds.add(len(lower))
        if lower and avgbest:
            x = x + lr * sum(lower) / len(lower)
        elif lower:
            x = x + lr * zs[losses.index(min(losses))]
        elif negate_worst:
            x = x - lr * zs[losses.index(max(losses))]
    assert got == pytest.approx(want, rel=1e-3)
    torch.testing.assert_close(flat(points), x, rtol=1e-3, atol=1e-4)
    assert search.evaluations == 120
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize("kind", [RandomGrad, RandomBestGrad, SPSA, RDSA])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
def test_where_losses_say_nothing_nothing_moves(kind, value):
    """TB17: plateaus are not walked away from, not even by Adam's momentum."""
    points = pair()
    search = kind(points, opt=torch.optim.AdamW(points, 0.1))
    run(search, points, 3)
    before = flat(points)
    run(search, points, 4, lambda _: value)
    if math.isfinite(value) and isinstance(search, SPSA):  # an estimate of 0, as of a gradient
        assert all(not p.grad.any() for p in points)
    else:
        assert torch.equal(flat(points), before)
        assert all(not p.grad.any() for p in points)


@pytest.mark.parametrize("kind", [RandomGrad, RandomBestGrad])
def test_nan_is_the_worst_of_all(kind):
    p = nn.Parameter(torch.zeros(4))
    search = kind([p])
    search.step(lambda: 1.0 if search.evaluations == 0 else math.nan)
    torch.testing.assert_close(p.grad, noise(0, 0))  # away from it
    search.step(
        lambda: math.nan if search.evaluations == (2 if kind is RandomGrad else 11) else 1.0
    )
    torch.testing.assert_close(p.grad, -noise(1, 0))  # from NaN anything is better
    assert not p.any()


def test_gradients_for_an_optimizer_of_the_caller():
    points = pair()
    points[0].grad = torch.ones(3)
    search = RandomGrad(points, 1e-2, accumulate=True)
    run(search, points, 1)
    first = points[1].grad.clone()
    torch.testing.assert_close(
        points[0].grad - 1, math.copysign(1, first / noise(0, 0)[3]) * noise(0, 0)[:3]
    )
    assert torch.equal(flat(points), torch.tensor(START))
    search.accumulate = False
    run(search, points, 1)
    torch.testing.assert_close(points[0].grad.abs(), noise(1, 0)[:3].abs())


def test_the_inner_optimizer_may_have_a_schedule():
    points = pair()
    opt = torch.optim.Adam(points, 0.1)
    search = RandomGrad(points, 1e-3, opt)
    decay = torch.optim.lr_scheduler.ExponentialLR(opt, 0.97)
    for _ in range(150):
        search.step(lambda: quadratic(points))
        decay.step()
    assert search.best_loss < 0.1
    with pytest.raises(ValueError, match="optimizer must hold parameters"):
        RandomGrad(points, opt=torch.optim.SGD(pair(), 0.1))


def test_an_inner_optimizer_that_fails_changes_nothing():
    points = pair()
    search = RandomGrad(points, 1e-2, torch.optim.LBFGS(points))  # whose step needs a closure
    with pytest.raises(TypeError):
        run(search, points, 1)
    assert torch.equal(flat(points), torch.tensor(START))
    assert search.evaluations == search.progress["draws"] == 0


# ---- SPSA and RDSA -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SPSA, RDSA])
def test_finite_differences_are_the_plain_loop(kind):
    points, lr, magn, n = pair(), 0.05, 0.01, 3
    search = kind(points, lr, magn, n, lr_decay=0.602, magn_decay=0.101, stability=5.0)
    got = run(search, points, 25)
    x, want = torch.tensor(START, dtype=torch.float64), []
    for t in range(25):
        a, c = lr * (6 / (t + 6)) ** 0.602, magn / (t + 1) ** 0.101
        estimate, seen = torch.zeros(4, dtype=torch.float64), []
        for k in range(n):
            z = noise(t, k, rademacher=kind is SPSA).double()
            seen += [loss_of(x + c * z), loss_of(x - c * z)]
            q = (seen[-2] - seen[-1]) / (2 * c)
            estimate += (q / z if kind is SPSA else q * z) / n
        x = x - a * estimate
        want.append(min(seen))
    assert got == pytest.approx(want, rel=2e-3)
    torch.testing.assert_close(flat(points).double(), x, rtol=1e-2, atol=2e-3)
    assert search.evaluations == 25 * 2 * n
    assert all(p.grad is None for p in points)  # nobody asked for it


@pytest.mark.parametrize("kind", [SPSA, RDSA])
@pytest.mark.parametrize(
    "sampler",
    [None, "uniform", "sphere", lambda t, g: torch.randint(0, 2, t.shape, generator=g) * 2.0 - 1],
)
def test_estimates_have_the_size_of_the_gradient(kind, sampler):
    """TB15: torchzero's RDSA gave 2e-6 in the place of 2."""
    if kind is SPSA and isinstance(sampler, str):
        with pytest.raises(ValueError, match="sampler must be 'rademacher' or a function"):
            kind(pair(), sampler=sampler)
        return
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    n = 4000
    search = kind([p], magn=1e-3, n=n, sampler=sampler, grad=True)
    search.step(lambda: p.square().sum())
    gradient = 2 * p.detach()
    # The estimate of an element has a variance of |g|^2 + g_i^2 at most, that of normals.
    error = math.sqrt(2 * gradient.square().sum().item() / n)
    assert (p.grad - gradient).abs().max() < 5 * error
    assert torch.equal(p.detach(), gradient / 2)  # grad=True leaves the step to the caller


def test_draws_with_a_loss_that_is_no_number_do_not_count():
    points = pair()
    search = SPSA(points, 0.1, 0.01, n=2, grad=True)
    calls = iter(range(100))
    search.step(lambda: math.nan if next(calls) == 1 else quadratic(points))
    z = noise(0, 1, rademacher=True)
    x = torch.tensor(START)
    q = (loss_of(x + 0.01 * z) - loss_of(x - 0.01 * z)) / 0.02
    torch.testing.assert_close(flat([p.grad for p in points]), q * z, rtol=1e-3, atol=1e-3)


def test_groups_have_a_scale_of_their_own():
    points = pair()
    groups = [{"params": [points[0]], "magn": 0.1}, {"params": [points[1]], "lr": 0.0}]
    search = SPSA(groups, lr=0.1, magn=1e-3, grad=True)
    search.step(lambda: 3 * points[0][0])
    z = [noise(0, g * CANDIDATES, rademacher=True) for g in range(2)]
    # The same difference of losses, 2 * 3 * 0.1 z_0, over distances of 0.1 and 0.001.
    torch.testing.assert_close(points[0].grad, 3 * z[0][0] * z[0][:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(points[1].grad[0], 300 * z[0][0] * z[1][:1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", [SPSA, RDSA])
def test_finite_differences_find_the_valley(kind):
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    search = kind([x], magn=1e-4, n=4, opt=torch.optim.Adam([x], 0.02))
    run(search, [x], 3000, valley)
    assert valley([x]) < 0.01  # the start has 24.2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: RandomWalk(p, order=0), ValueError, "order must be at least 1, got 0"),
        (lambda p: RandomWalk(p, best_of=0), ValueError, "best_of must be at least 1, got 0"),
        (lambda p: RandomWalk(p, momentum=1.5), ValueError, "momentum must be finite"),
        (lambda p: RandomWalk(p, move_opposite=1), TypeError, "move_opposite must be True"),
        (lambda p: RandomWalk(p, L2=-1), ValueError, "L2 must be finite"),
        (lambda p: RandomGrad(p, magn=0), ValueError, "magn must be finite and greater than 0"),
        (lambda p: RandomGrad(p, opt=3), TypeError, "opt must be a torch.optim.Optimizer"),
        (lambda p: RandomBestGrad(p, bestof=0), ValueError, "bestof must be at least 1, got 0"),
        (lambda p: SPSA(p, n=0), ValueError, "n must be at least 1, got 0"),
        (lambda p: SPSA(p, formula="RDSA"), ValueError, "formula must be one of .*got 'RDSA'"),
        (lambda p: RDSA(p, formula="spsa"), TypeError, "formula is that of RDSA"),
        (lambda p: RDSA(p, sampler="constant"), ValueError, "sampler must have uncorrelated"),
        (
            lambda p: SPSA(p, grad=True, opt=torch.optim.SGD(p, 0.1)),
            ValueError,
            "give grad or opt, not both",
        ),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make(pair())
