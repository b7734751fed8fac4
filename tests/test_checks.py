"""Wrong arguments that the fuzzer found (test_fuzz.py), each refused by name now."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import D, population

import perturbed
from perturbed import Dense, EstimateQuality, SignFlip, WorkerPool, optim
from perturbed.particles import multi_copy, product, randn
from perturbed.rl import CartPole, ObservationNorm, Rollout

HUGE = 10**400  # beyond the range of a float
WORDS = np.array(["a", "b"])


def model():
    return population()[1]


def started():
    env = CartPole(2)
    env.reset(torch.arange(2))
    return env


CASES = {
    "huge-number": (lambda: optim.RandomSearch([torch.ones(1)], lr=HUGE), ValueError, "lr must be"),
    "huge-sigma": (lambda: model().set_noise(HUGE), ValueError, "sigma must be in the range"),
    "huge-spread": (
        lambda: perturbed.PSO(torch.nn.Linear(1, 1), 4, spread=HUGE), TypeError, "spread must be"
    ),
    "array-as-word": (lambda: Dense(WORDS), ValueError, "distribution must be one of"),
    "array-as-side": (lambda: SignFlip(WORDS), ValueError, "flip must be one of"),
    "array-as-mode": (
        lambda: WorkerPool(float, torch.nn.Linear(1, 1), on_timeout=WORDS),
        ValueError,
        "on_timeout must be",
    ),
    "too-many-workers": (
        lambda: WorkerPool(float, torch.nn.Linear(1, 1), workers=2**31), ValueError, "below 2^31"
    ),
    "device-index": (
        lambda: WorkerPool(float, torch.nn.Linear(1, 1), device=-1), RuntimeError, "device must be"
    ),
    "losses-list": (lambda: optim.zscore([1.0, 2.0]), TypeError, "losses must be a floating-point"),
    "losses-ints": (
        lambda: optim.centered_rank(torch.arange(4)), TypeError, "got torch.int64"
    ),  # whose ranks would all be cut to 0
    "losses-complex": (
        lambda: optim.identity(torch.ones(2, dtype=torch.cfloat)), TypeError, "got torch.complex64"
    ),
    "losses-sparse": (
        lambda: optim.nes_utilities(torch.ones(2).to_sparse()), TypeError, "must be a dense tensor"
    ),
    "values-meta": (
        lambda: optim.group_zscore(torch.ones(1, 2, 2, device="meta")), TypeError, "device meta"
    ),
    "values-none": (lambda: optim.group_zscore(None), TypeError, "values must be a tensor"),
    "ring-of-none": (lambda: optim.ring(0), ValueError, "particles must be at least 1, got 0"),
    "reach": (lambda: optim.ring(3, reach=-1), ValueError, "reach must be at least 0, got -1"),
    "grid-of-none": (lambda: optim.von_neumann(0), ValueError, "particles must be at least 1"),
    "grid-of-half": (lambda: optim.von_neumann(0.5), TypeError, "particles must be an int"),
    "sign-bool": (lambda: model().member(0, True), ValueError, "sign must be 1 or -1, got True"),
    "sign-array": (lambda: model().member(0, WORDS), ValueError, "sign must be 1 or -1"),
    "accumulate": (
        lambda: model().set_grad(torch.ones(D), accumulate=1), TypeError, "accumulate must be True"
    ),
    "draw-list": (lambda: model().set_extra_state([]), TypeError, "state must be a dictionary"),
    "draw-empty": (lambda: model().set_extra_state({}), ValueError, "there is no 'seed'"),
    "quality-none": (
        lambda: EstimateQuality().load_state_dict(None), TypeError, "state must be a dictionary"
    ),
    "quality-nan": (
        lambda: EstimateQuality().load_state_dict(
            {"count": 1, "signal": float("nan"), "noise": 0.0}
        ),
        ValueError,
        "state['signal'] must be finite",
    ),
    "source": (lambda: perturbed.Replicated(None, 1, 2), TypeError, "source must be a tensor"),
    "source-number": (
        lambda: perturbed.Replicated(torch.tensor(1.0), 1, 2), ValueError, "source must be a dense"
    ),
    "copies": (
        lambda: perturbed.Replicated(torch.ones(2), 0.5, 2), TypeError, "copies must be an int"
    ),
    "replicas": (
        lambda: perturbed.Replicated(torch.ones(2), 1, -1), ValueError, "directions must be at"
    ),
    "lanes-list": (lambda: started().load_state_dict([]), TypeError, "state must be a dictionary"),
    "lanes-time": (
        lambda: started().load_state_dict({**started().state_dict(), "time": torch.zeros(3)}),
        ValueError,
        "state['time'] must have shape (lanes,) = (2,), got (3,)",
    ),
    "rollout-state": (
        lambda: Rollout(lambda x: x[:, :2], CartPole(2)).load_state_dict({"started": True}),
        ValueError,
        "there is no 'env'",
    ),
    "rollout-sync": (
        lambda: Rollout(lambda x: x[:, :2], CartPole(2), sync=1), TypeError, "sync must be True"
    ),
    "rollout-generation": (
        lambda: Rollout(lambda x: x[:, :2], CartPole(2), generation="a"),
        TypeError,
        "generation must be an int",
    ),
    "mask-list": (
        lambda: ObservationNorm(2).update(torch.ones(3, 2), [True]), TypeError, "mask must be a"
    ),
    "norm-dtype": (
        lambda: ObservationNorm(2).affine(torch.int64), TypeError, "dtype must be a floating-point"
    ),
    "path-number": (  # which would be an open file's
        lambda: perturbed.load_checkpoint(1), TypeError, "path must be a path, got int"
    ),
    "path-empty": (lambda: perturbed.save_checkpoint(""), ValueError, "path must be a path"),
    "folder": (lambda: perturbed.Checkpoints(None), TypeError, "folder must be a path"),
    "log": (lambda: perturbed.CSVLog(1), TypeError, "path must be a path, got int"),
    "members": (
        lambda: perturbed.evaluate_one_by_one(float, torch.nn.Linear(1, 1), ["ab"]),
        TypeError,
        "members must hold numbers",
    ),
    "no-closure": (
        lambda: perturbed.NES(m := model(), torch.optim.SGD(m.parameters(), 0.1)).step(None),
        TypeError,
        "closure must be callable, got NoneType",
    ),
    "no-function": (
        lambda: product(torch.nn.Linear(1, 1)).unary(None), TypeError, "function must be callable"
    ),
    "like": (lambda: randn(None, 0), TypeError, "like must be an nn.Module or a product"),
    "frozen": (lambda: product(torch.nn.Linear(1, 1), None, 1), TypeError, "frozen must be True"),
    "lists": (lambda: multi_copy([1], [torch.ones(1)]), TypeError, "the list must hold tensors"),
    "steps": (lambda: CartPole(2, max_steps=HUGE), ValueError, "max_steps must be below 2^63"),
    "decay": (
        lambda: optim.SPSA([torch.nn.Parameter(torch.ones(1))], magn_decay=2**31),
        ValueError,
        "magn_decay must be",
    ),
    "opt": (
        lambda: optim.RandomGrad([torch.nn.Parameter(torch.ones(1))], opt=1),
        TypeError,
        "opt must be a torch.optim.Optimizer, got int",
    ),
    "model": (
        lambda: optim.SwarmOfOptimizers(None, torch.optim.SGD), TypeError, "model must be a"
    ),
    "sparse-rows": (
        lambda: model().replicate(torch.eye(6).to_sparse()), TypeError, "x must be a dense tensor"
    ),
    "sparse-values": (
        lambda: model().member_mean(torch.eye(D).to_sparse()), TypeError, "must be a dense tensor"
    ),
    "show": (lambda: perturbed.Progress([None]), TypeError, "show must be a list of names"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CASES.values(), ids=CASES)
def test_wrong_arguments_are_refused_by_name(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(words)):
        call()
    assert not list(Path().iterdir())


def test_the_neighbours_of_a_huge_grid_take_no_search():
    with pytest.raises((RuntimeError, TypeError)):
        optim.von_neumann(2**63)  # no room for the grid; its divisors would take centuries
