"""Training processes killed at random moments (SIGKILL) lose nothing: bit for bit the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainers import TRAINERS

from perturbed.checkpoint import read_checkpoint
from perturbed.description import digest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

WORKER = Path(__file__).parent / "checkpoint_worker.py"
SECONDS = 60  # in which a run must have come on; far more than it takes


class Worker:
    """A process that starts training processes."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def start(self, **job):
        """Start a run; return the id of its process."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Return the signal that ended the run, 0 for none."""
        status = int(self.process.stdout.readline())
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "see stderr above"
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def close(self):
        self.process.stdin.close()
        self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


def until(condition, child):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "the training process does not come on"
        os.kill(child, 0)  # ProcessLookupError: it has ended by itself


def newest(folder):
    """Return the number of the newest checkpoint, 0 if there is none."""
    return max((int(f.stem.removeprefix("step-")) for f in folder.glob("step-*.pt")), default=0)


def run_with_kills(worker, tmp_path, trainer, kills, steps, every, padding, in_a_write):
    """Kill a run ``kills`` times; return its result, and how many kills left half a file.

    The first ``in_a_write`` kills wait for a write to be under way, the others for a random number
    of checkpoints and then a random time.
    """
    draw = random.Random(0)
    folder, result = tmp_path / "killed", tmp_path / "result.pt"
    folder.mkdir()
    job = {"trainer": trainer, "steps": steps, "every": every, "padding": padding}
    halves = 0
    for kill in range(kills):
        before = newest(folder)
        child = worker.start(folder=str(folder), result=str(result), **job)
        if kill < in_a_write:
            until(lambda: list(folder.glob(".*.partial")), child)
            time.sleep(draw.uniform(0, 0.002))
        else:
            further = draw.randrange(3)
            until(lambda before=before, n=further: newest(folder) >= before + n * every, child)
            time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert worker.wait() == signal.SIGKILL, "it was over too soon: more steps are needed"
        assert not result.exists()
        halves += len(list(folder.glob(".*.partial"))) > 0
        for file in folder.glob("step-*.pt"):
            read_checkpoint(file)  # every file that has its name is whole
        assert newest(folder) >= before
    worker.start(folder=str(folder), result=str(result), **job)
    assert worker.wait() == 0
    assert newest(folder) == steps
    assert not list(folder.glob(".*.partial"))
    return read_checkpoint(result), halves


def check(worker, tmp_path, trainer, kills, in_a_write, **job):
    undisturbed = tmp_path / "undisturbed.pt"
    worker.start(trainer=trainer, folder=str(tmp_path / "whole"), result=str(undisturbed), **job)
    assert worker.wait() == 0
    wanted = read_checkpoint(undisturbed)
    found, halves = run_with_kills(worker, tmp_path, trainer, kills, in_a_write=in_a_write, **job)
    assert set(wanted["parts"]) == {*TRAINERS[trainer](1).parts, "losses"}
    assert len(found["parts"]["losses"]) == job["steps"]
    assert found["parts"]["losses"] == wanted["parts"]["losses"]
    assert digest(found) == digest(wanted)  # parameters, optimizer, noise, generator: every bit
    assert halves >= 1, "no kill has met a write"
    print(f"{trainer}: {halves} of {kills} kills left half a file")


def test_three_kills(worker, tmp_path):
    check(worker, tmp_path, "nes", kills=3, in_a_write=1, steps=20, every=1, padding=4_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "padding", "every"),
    [("nes", 16_000_000, 2), ("nes", 0, 1), ("pso-constriction", 4_000_000, 1), ("ars-v2", 0, 3)],
)
def test_twenty_five_kills(worker, tmp_path, trainer, padding, every):
    check(
        worker,
        tmp_path,
        trainer,
        kills=25,
        in_a_write=8,
        steps=60 * every,
        every=every,
        padding=padding,
    )
