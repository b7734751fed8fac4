"""ClipUp: the update against its formula, where it is told to do nothing, and torch's machinery."""

import io
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed.optim import ClipUp
from perturbed.testing import devices


def parameters(device="cpu"):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s, device=device)) for s in [(3, 4), (4,), ()]]


def run_formula(points, gradients, lr, momentum, max_speed, sign=-1):
    """Toklu et al. (2020), algorithm 1, on one flat vector."""
    x, v = torch.cat([p.detach().flatten() for p in points]).double(), 0.0
    for g in gradients:
        g = torch.cat([part.flatten() for part in g]).double()
        v = momentum * v + lr * g / g.norm()
        if v.norm() > max_speed:
            v = v * max_speed / v.norm()
        x = x + sign * v
    return x


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("momentum", "max_speed"), [(0.9, None), (0.9, 0.11), (0.0, None)])
def test_steps_are_the_papers(device, foreach, maximize, momentum, max_speed):
    points = parameters(device)
    optimizer = ClipUp(
        points, 0.1, momentum, max_speed=max_speed, maximize=maximize, foreach=foreach
    )
    gradients = [[torch.randn_like(p) for p in points] for _ in range(8)]
    want = run_formula(
        points, gradients, 0.1, momentum, max_speed or 0.2, sign=1 if maximize else -1
    )
    for g in gradients:
        for p, part in zip(points, g, strict=True):
            p.grad = part
        optimizer.step()
    got = torch.cat([p.detach().flatten() for p in points])
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0]) * scale
    ClipUp([p], lr=1.0).step()
    rtol = 1e-3 if scale < 1e-37 else 1e-6  # 1e-42 has few digits
    torch.testing.assert_close(p.data, torch.tensor([-0.6, -0.8]), rtol=rtol, atol=0)


def test_no_step_is_longer_than_the_limit_and_momentum_gets_there():
    p = nn.Parameter(torch.zeros(5))
    optimizer = ClipUp([p], lr=0.1)
    lengths = []
    for _ in range(10):
        before = p.detach().clone()
        p.grad = torch.ones(5)
        optimizer.step()
        lengths.append((p - before).norm().item())
    assert lengths[0] == pytest.approx(0.1)
    assert lengths[1] == pytest.approx(0.19)
    assert lengths[2:] == pytest.approx([0.2] * 8)  # 0.271 without a limit


def test_a_gradient_of_zeros_lets_the_velocity_run_out():
    p = nn.Parameter(torch.ones(3))
    optimizer = ClipUp([p], lr=0.1, momentum=0.5)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p.data, torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = torch.zeros(3)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close((p - before).norm().item(), 0.05)


def test_groups_have_their_own_norm_and_parameters_without_gradient_rest():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = ClipUp([{"params": [a]}, {"params": [b, c], "lr": 2.0}], lr=1.0)
    a.grad, b.grad = torch.tensor([0.0, 9.0]), torch.tensor([0.01, 0.0])
    optimizer.step()
    assert torch.equal(a.data, torch.tensor([0.0, -1.0]))
    torch.testing.assert_close(b.data, torch.tensor([-2.0, 0.0]))
    assert torch.equal(c.data, torch.zeros(2))
    assert c not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_side_by_side(dtype):
    a, b = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(4))
    optimizer = ClipUp([a, b], lr=1.0)
    a.grad, b.grad = torch.full((3,), 1000.0, dtype=dtype), torch.zeros(4)
    optimizer.step()
    assert a.dtype == dtype
    torch.testing.assert_close(
        a.data.float(), torch.full((3,), -1 / math.sqrt(3)), atol=2e-3, rtol=0
    )


def test_the_default_limit_follows_a_scheduler():
    p = nn.Parameter(torch.zeros(4))
    optimizer = ClipUp([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step > 5 else 1.0)
    for _ in range(6):
        p.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.data, before)


def test_a_closure_is_evaluated_with_gradients():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = ClipUp([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9
    assert p.item() == 2.5


def test_a_state_continues_bit_for_bit():
    def advance(points, optimizer, first):
        for step in range(first, first + 4):
            generator = torch.Generator().manual_seed(step)
            for p in points:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    straight = parameters()
    optimizer = ClipUp(straight, 0.1, max_speed=0.15)
    advance(straight, optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    advance(straight, optimizer, 4)
    again = ClipUp(resumed, 9.0)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    advance(resumed, again, 4)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_it_trains_with_evolution_strategies():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    perturbed.convert(net, directions=32)
    pm = perturbed.PerturbedModel(net, 32, sigma=0.1)
    nes = perturbed.NES(pm, perturbed.ClipUp(net.parameters(), 0.15))
    x = torch.randn(16, 6)
    y = x[:, :1] * x[:, 1:2]
    targets = y.repeat_interleave(32, 0).repeat(2, 1)
    before = (net(x) - y).square().mean()
    for _ in range(60):
        nes.step(lambda: (pm(pm.replicate(x)) - targets).square().squeeze(1))
    assert (net(x) - y).square().mean() < 0.5 * before


def test_arguments_are_checked():
    p = nn.Parameter(torch.zeros(2))
    for bad in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be finite and greater than 0"):
            ClipUp([p], lr=bad)
    with pytest.raises(TypeError, match="lr must be a number, got '1'"):
        ClipUp([p], lr="1")
    with pytest.raises(ValueError, match="momentum must be finite and at least 0 and at most 1"):
        ClipUp([p], momentum=1.5)
    with pytest.raises(ValueError, match="momentum must be below 1, got 1"):
        ClipUp([p], momentum=1)
    with pytest.raises(ValueError, match="max_speed must be finite and greater than 0, got 0"):
        ClipUp([p], max_speed=0)
    with pytest.raises(ValueError, match="momentum must be"):
        ClipUp([{"params": [p], "momentum": -1.0}])
    with pytest.raises(TypeError, match="maximize must be True or False, got 1"):
        ClipUp([p], maximize=1)
    with pytest.raises(TypeError, match="foreach must be True, False or None, got 1"):
        ClipUp([p], foreach=1)
    optimizer = ClipUp([p])
    p.grad = torch.eye(2)[0].to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
