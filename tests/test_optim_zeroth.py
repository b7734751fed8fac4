"""What all searches with a scalar closure share: closure, groups, resuming, best point, noise."""

import copy
import io
import math
import pickle

import pytest
import torch
from searches import METHODS, make, parameters, quadratic, run
from torch import nn

from perturbed.description import digest
from perturbed.optim import RandomSearch
from perturbed.testing import devices

every = pytest.mark.parametrize("name", METHODS)
# For what the base does alone: no moves, several, and an optimizer inside.
some = pytest.mark.parametrize("name", ["random", "sequential", "walk-order-2", "average-grad"])


def values(points):
    return [p.detach().clone() for p in points]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the closure -------------------------------------------------------------------------------


@every
def test_gradients_are_not_recorded_and_the_global_generator_stays(name):
    points = parameters()
    optimizer = make(name, points)
    state = torch.get_rng_state()
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        return quadratic(points)

    loss = optimizer.step(closure)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert not loss.requires_grad
    assert not any(seen)
    assert len(seen) == optimizer.evaluations > 0
    assert torch.equal(torch.get_rng_state(), state)


@some
@pytest.mark.parametrize("kind", [lambda x: x.float(), lambda x: x.item(), lambda x: x[None]])
def test_losses_may_have_any_form(name, kind):
    a, b = parameters(), parameters()
    one, other = make(name, a), make(name, b)
    first = run(one, a, 6)
    assert run(other, b, 6, lambda p: kind(quadratic(p))) == pytest.approx(first, rel=5e-3)
    assert one.evaluations == other.evaluations


@some
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "closure must return the loss, got None"),
        (torch.ones(3), ValueError, r"closure must return one loss.*\(3,\)"),
        (torch.tensor(1j), TypeError, "closure must return a real loss"),
        (1j, TypeError, "closure must return a real number"),
        ("1.0", TypeError, "closure must return a real number"),
    ],
)
def test_a_wrong_loss_changes_nothing(name, value, error, message):
    points = parameters()
    optimizer = make(name, points)
    run(optimizer, points, 3)
    before, state = values(points), digest(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step(lambda: value)
    assert same(points, before)
    assert digest(optimizer.state_dict()) == state


@every
def test_a_closure_that_fails_at_any_call_changes_nothing(name):
    """... and the next step draws what that one would have drawn."""
    points, twin = parameters(), parameters()
    optimizer, other = make(name, points), make(name, twin)
    run(optimizer, points, 3)
    run(other, twin, 3)
    for at in range(4):
        before, state = values(points), digest(optimizer.state_dict())
        calls = 0

        def closure(at=at):
            nonlocal calls
            if calls == at:
                raise KeyError("simulator")
            calls += 1
            return quadratic(points)

        try:
            optimizer.step(closure)
        except KeyError:
            assert same(points, before)
            assert digest(optimizer.state_dict()) == state
        else:  # it has no more calls in a step
            assert at > 0
            run(other, twin, 1)
    assert run(optimizer, points, 3) == run(other, twin, 3)


@some
def test_backward_in_the_closure_is_refused_by_name(name):
    points = parameters()

    def closure():
        loss = quadratic(points)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"closure must not call backward\(\)"):
        make(name, points).step(closure)


@some
def test_a_closure_is_needed(name):
    with pytest.raises(TypeError, match="closure must be a function"):
        make(name, parameters()).step(None)


# ---- losses that are no numbers ----------------------------------------------------------------


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_wins(name, bad):
    points = parameters()
    optimizer = make(name, points)
    finite = []

    def closure():
        loss = quadratic(points).item()
        if optimizer.progress["evaluations"] % 3 != 1:
            return bad
        finite.append((loss, values(points)))
        return loss

    for _ in range(40):
        optimizer.step(closure)
        assert all(p.isfinite().all() for p in points)
    loss, best = min(finite, key=lambda pair: pair[0])
    assert optimizer.best_loss == loss
    assert same(optimizer.best(), best)


@every
def test_nothing_but_nan_is_no_best(name):
    points = parameters()
    optimizer = make(name, points)
    before = values(points)
    run(optimizer, points, 12, lambda p: math.nan)
    assert optimizer.best_loss == math.inf
    assert all(p.isfinite().all() for p in points)
    assert same(optimizer.best(), values(points))
    assert torch.equal(points[1], before[1])


# ---- the best point ----------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_best_point_evaluates_to_its_loss(name, dtype):
    points = parameters(dtype)
    optimizer = make(name, points)
    seen = []
    run(optimizer, points, 60, lambda p: seen.append(quadratic(p).item()) or seen[-1])
    assert optimizer.best_loss == min(seen)
    assert optimizer.evaluations == len(seen)
    assert quadratic(optimizer.best()).item() == optimizer.best_loss
    optimizer.best()[0].fill_(9)  # a copy
    optimizer.load_best()
    assert quadratic(points).item() == optimizer.best_loss
    assert {p.dtype for p in points} == {dtype}


@every
def test_it_gets_better(name):
    points = parameters()
    optimizer = make(name, points)
    start = quadratic(points).item()
    run(optimizer, points, 400)
    assert optimizer.best_loss < 0.6 * start


@every
def test_parameters_stay_the_tensors_that_they_are(name):
    points = parameters()
    frozen = points[1].detach().clone()
    pointers, view = [p.data_ptr() for p in points], points[2].t()[0]
    strides = [p.stride() for p in points]
    optimizer = make(name, points)
    run(optimizer, points, 20)
    assert [p.data_ptr() for p in points] == pointers
    assert [p.stride() for p in points] == strides
    assert torch.equal(view, points[2].t()[0])
    assert torch.equal(points[1], frozen)
    assert all(p.grad is None or p.requires_grad for p in points)


# ---- groups ------------------------------------------------------------------------------------


@every
def test_learning_rate_schedulers_attach(name):
    points = parameters()
    optimizer = make(name, points)
    lr = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step(lambda: quadratic(points))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr / 8)
    copy.deepcopy(optimizer)  # the wrapper that the scheduler put around step is left behind


@some
def test_frozen_alone_are_refused(name):
    points = [p.requires_grad_(False) for p in parameters()]
    with pytest.raises(ValueError, match="all are frozen"):
        make(name, points)
    points[0].requires_grad_(True)
    optimizer = make(name, points)
    points[0].requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        optimizer.step(lambda: quadratic(points))


@every
def test_freezing_and_groups_on_the_way(name):
    points = parameters()
    optimizer = make(name, points[:2])
    run(optimizer, points, 3)
    optimizer.add_param_group({"params": [points[2]]})
    if getattr(optimizer, "opt", None) is not None:
        optimizer.opt.add_param_group({"params": [points[2]]})
    seen = []
    run(optimizer, points, 30, lambda p: seen.append(p[2].sum().item()) or quadratic(p))
    assert len(set(seen)) > 3
    points[0].requires_grad_(False)
    held = points[0].detach().clone()
    run(optimizer, points, 12)
    assert torch.equal(points[0], held)
    assert optimizer.progress["steps"] == 45


@some
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match="params must be real"):
        make(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_options_are_those_of_a_group():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "domain": (5, 6)}]
    run(RandomSearch(groups), (a, b), 1, lambda _: -b.sum())
    assert not a.any()
    assert ((b > 5) & (b < 6)).all()


# ---- resuming ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_state_continues_bit_for_bit(name, dtype, stop):
    points = parameters(dtype)
    optimizer = make(name, points, seed=5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def steps(optimizer, scheduler, points, count):
        losses = []
        for _ in range(count):
            losses += run(optimizer, points, 1)
            scheduler.step()
        return losses

    steps(optimizer, scheduler, points, stop)
    file = io.BytesIO()
    parts = {"points": values(points), "opt": optimizer.state_dict(), "s": scheduler.state_dict()}
    torch.save(parts, file)
    straight = steps(optimizer, scheduler, points, 9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = parameters(dtype)
    resumed = make(name, again, seed=0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    resumed.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["s"])
    with torch.no_grad():
        for p, value in zip(again, saved["points"], strict=True):
            p.copy_(value)
    assert steps(resumed, schedule, again, 9) == straight
    assert same(again, values(points))
    assert digest(resumed.state_dict()) == digest(optimizer.state_dict())


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alone(name, clone):
    points = parameters()
    optimizer = make(name, points)
    run(optimizer, points, 4)
    other = clone(optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    assert run(other, theirs, 5) == run(optimizer, points, 5)
    assert same(theirs, values(points))
    assert all(a is not b for a, b in zip(theirs, points, strict=True))


@some
def test_states_that_do_not_fit_change_nothing(name):
    points = parameters()
    optimizer = make(name, points)
    run(optimizer, points, 3)
    good = optimizer.state_dict()
    before = digest(good)
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict([])
    with pytest.raises(ValueError, match="state_dict must be one of"):
        optimizer.load_state_dict({**good, "progress": {"steps": 3}})
    other = make(name, [nn.Parameter(torch.zeros(5))])
    with pytest.raises(ValueError, match=r"shapes \[\[5\]\], got \[\[2\], \[2, 2\]\]"):
        other.load_state_dict(good)
    assert digest(optimizer.state_dict()) == before


@every
def test_a_state_that_is_held_does_not_move_on(name):
    points = parameters()
    optimizer = make(name, points)
    run(optimizer, points, 3)
    held = optimizer.state_dict()
    before = digest(held)
    run(optimizer, points, 5)
    assert digest(held) == before != digest(optimizer.state_dict())


def test_moves_by_others_are_noticed():
    """A best of the old place is no measure for what was loaded since."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = RandomSearch([p])
    run(optimizer, [p], 5)
    count = optimizer.evaluations
    with torch.no_grad():
        p.fill_(30.0)
    loss = run(optimizer, [p], 1)[0]
    assert optimizer.evaluations == count + 2
    assert loss == quadratic([p]).item()


@pytest.mark.parametrize("device", devices())
@every
def test_every_device_draws_the_same(name, device):
    points, here = parameters(), parameters(device=device)
    one, other = make(name, points), make(name, here)
    torch.testing.assert_close(run(other, here, 5), run(one, points, 5), rtol=1e-4, atol=1e-5)
    assert {p.device.type for p in other.best()} == {torch.device(device).type}
