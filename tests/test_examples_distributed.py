"""docs/examples/distributed_ars.py: the same run alone and under torchrun, and on from there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "examples" / "distributed_ars.py"
TINY = ["--directions", "5"]  # over 2 processes: 1 and 4, or 4 and 1


def run(folder, steps, processes=1):
    """Run the script; return its lines, without the time."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if processes == 1 else [f"--nproc-per-node={processes}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *TINY, "--steps", str(steps), "--out", folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [re.sub(r" +\d+\.\d s", "", line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun with gloo on one machine")
def test_two_processes_begin_what_one_finishes(tmp_path):
    alone = run(tmp_path / "alone", 3)
    assert alone[0] == "1 processes, from generation 0 on"
    assert len(alone) == 5
    together = run(tmp_path / "both", 2, processes=2)
    assert together[0] == "2 processes, from generation 0 on"
    for line, other in zip(together[1:3], alone[1:3], strict=True):  # printed once, by one
        assert re.fullmatch(re.escape(other) + r"  \d+ bytes sent", line)
    rest = run(tmp_path / "both", 3)
    assert rest[0] == "1 processes, from generation 2 on"
    assert rest[1:] == alone[3:]  # the last generation; policy and statistics
