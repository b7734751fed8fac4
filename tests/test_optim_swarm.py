"""Swarm: parameters as one matrix, the model that sees them, and ways to score."""

import copy

import pytest
import torch
from torch import nn

import perturbed
from perturbed import Explicit, PerturbedModel
from perturbed.optim import Swarm


def make(particles=4, dtype=torch.float32, **options):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    net = perturbed.convert(net, particles, Explicit())
    return PerturbedModel(net, particles, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_positions_are_the_members(dtype):
    pm = make(dtype=dtype)
    swarm = Swarm(pm)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert swarm.positions.dtype == wide
    assert torch.equal(swarm.positions, swarm.read().to(wide).expand(4, -1))
    swarm.positions.copy_(torch.randn_like(swarm.positions))
    swarm.publish()
    x = torch.randn(4, 3, dtype=dtype)
    y = pm(x)
    for p in range(4):
        member = swarm.member(swarm.positions[p])
        assert not any(isinstance(m, perturbed.PerturbedLinear) for m in member.modules())
        flat = nn.utils.parameters_to_vector(member.parameters())
        assert torch.equal(flat, swarm.positions[p].to(dtype))
        torch.testing.assert_close(y[p], member(x[p]))


def test_positions_of_the_parameters_dtype_are_not_copied():
    pm = make()
    swarm = Swarm(pm)
    assert pm.members()["0.weight"].data_ptr() == swarm.positions.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_sees_the_positions_again_after_free_memory(dtype):
    pm = make(dtype=dtype)
    swarm = Swarm(pm)
    swarm.positions.copy_(torch.randn_like(swarm.positions))
    swarm.publish()
    x = torch.randn(4, 3, dtype=dtype)
    before = pm(x)
    pm.free_memory()
    swarm.publish()
    assert torch.equal(pm(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_members_that_somebody_else_gave_are_not_written_to(dtype):
    pm = make(dtype=dtype)
    swarm = Swarm(pm)
    theirs = {name: torch.ones_like(t) for name, t in pm.members().items()}
    pm.set_members(theirs)
    swarm.positions.zero_()
    swarm.publish()
    assert all((t == 1).all() for t in theirs.values())
    assert all((t == 0).all() for t in pm.members().values())


def test_other_vectors_can_be_scored():
    pm = make()
    swarm = Swarm(pm)
    x = torch.randn(4, 3)

    def score():
        return pm(x).square().sum(1)

    own = swarm.score(score)
    others = torch.randn_like(swarm.positions)
    got = swarm.score(score, others)
    want = [swarm.member(v)(row).square().sum() for v, row in zip(others, x, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))
    assert torch.equal(score(), own)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        swarm.score(fail, others)
    assert torch.equal(score(), own)


def test_a_plain_module_is_each_particle_in_turn_and_then_itself_again():
    net = nn.Linear(2, 2)
    before = [p.clone() for p in net.parameters()]
    swarm = Swarm(net, 3)
    swarm.positions.copy_(torch.randn(3, 6))
    values = swarm.values(swarm.score(lambda net: net.weight.sum().item() + net.bias.sum().item()))
    torch.testing.assert_close(values, swarm.positions.double().sum(1), rtol=1e-5, atol=1e-6)
    calls = []

    def fail(net):
        calls.append(net)
        if len(calls) == 2:
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError):
        swarm.score(fail)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_frozen_and_tied_parameters():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.requires_grad_(False)
    net[2].weight = net[1].weight
    swarm = Swarm(net, 2)
    assert list(swarm.parameters) == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert swarm.positions.shape == (2, 18)
    member = swarm.member(torch.arange(18.0))
    assert member[2].weight is member[1].weight
    assert torch.equal(member[1].weight.flatten(), torch.arange(3.0, 12.0))
    assert torch.equal(member[0].weight, net[0].weight)


def test_parameters_may_be_single_numbers():
    net = nn.Module()
    net.x = nn.Parameter(torch.tensor(2.0))
    swarm = Swarm(net, 3)
    swarm.positions.copy_(torch.arange(3.0)[:, None])
    assert swarm.score(lambda net: net.x).tolist() == [0, 1, 2]
    swarm.write(torch.tensor([5.0]))
    assert net.x == 5


def test_windows_of_the_model_are_allowed():
    pm = make(6)
    swarm = Swarm(pm)
    swarm.positions.copy_(torch.randn_like(swarm.positions))
    swarm.publish()
    x = torch.randn(6, 3)
    whole = pm(x)
    with pm.window(2, 3):
        part = pm(x[2:5])
    assert torch.equal(part, whole[2:5])


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        Swarm(3)
    with pytest.raises(ValueError, match="particles must be given for a plain module"):
        Swarm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="particles must be at least 1, got 0"):
        Swarm(nn.Linear(2, 2), 0)
    with pytest.raises(TypeError, match="particles must be an int"):
        Swarm(nn.Linear(2, 2), 2.0)
    with pytest.raises(ValueError, match="nothing to move"):
        Swarm(nn.Linear(2, 2).requires_grad_(False), 2)
    with pytest.raises(ValueError, match="nothing to move"):
        Swarm(nn.ReLU(), 2)
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.complex64"):
        Swarm(nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}), 2)
    with pytest.raises(ValueError, match="directions, 4, or None, got 5"):
        Swarm(make(4), 5)
    noisy = PerturbedModel(perturbed.convert(nn.Linear(2, 2), 4), 4)
    with pytest.raises(ValueError, match=r"must have noise=Explicit\(\)"):
        Swarm(noisy)
    net = perturbed.convert(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 4, Explicit(), exclude="1"
    )
    with pytest.raises(ValueError, match=r"\['1.weight', '1.bias'\] are of layers"):
        Swarm(PerturbedModel(net, 4))


def test_values_of_another_length_or_kind():
    swarm = Swarm(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"one per particle, \(3,\), got \(4,\)"):
        swarm.values([1, 2, 3, 4])
    with pytest.raises(TypeError, match="values must be a tensor of numbers"):
        swarm.values(["a", "b", "c"])
    assert swarm.values([1, 2, 3]).dtype == torch.float64
    with pytest.raises(ValueError, match="one per row"):
        Swarm(make(4)).values(torch.zeros(5))


@pytest.mark.parametrize("kind", [perturbed.SNES, perturbed.PGPE, perturbed.PSO])
@pytest.mark.parametrize("converted", [False, True])
def test_a_parameter_frozen_on_the_way_is_named(kind, converted):
    net = nn.Linear(2, 1)
    if converted:
        perturbed.convert(net, directions=4, noise=perturbed.Explicit())
        pm = PerturbedModel(net, directions=4)
        swarm, closure = kind(pm), lambda: pm(pm.replicate(torch.ones(1, 2))).square().sum(1)
    else:
        swarm, closure = kind(net, 4), lambda net: net(torch.ones(1, 2)).detach().square().sum()
    swarm.step(closure)
    net.bias.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"parameters \['bias'\] were frozen after"):
        swarm.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    net.bias.requires_grad_(True)
    swarm.step(closure)
    assert swarm.steps == 2


@pytest.mark.parametrize("converted", [True, False])
def test_a_model_that_was_converted_since_is_named(converted):
    net = nn.Linear(2, 1)
    model = net
    if converted:
        model = perturbed.PerturbedModel(perturbed.convert(net, 4, perturbed.Explicit()), 4)
    pso = perturbed.PSO(model, 4)
    net.double()
    message = "weight was torch.float32 on cpu when the optimizer was made and is torch.float64"
    with pytest.raises(ValueError, match=message):
        pso.step(lambda *_: torch.ones(4))
    with pytest.raises(ValueError, match=message):
        pso.ask()
    assert pso.steps == 0
    net.float()
    pso.step(lambda *_: torch.ones(4) if converted else 1.0)


@pytest.mark.parametrize("kind", [perturbed.PSO, perturbed.SNES])
@pytest.mark.parametrize("lost", ["free_memory", "deepcopy"])
def test_members_lost_between_ask_and_tell_come_back_with_ask(kind, lost):
    net = perturbed.convert(nn.Linear(2, 1), 4, perturbed.Explicit())
    optimizer = kind(perturbed.PerturbedModel(net, 4))
    optimizer.ask()
    if lost == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer.swarm.pm.free_memory()
    pm, x = optimizer.swarm.pm, torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"call set_members\(\), or ask\(\) of the optimizer"):
        pm(x)
    assert optimizer.ask() is not None
    optimizer.tell(pm(x).square().mean(1))
    assert optimizer.steps == 1
