"""perturbed.train where processes share a population: one writes, all measure, all end together."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("training_processes.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without distributed"
)


def environment():
    paths = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def launch(folder, estimate, processes):
    """Train in so many processes; return what each has seen."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), str(folder), estimate]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_processes_log_once_and_measure_the_same(tmp_path):
    (alone,) = launch(tmp_path / "alone", "full", 1)
    for estimate in ("full", "sharded"):
        folder = tmp_path / estimate
        one, other = launch(folder, estimate, 2)
        assert one["records"] == other["records"]
        assert one["timed"] == other["timed"] > 6
        assert one["timed"] % 3 == 0
        assert one["seen"] == other["seen"] == 6
        for a, b in zip(one["records"], alone["records"], strict=True):
            assert a["step"] == b["step"]
            assert a.get("snr", 0.0) == pytest.approx(b.get("snr", 0.0), rel=1e-4)
            assert a.get("cosine", 0.0) == pytest.approx(b.get("cosine", 0.0), abs=1e-5)
            assert a["mean"] == pytest.approx(b["mean"], rel=1e-6)
        with open(folder / "run.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == list("123456")
        assert rows[-1]["rank"] == "0"
        assert [bool(row["snr"]) for row in rows] == [False, True] * 3
        assert sorted(p.name for p in (folder / "saved").iterdir()) == ["step-5.pt", "step-6.pt"]


def untimed(file):
    """The rows of a log without its times."""
    with open(file) as rows:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(rows)]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_has_the_log_and_the_bits_of_one_that_is_not(tmp_path):
    chance, steps = random.Random(0), 600

    def start(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(SCRIPT), str(folder), str(steps)]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    whole.communicate(timeout=150)
    assert whole.returncode == 0
    kills = 0
    while True:
        process = start(tmp_path / "killed")
        if kills == 6:
            process.communicate(timeout=150)
            assert process.returncode == 0
            break
        for _ in range(chance.randrange(10, 90)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.003)  # somewhere within a step
        process.kill()
        process.communicate()
        assert process.returncode < 0, "the run must be long enough to be killed"
        kills += 1
    assert untimed(tmp_path / "killed/run.csv") == untimed(tmp_path / "whole/run.csv")
    a, b = (torch.load(tmp_path / run / "net.pt") for run in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
