"""What a small population pays per step: few operations, and nothing remembered for too long."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import perturbed
from perturbed import ARS, NES, PSO, SNES, Explicit, PerturbedModel
from perturbed.noise.state import NoiseState
from perturbed.optim import Inertia, centered_rank

NAN, INF = math.nan, math.inf


def particles(**options):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    return PSO(PerturbedModel(perturbed.convert(net, 6, Explicit()), 6), **options)


def members(kind=NES, **options):
    torch.manual_seed(1)
    layer = perturbed.PerturbedLinear(4, 3, 4)
    pm = PerturbedModel(layer, 4, antithetic=True)
    return kind(pm, torch.optim.SGD(layer.parameters(), lr=0.1), **options)


def told(optimizer, *values):
    for value in values:
        optimizer.ask()
        optimizer.tell(value)
    return optimizer


class Count(TorchDispatchMode):
    """Counts operations; views and the creation of tensors are some."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


# ---- operations --------------------------------------------------------------------------------

MAKE = {
    "PSO": lambda: particles(),
    "PSO, ring": lambda: particles(topology="ring"),
    "SNES": lambda: SNES(nn.Linear(4, 3), members=8),
    "NES": lambda: members(),
    "ARS": lambda: members(ARS, top=2),
}
# What torch 2.13 counts (40, 56, 81, 40, 68), and a tenth for other versions. Each takes 1 to 5 us,
# of a population of 20 the larger part of a step.
OPERATIONS = {"PSO": 44, "PSO, ring": 61, "SNES": 89, "NES": 44, "ARS": 74}


@pytest.mark.parametrize("name", MAKE)
def test_operations_of_a_step(name):
    optimizer = MAKE[name]()
    size = 6 if name.startswith("PSO") else 8
    values = torch.rand(4, size)
    values = values.view(4, 2, 4) if name in ("NES", "ARS") else values
    told(optimizer, *values[:3])  # the first steps make tensors
    with Count() as count:
        told(optimizer, values[3])
    assert len(count.operations) <= OPERATIONS[name], count.operations


# ---- numbers of the last step ------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_stats_are_of_the_values_as_they_were_told(maximize):
    nes = members(maximize=maximize)
    values = torch.tensor([[1.0, -INF, 3.0, 4.0], [8.0, NAN, 6.0, INF]])
    nes.ask()
    mean = nes.tell(values)
    expected = float(mean)
    values.fill_(-100.0)
    assert nes.stats["best"] == (8 if maximize else 1)
    assert nes.stats["mean"] == expected == pytest.approx(22 / 5)
    assert nes.stats["nonfinite"] == nes.stats["nonfinite_total"] == 3


def test_totals_do_not_depend_on_when_they_are_read_and_survive_a_checkpoint():
    values = torch.rand(6, 2, 4)
    values[1, 0, :3], values[4, 1, 1] = NAN, INF
    unread = told(members(), *values)
    seen = members()
    for step, value in enumerate(values):
        told(seen, value)
        assert seen.stats["nonfinite"] == (0, 3, 0, 0, 1, 0)[step]
        other = members()
        other.load_state_dict(seen.state_dict())
        assert other.stats == seen.stats
        seen.load_state_dict(other.state_dict())
    assert seen.stats == unread.stats
    assert seen.stats["nonfinite_total"] == 4


# ---- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 1000])
def test_centred_ranks_to_the_last_bit(n, dtype):
    losses = torch.randn(n).round(decimals=1).to(dtype)
    losses[n // 2] = NAN
    clean = torch.where(losses.isfinite(), losses, INF).double()
    below = (clean < clean[:, None]).sum(1)
    through = (clean <= clean[:, None]).sum(1)
    ranks = (below + through - 1).double() / 2
    expected = ((ranks - (n - 1) / 2) / max(n - 1, 1)).to(dtype)
    assert torch.equal(centered_rank(losses), expected)


# ---- what is kept from step to step ------------------------------------------------------------


def test_tensors_of_a_draw_are_those_of_its_numbers_after_any_moves():
    state = NoiseState(8, seed=3)
    device = torch.device("cpu")
    state.tensors(device)
    moves = [
        lambda: state.next_generation(),
        lambda: state.move(3, 0, 0.5),
        lambda: state.move(4, 0, 0.5),
        lambda: state.show(2, 3),
        lambda: state.next_generation(0.25),
        lambda: state.move(-5, -1, 0.25),
        lambda: state.show(0, 8),
        lambda: state.move(-5, 2**31, 0.0),
    ]
    for move in moves:
        move()
        fresh = NoiseState(8, seed=state.seed, sigma=state.sigma)
        fresh.generation = state.generation
        fresh.first_direction = state.first_direction
        for ours, theirs in zip(state.tensors(device), fresh.tensors(device), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(state.shared_key(device), fresh.shared_key(device))


def test_a_parameter_that_is_another_gets_the_estimate():
    nes = told(members(), torch.rand(2, 4))
    pm, layer = nes.pm, nes.pm.model
    old = layer.weight
    old_grad = old.grad.clone()
    layer.weight = nn.Parameter(torch.zeros(3, 4))
    pm.set_grad(torch.ones(4))
    assert torch.equal(old.grad, old_grad)
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pm: pickle.loads(pickle.dumps(pm))])
def test_copies_of_a_model_know_their_own_parameters(copied):
    nes = told(members(), torch.rand(2, 4))
    twin = copied(nes.pm)
    twin.set_noise()
    before = nes.pm.model.weight.grad.clone()
    twin.model.weight.grad = None
    twin.set_grad(torch.ones(4))
    assert torch.equal(nes.pm.model.weight.grad, before)
    expected = twin.model.parameter_noise("weight", 0, 4).sum(0) * twin.sigma
    torch.testing.assert_close(twin.model.weight.grad, expected)
    assert not torch.equal(twin.member(0).weight, twin.model.weight)


def test_a_loaded_swarm_moves_with_coefficients_of_its_own():
    """Those of the file are of another step, and before the first one they are zeros."""
    values = torch.rand(5, 6)
    fresh = particles(variant=Inertia(0.7))
    start = copy.deepcopy(fresh.state_dict())
    used = told(particles(variant=Inertia(0.7)), *values)
    used.load_state_dict(start)
    told(fresh, *values)
    told(used, *values)
    assert torch.equal(used.flight.positions, fresh.flight.positions)
    assert torch.equal(used.flight.velocities, fresh.flight.velocities)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pso: pickle.loads(pickle.dumps(pso))])
def test_a_copy_of_a_swarm_keeps_its_best_network_up_to_date(copied):
    torch.manual_seed(1)
    values = torch.rand(8, 6).sort(0, descending=True).values
    pso = told(PSO(nn.Linear(2, 3), particles=6), *values[:4])
    twin = copied(pso)
    told(pso, *values[4:])
    told(twin, *values[4:])
    assert torch.equal(twin.best, pso.best)
    assert torch.equal(twin.swarm.read(), twin.best)
    assert torch.equal(pso.swarm.read(), pso.best)


@pytest.mark.parametrize("particles", [1, 2, 5])
def test_strangers_are_others_and_change(particles):
    pso = PSO(nn.Linear(2, 3), particles=particles)
    seen = set()
    for step in range(12):
        pso.flight.step = step
        others = pso.flight.strangers()
        own = torch.arange(particles)
        assert sorted(others.tolist()) == own.tolist()
        assert particles == 1 or (others != own).all()
        seen.add(tuple(others.tolist()))
    assert len(seen) == max(1, particles - 1)
