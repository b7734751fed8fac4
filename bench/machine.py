"""The machine: the facts without which a time means nothing, and the rates that bound its times."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import perturbed
from bench.common import ROOT
from bench.timing import Clock
from perturbed import Dense, PerturbedLinear, PerturbedModel

ROOF_REPEATS = 7


def machine(device: torch.device) -> dict[str, str]:
    """Processor, cores, versions, commit and date; of a GPU its name, driver and clocks too."""
    facts = {
        "cpu": _cpu_model(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "isa": perturbed._C.cpu_capability(),
        "torch": torch.__version__,
        "compiler": f"gcc {perturbed._C.build_info()['compiler']}",
        "perturbed": f"{perturbed.__version__} ({_commit()})",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts |= _driver(device)
        facts["tf32"] = "on" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "off"
    return facts


def set_tf32(on: bool) -> None:
    """Float32 products of every library in TF32, or in full precision.

    Said explicitly: torch's own defaults are full precision for matrices, TF32 for convolutions.
    """
    precision = "tf32" if on else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _driver(device: torch.device) -> dict[str, str]:
    """Driver, and the clocks at this moment; empty without nvidia-smi."""
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={uuid}"]
        line = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
        driver, clock, most, memory = (part.strip() for part in line.split(","))
    except (AttributeError, OSError, subprocess.CalledProcessError, ValueError):
        return {}
    return {"driver": driver, "clocks": f"{clock} of {most}; memory {memory}"}


def _commit() -> str:
    """Short commit of the working tree, with a plus sign if it holds changes."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return commit + ("+" if changes.strip() else "")


# ---- rates ---------------------------------------------------------------------------------------


@torch.no_grad()
def roofs(device: torch.device, small: bool = False) -> dict[str, float]:
    """Rates that bound every row, measured: medians of a few calls.

    Args:
        device: whose.
        small: sizes for tests; the rates then mean nothing.

    Returns:
        "copy": bytes a second of a copy, read and written; "float32" and, on a GPU, "bfloat16":
        floating-point operations a second of a square product; "normals" and "signs": numbers a
        second of our own generator, each drawn, multiplied and added once, without memory.
    """
    on_gpu = device.type == "cuda"
    n = 64 if small else 8192 if on_gpu else 1024
    found = {"copy": _copy_rate((1 << 12) if small else (1 << 29) if on_gpu else (1 << 26), device)}
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        y = torch.empty_like(a)
        seconds = _seconds(lambda a=a, b=b, y=y: torch.mm(a, b, out=y), device)
        found[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    for name, distribution in (("normals", "normal"), ("signs", "rademacher")):
        size, directions = (16, 4) if small else (512, 1024) if on_gpu else (256, 256)
        layer = PerturbedLinear(size, size, directions, bias=False, noise=Dense(distribution))
        model = PerturbedModel(layer.to(device), directions)
        model.set_noise()
        weights = torch.ones(directions, device=device)
        seconds = _seconds(lambda m=model, w=weights: m.set_grad(w), device)
        found[name] = directions * size**2 / seconds
    return found


def _copy_rate(numel: int, device: torch.device) -> float:
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    clock = Clock(device)
    return statistics.median(clock(call) for _ in range(ROOF_REPEATS))
