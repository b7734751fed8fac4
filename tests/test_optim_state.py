"""States of optimizers: what is refused before anything changes, and what a state shares."""

import copy

import pytest
import torch
from torch import nn

import perturbed
from perturbed.optim import RandomSearch, SwarmOfOptimizers


def make_nes():
    net = perturbed.convert(nn.Linear(2, 1), 4)
    pm = perturbed.PerturbedModel(net, 4)
    return perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.1))


def make_of_optimizers():
    net = nn.Linear(2, 1)
    return SwarmOfOptimizers(net, lambda p: torch.optim.SGD(p, 0.1), members=3)


MAKERS = {
    "NES": make_nes,
    "PSO": lambda: perturbed.PSO(nn.Linear(2, 1), 4),
    "SNES": lambda: perturbed.SNES(nn.Linear(2, 1), 4),
    "PGPE": lambda: perturbed.PGPE(nn.Linear(2, 1), 4),
    "RandomSearch": lambda: RandomSearch(nn.Linear(2, 1).parameters()),
    "Minimize": lambda: perturbed.Minimize(nn.Linear(2, 1).parameters()),
}


def put_seed(state, seed):
    """Put a seed where a state has its own."""
    if "seed" in state:
        return {**state, "seed": seed}
    return {**state, "noise": {**state["noise"], "seed": seed}}


def flat(state):
    """Turn a state into numbers and lists that compare with ==."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat(value) for value in state]
    if isinstance(state, torch.Tensor):
        return state.tolist()
    return repr(state)  # NaN equals itself then


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", [None, "3", 1.5])
def test_a_seed_that_is_none_is_refused_and_changes_nothing(name, seed):
    if name == "Minimize":
        pytest.importorskip("scipy", reason="Minimize needs scipy (the extra `scipy`)")
    optimizer = MAKERS[name]()
    before = copy.deepcopy(flat(optimizer.state_dict()))
    with pytest.raises(TypeError, match="seed must be an int, got"):
        optimizer.load_state_dict(put_seed(MAKERS[name]().state_dict(), seed))
    assert flat(optimizer.state_dict()) == before


@pytest.mark.parametrize("name", ["PSO", "SNES", "PGPE"])
def test_a_state_that_is_held_does_not_move_on(name):
    optimizer = MAKERS[name]()
    state = optimizer.state_dict()
    before = copy.deepcopy(flat({k: v for k, v in state.items() if k != "optimizer"}))
    for _ in range(3):
        optimizer.step(lambda net: net.weight.square().sum().item())
    assert flat({k: v for k, v in state.items() if k != "optimizer"}) == before
    assert flat(optimizer.state_dict()) != flat(state)


@pytest.mark.parametrize("name", ["PSO", "SNES"])
def test_loading_copies_no_members(name, monkeypatch):
    """The names of a state are checked without making one."""
    optimizer = MAKERS[name]()
    state = optimizer.state_dict()
    monkeypatch.setattr(type(optimizer), "state_dict", None)
    optimizer.load_state_dict(state)
