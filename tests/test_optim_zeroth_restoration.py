"""The toy problem Restoration: what it counts, and that methods that learn beat chance on it."""

import math

import pytest
import torch
from searches import METHODS, make

from perturbed.optim import Restoration, SwarmOfOptimizers
from perturbed.testing import assert_bitwise_equal


def test_it_begins_at_normals_of_its_seed():
    state = torch.get_rng_state()
    a, b, other = Restoration(seed=3), Restoration(seed=3), Restoration(torch.zeros(2, 500), seed=4)
    assert_bitwise_equal(a.x, b.x)
    assert other.x.shape == (2, 500)
    assert abs(other.x.mean()) < 5 / math.sqrt(1000)
    assert abs(other.x.var() - 1) < 5 * math.sqrt(2 / 1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.target.tolist() == pytest.approx([i / 10 for i in range(10)])
    assert a().item() == a.losses[0] == (a.x - a.target).square().mean().item()
    assert [n for n, _ in a.named_parameters()] == ["x"]


@pytest.mark.parametrize("name", METHODS)
def test_every_search_runs_on_it(name):
    problem = Restoration()
    start = (problem.x - problem.target).square().mean().item()
    search = make(name, problem.parameters())
    found = problem.evaluate(search, evaluations=300)
    assert 300 <= len(problem.losses) == search.evaluations
    assert found == min(problem.losses[:300]) >= search.best_loss
    assert found < start


def test_optimizers_with_gradients_and_swarms_run_too():
    problem = Restoration()
    assert problem.evaluate(torch.optim.SGD(problem.parameters(), 1.0), 50, backward=True) < 1e-6
    assert len(problem.losses) == 50
    problem = Restoration()
    swarm = SwarmOfOptimizers(problem, lambda p: torch.optim.SGD(p, 1.0), 3, gradients="backward")
    assert problem.evaluate(swarm, 60) < 1e-3
    assert swarm.evaluations == 60


def test_losses_that_are_no_numbers_do_not_win():
    values = iter([math.nan, 3.0, -math.inf, 2.0, 1.0])
    problem = Restoration(loss=lambda x, target: next(values))
    search = make("random", problem.parameters())
    assert problem.evaluate(search, evaluations=4) == 2.0
    assert problem.evaluate(search, evaluations=5) == 1.0  # goes on where it stopped
    nothing = Restoration(loss=lambda x, target: math.nan)
    assert nothing.evaluate(make("random", nothing.parameters()), 3) == math.inf


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        Restoration([1.0])
    with pytest.raises(ValueError, match=r"floating-point elements, got shape \(2,\) of torch.int"):
        Restoration(torch.arange(2))
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        Restoration(torch.empty(0))
    with pytest.raises(TypeError, match="loss must be a function"):
        Restoration(loss="mse")
    problem = Restoration()
    search = make("random", problem.parameters())
    with pytest.raises(ValueError, match="evaluations must be at least 1, got 0"):
        problem.evaluate(search, 0)
    with pytest.raises(RuntimeError, match="optimizer must call its closure"):
        problem.evaluate(Deaf(problem.parameters(), {}), 1)


class Deaf(torch.optim.Optimizer):
    """Does not evaluate anything."""

    def step(self, closure=None):
        return None
