"""One population over 1, 2 and 4 processes: the same bits; restarts; what goes wrong, in time.

Processes are forked from one that has imported torch, so that a group of them starts in no time;
what torchrun itself adds is in the slow test of the elastic run and in test_examples_distributed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from torch import nn

import perturbed
from perturbed import NES, PSO, PerturbedModel
from perturbed.distributed import ProcessError, Processes, _fresh_store, init, is_first

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux",
    reason="needs torch.distributed and a fork server",
)


def launch(job: str, size: int, folder: Path, timeout: float = 60.0, dead: int = 0) -> list:
    """Run a job in a group of processes; return what each has found, by rank.

    Args:
        job: of the worker.
        size: number of processes.
        folder: for what they write.
        timeout: of their group.
        dead: how many, the last ones, do not come back.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["perturbed", "perturbed.rl", "torch.distributed"])
    # The store of the agent, as under torchrun: no port is chosen twice.
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(60), False)
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    processes = [
        context.Process(
            target=worker.main, args=(job, {**variables, "RANK": str(rank)}, folder, timeout)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    living = processes[: size - dead]
    end = time.monotonic() + 300
    for process in living:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in living]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    wrong = [file.read_text() for file in sorted(folder.glob(f"{job}-*.txt"))]
    assert not wrong, "\n".join(wrong)
    assert codes == [0] * len(living)
    return [torch.load(folder / f"{job}-{rank}.pt") for rank in range(len(living))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What 4, 2 and 1 processes have found; each goes on with what the one before has begun."""
    folder = tmp_path_factory.mktemp("distributed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {**{n: launch("train", n, folder) for n in (4, 2)}, 1: [worker.train(folder)]}
    finally:
        torch.set_num_threads(threads)


def same(result, other, names=None):
    """Assert that all tensors, or those named, are bit for bit the same."""
    for name in result if names is None else names:
        assert torch.equal(result[name], other[name]), name


# ---- the same run --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", worker.EXACT)
def test_the_run_does_not_depend_on_the_number_of_processes(trained, name, size):
    """Losses of 20 steps, parameters after them, statistics of observations: all bits."""
    (alone,) = trained[1]
    assert len(trained[size]) == size
    for found in trained[size]:
        same(found[name], alone[name])
    losses = alone[name]["losses"]
    assert losses.isfinite().all()
    assert len(set(losses.tolist())) > 10  # it went somewhere


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", worker.CLOSE)
def test_shapes_and_sums_of_others_differ_in_rounding_alone(trained, name, size):
    (alone,) = trained[1]
    for found in trained[size]:
        torch.testing.assert_close(
            found[name]["losses"][0], alone[name]["losses"][0], rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            found[name]["parameters"], alone[name]["parameters"], rtol=0, atol=1e-6
        )
        same(found[name], trained[size][0][name])  # all processes have the same bits


@pytest.mark.parametrize("size", [2, 4])
def test_tensors_are_added_up_in_blocks(trained, size):
    parts = [worker.summands(rank) for rank in range(size)]
    for rank in range(size):
        for i, total in enumerate(trained[size][rank]["sums"]):
            wide = torch.float32 if total.dtype == torch.bfloat16 else total.dtype
            expected = sum(part[i].to(wide) for part in parts)
            torch.testing.assert_close(total, expected.to(total.dtype))
            assert torch.equal(total, trained[size][0]["sums"][i])


@pytest.mark.parametrize(("size", "before"), [(2, 4), (1, 2)])
@pytest.mark.parametrize("name", worker.RESUMED)
def test_a_run_goes_on_exactly_with_another_number_of_processes(trained, name, size, before):
    """10 steps with ``before`` processes, a checkpoint, 10 steps with ``size``."""
    (alone,) = trained[1]
    half = worker.STEPS // 2
    assert f"{name} resumed" not in trained[4][0]  # the first to run had nothing to go on with
    for found in trained[size]:
        resumed = dict(found[f"{name} resumed"])
        assert torch.equal(resumed.pop("losses"), alone[name]["losses"][half:])
        same(resumed, alone[name])


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_the_run_is_the_same(tmp_path):
    """Twice a process kills itself; both start anew, from the last checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=3", str(TESTS / "distributed_worker.py"), str(tmp_path)]
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    training = worker.search(chunk=2)
    for _ in range(worker.LONG):
        training.step()
    for rank in range(2):
        same(worker.outcome(training), torch.load(tmp_path / f"elastic-{rank}.pt"))
        starts = (tmp_path / f"starts-{rank}.txt").read_text().split("\n")
        assert starts == ["0 0", "1 4", "2 8", ""]


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return launch("disagree", 3, tmp_path_factory.mktemp("disagree"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed", r"state 'noise' 'seed': 3 and 4"),
        ("sigma", r"state 'noise' 'sigma': 0.1 and 0.2"),
        ("values", r"model '0.weight': \w+ and \w+; model '0.bias'"),
        ("lr", r"optimizer 'groups' 0 'lr': 0.1 and 0.2"),
        ("optimizer", r"optimizer 'class': SGD and Adam"),
        ("steps", r"steps: 0 and 5"),
        ("population", r"directions: 7 and 9"),
        ("family", r"noise '0': .*Dense.* and .*LowRank"),
        ("architecture", r"noise '1': nothing and .*Dense"),
        ("shaping", r"shaping: centered_rank and zscore"),
        ("estimate", r"state 'estimate': full and sharded"),
        ("maximize", r"maximize: False and True"),
        ("decay", r"weight_decay: 0.0 and 0.1"),
        ("chunk", r"directions of each process: \[2, 2, 3\] and "),
        ("normalizer", r"state 'normalizer' 'count'"),
        ("swarm", r"seed: 0 and 1"),
        ("checkpoint", r"steps: 2 and 1"),
    ],
)
def test_processes_that_differ_are_told_at_the_first_step(refused, name, message):
    """Every process, in the same words: which, and what."""
    for found in refused:
        assert re.search(message, found[name]), found[name]
        assert "the processes of ranks 0 and 2 do not train the same thing" in found[name]


def test_what_cannot_be_shared_is_refused(refused):
    for found in refused:
        what = "got 3 processes for a population of 2 directions"
        assert what in found["too many"]
        assert what in found["too many for a swarm"]
        assert "distributed must be a process group, True, False or None" in found["no group"]
        assert "norm would be synced with" in found["norm"]
        assert "pass it to the optimizer (normalizer=norm)" in found["norm"]
        assert found["values after"] == refused[0]["values after"] != "nan"


def test_a_process_that_never_starts_is_named(tmp_path):
    """Also where the store still holds what an earlier start has left there."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(60), False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    with worker.environment(variables):
        before = torch.distributed.PrefixStore("perturbed", store)
        before.set("question", "old")
        before.set("joined", "old words")
        before.set("answer 1", "old word")
        limit = timedelta(seconds=0.3)
        with pytest.raises(ProcessError, match=r"rank 0 of 2 waited 0.3 s for rank 1 to start"):
            _fresh_store(0, 2, limit)
        with pytest.raises(ProcessError, match=r"rank 1 of 2 waited 0.3 s for rank 0 and all"):
            _fresh_store(1, 2, limit)


def test_a_process_that_dies_is_noticed_at_once(tmp_path):
    for found in launch("die", 3, tmp_path, timeout=120, dead=1):
        assert re.search(r"gathering losses failed on rank [01] of 3: another", found["message"])
        assert "start again from the last checkpoint" in found["message"]
        assert found["seconds"] < 60  # 0.02 s where it was written; the timeout is 120
        assert found["unchanged"]


def test_a_process_that_hangs_is_noticed_after_the_timeout(tmp_path):
    (found,) = launch("hang", 2, tmp_path, timeout=4, dead=1)
    assert "gathering losses failed on rank 0 of 2: another" in found["message"]
    assert 3 < found["seconds"] < 40
    assert found["unchanged"]


# ---- alone ---------------------------------------------------------------------------------------


def test_without_torchrun_nothing_happens(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init() is False
    assert is_first()
    assert not torch.distributed.is_initialized()
    pm = PerturbedModel(perturbed.convert(nn.Linear(2, 2), 4), 4)
    sgd = torch.optim.SGD(pm.model.parameters())
    assert NES(pm, sgd).evaluation.processes is None
    for make in (
        Processes,
        lambda: NES(pm, sgd, distributed=True),
        lambda: PSO(nn.Linear(2, 1), 4, distributed=True),
    ):
        with pytest.raises(
            RuntimeError, match=r"no process group: call perturbed.distributed.init"
        ):
            make()
    with pytest.raises(TypeError, match=r"process group, True, False or None, got int"):
        NES(pm, sgd, distributed=3)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_must_be_positive_and_finite(timeout):
    with pytest.raises(ValueError, match="timeout must be finite and greater than 0"):
        init(timeout)


@pytest.mark.parametrize("timeout", [True, "300", None])
def test_a_timeout_must_be_a_number(timeout):
    with pytest.raises(TypeError, match="timeout must be a number"):
        init(timeout)
