"""FDSA and ResidualFeedback against plain loops."""

import math

import pytest
import torch
from searches import quadratic, run
from torch import nn

import perturbed
from perturbed.optim import FDSA, ResidualFeedback
from perturbed.optim.zeroth.samplers import Source

START = [0.5, -1.0, 2.0, 1.5]


def pair():
    x = torch.tensor(START, dtype=torch.float64)
    return [nn.Parameter(x[:3].clone()), nn.Parameter(x[3:].view(1, 1).clone())]


def flat(points):
    return torch.cat([p.detach().flatten() for p in points])


def noise(draw):
    return Source(0, draw, 0).normals([torch.empty(4, dtype=torch.float64)])[0]


def cubic(points):
    return float((flat(points) ** 3).sum())


def test_differences_of_elements_are_the_plain_loop():
    points, c = pair(), 0.1
    search = FDSA(points, lr=0.05, magn=c, lr_decay=0.602, magn_decay=0.101, stability=5.0)
    got = run(search, points, 6, cubic)
    x, want = torch.tensor(START, dtype=torch.float64), []
    for t in range(6):
        a, c = 0.05 * (6 / (t + 6)) ** 0.602, 0.1 / (t + 1) ** 0.101
        sides = [[cubic([x + s * c * e]) for s in (1, -1)] for e in torch.eye(4).double()]
        want.append(min(loss for pair in sides for loss in pair))
        x = x - a * x.new_tensor([(up - down) / (2 * c) for up, down in sides])
    assert got == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(flat(points), x)
    assert search.evaluations == 6 * 8


def test_they_are_the_gradient():
    points = pair()
    search = FDSA(points, magn=1e-4, grad=True)
    run(search, points, 1)
    want = 2 * (torch.tensor(START, dtype=torch.float64) - 0.75)
    torch.testing.assert_close(flat([p.grad for p in points]), want, rtol=1e-6, atol=1e-6)
    assert flat(points).tolist() == START


def test_an_element_without_two_losses_has_no_difference():
    points, calls = pair(), iter(range(100))
    search = FDSA(points, grad=True)
    search.step(lambda: math.nan if next(calls) in (2, 5) else quadratic(points))
    assert [x == 0 for x in flat([p.grad for p in points]).tolist()] == [False, True, True, False]
    assert math.isnan(search.step(lambda: math.nan))
    assert not flat([p.grad for p in points]).any()


def test_residual_feedback_is_the_plain_loop():
    points, lr, c = pair(), 0.002, 0.1
    search = ResidualFeedback(points, lr, c)
    got = run(search, points, 40)
    x, want, before = torch.tensor(START, dtype=torch.float64), [], None
    for t in range(40):
        z = noise(t)
        want.append(quadratic([x + c * z]).item())
        if before is not None:
            x = x - lr * (want[-1] - before) / c * z
        before = want[-1]
    assert got == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(flat(points), x, rtol=1e-6, atol=1e-6)
    assert search.evaluations == 40


def test_residual_feedback_is_right_on_average():
    """The mean of many estimates at one point is the gradient, within 5 standard errors."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    search = ResidualFeedback([p], magn=0.1, grad=True)
    estimates = []
    for _ in range(1000):
        search.step(lambda: p.square().sum())
        estimates.append(p.grad.clone())
    found = torch.stack(estimates[1:])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - 2 * p.detach()).abs() < 5 * error).all()
    assert (error < 0.5).all()
    assert not estimates[0].any()  # nothing to compare the first loss with


def test_residual_feedback_looks_again_after_a_loss_that_is_no_number():
    points = pair()
    search = ResidualFeedback(points, grad=True)
    values = iter([1.0, math.nan, 1.0, 3.0])
    moved = []
    for _ in range(4):
        search.step(lambda: next(values))
        moved.append(bool(flat([p.grad for p in points]).any()))
    assert moved == [False, False, False, True]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: FDSA(p, n=3), TypeError, "FDSA has no n; SPSA has"),
        (lambda p: FDSA(p, seed=3, sampler="normal"), TypeError, "has no sampler, seed"),
        (lambda p: FDSA(p, magn=0), ValueError, "magn must be finite and greater than 0"),
        (lambda p: ResidualFeedback(p, formula="spsa"), TypeError, "has no formula"),
        (lambda p: ResidualFeedback(p, chunk=2), TypeError, "has no chunk"),
        (lambda p: ResidualFeedback(p, sampler="randrect"), ValueError, "uncorrelated"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make(pair())


@pytest.mark.parametrize("kind", [FDSA, ResidualFeedback])
def test_populations_are_refused(kind):
    net = perturbed.convert(nn.Linear(2, 1), 4, perturbed.Dense("rademacher"))
    with pytest.raises(ValueError, match="tries one point at a time; on a PerturbedModel use SPSA"):
        kind(perturbed.PerturbedModel(net, 4, antithetic=True))
