"""Wrong arguments to everything public: refused by an error that names one of them, or sensible.

Nothing may crash, hang, take gigabytes or fail from inside (AttributeError, KeyError, IndexError,
AssertionError ...). fuzz_targets.py has the callables with arguments that work, fuzz_values.py what
is put in place of one, fuzz_allowed.py what else may happen and why, and fuzz_worker.py the
processes that it happens in.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fuzz_allowed import verdict
from fuzz_targets import TARGETS
from fuzz_worker import calls, run

import perturbed
from perturbed import checkpoint, nn, noise, optim, particles, rl

HERE = Path(__file__).parent
PACKAGES = (perturbed, checkpoint, nn, noise, optim, particles, rl)

# Public names that are not called with arguments of a user, and why.
UNCALLED = {
    "BatchEnv": "abstract: a base of environments",
    "CheckpointError": "an exception",
    "ConversionReport": "a result",
    "Cost": "a result",
    "DamagedCheckpointError": "an exception",
    "Episodes": "a result",
    "Evaluation": "a result",
    "Flight": "what a variant of PSO is handed",
    "GymEnv": "needs gymnasium, and takes what that takes",
    "METHODS": "a table",
    "MujocoEnv": "needs mujoco; its arguments are tested in test_rl_mujoco.py",
    "NoiseFamily": "abstract: a base of families",
    "NoiseState": "of PerturbedModel, which checks the same arguments by its methods",
    "PerturbedLayer": "abstract: a base of layers",
    "Product": "made by product()",
    "ScalarOptimizer": "abstract: a base of searches",
    "TensorBoard": "needs tensorboard; its path is that of CSVLog",
    "Variant": "abstract: a base of variants",
    "Window": "a result",
    "WorkerError": "an exception",
}
# Cheap ones, for the default suite.
FEW = ("Dense", "Sparse", "PerturbedModel.set_seed", "PerturbedModel.set_noise_scale", "ring")


def public(module: ModuleType) -> set[str]:
    return {n for n in module.__all__ if inspect.isclass(f := getattr(module, n)) or callable(f)}


def test_every_public_callable_has_a_target():
    names = set().union(*map(public, PACKAGES))
    missing = names - set(TARGETS) - set(UNCALLED)
    assert not missing, f"fuzz_targets.py has no entry for {sorted(missing)}"
    assert not set(UNCALLED) - names - {"METHODS"}, "names that are gone"
    for name in FEW:
        assert name in TARGETS


def test_good_arguments_are_taken():
    for target in TARGETS.values():
        function, arguments = target.make()
        inspect.signature(function).bind(**arguments)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.filterwarnings("ignore")
def test_a_few_in_this_process(name):
    seen = [(a, v, run(name, a, v)) for a, v in calls(name)]
    wrong = [each for each in seen if verdict(name, *each) is None]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(("what", "least"), [("callables", 20_000), ("operators", 6_000)])
def test_all_in_processes_of_their_own(what, least):
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_worker.py"), what],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *wrong, total = map(json.loads, done.stdout.splitlines())
    assert total > least
    assert not wrong, "\n".join(map(str, wrong))
