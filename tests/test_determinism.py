"""The same bits from any number of threads, in any process, and from any instruction set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainers
from torch import nn
from trainers import TRAINERS

import perturbed
from perturbed import _C
from perturbed.description import digest
from perturbed.testing import cpu_capability

ROOT = Path(__file__).resolve().parent.parent
NOISES = {
    "dense": perturbed.Dense(),
    "signs": perturbed.Dense("rademacher"),
    "stored": perturbed.Dense(storage="stored"),
    "low-rank": perturbed.LowRank(2),
    "sparse": perturbed.Sparse(2),
    "permuted": perturbed.Permuted(),
    "sign-flip": perturbed.SignFlip(),
}
# Trainers that sum nothing in the order of an instruction set: their steps are the same on all.
SAME_ON_ALL = [name for name in TRAINERS if name.startswith("pso-")]


def wide(noise, seed=0):
    """NES on a network that is worth eight threads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 8))
    perturbed.convert(net, 32, noise)
    pm = perturbed.PerturbedModel(net, 32, sigma=0.1, seed=seed)
    nes = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.05))
    x = torch.linspace(-1, 1, 4 * 48).view(4, 48)
    return trainers.Run(
        lambda: nes.step(lambda: pm(pm.replicate(x)).square().mean(1)), net=net, nes=nes
    )


def on_threads(count, make, steps=3):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return make().steps(steps).state()
    finally:
        torch.set_num_threads(before)


FEW = [2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 9))]
each_count = pytest.mark.parametrize("count", FEW)


@each_count
@pytest.mark.parametrize("noise", NOISES)
def test_a_run_does_not_depend_on_threads(noise, count):
    """Our sums never do. The base products are BLAS's: at these sizes its bits do not, either."""
    make = lambda: wide(NOISES[noise])  # noqa: E731
    assert on_threads(count, make) == on_threads(1, make)


@pytest.mark.slow
@each_count
@pytest.mark.parametrize("name", TRAINERS)
def test_no_trainer_depends_on_threads(name, count):
    make = lambda: TRAINERS[name](0)  # noqa: E731
    assert on_threads(count, make) == on_threads(1, make)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_ON_ALL)
def test_swarms_do_not_depend_on_the_instruction_set(name):
    states = set()
    for capability in _C.cpu_capabilities():
        with cpu_capability(capability):
            states.add(TRAINERS[name](0).steps(3).state())
    assert len(states) == 1


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_runs_on_other_instruction_sets_are_close(noise):
    """The same noise, summed in another order: 3 steps apart by roundings alone."""
    found = []
    for capability in _C.cpu_capabilities():
        with cpu_capability(capability):
            run = wide(NOISES[noise]).steps(3)
            found.append(torch.cat([p.detach().flatten() for p in run.parts["net"].parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


# ---- new processes -------------------------------------------------------------------------------


def states() -> dict[str, str]:
    """What a process prints: the states of all trainers, and of networks with every noise."""
    found = {name: make(0).steps(3).state() for name, make in TRAINERS.items()}
    return found | {name: wide(noise).steps(3).state() for name, noise in NOISES.items()}


def new_process(hash_seed: int, threads: int) -> dict[str, str]:
    environment = os.environ | {
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_new_processes_with_other_hashes():
    """Order of sets and dictionaries, addresses, the clock: nothing of it reaches a number."""
    expected = new_process(1, 1)
    assert new_process(2, 1) == expected
    assert new_process(3, 2) == expected
    assert digest(expected) == digest(states())


if __name__ == "__main__":
    print(json.dumps(states()))
