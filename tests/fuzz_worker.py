"""Call every target with every wrong value; lines of JSON say what is not in order.

A process for each target, forked from one that has imported all, with a limit on its memory and a
clock for each call: a crash or a hang is seen, and the next call goes on from there.

    python tests/fuzz_worker.py callables|operators
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fuzz_ops
import torch
from fuzz_allowed import to_call, verdict
from fuzz_targets import TARGETS
from fuzz_values import VALUES, outcome

SECONDS = 20.0  # for one call, on a busy machine
GIGABYTES = 4  # beyond what the process has to start with


def arguments_of(name: str) -> list[str]:
    """The arguments of a target that can be passed by name."""
    function, _ = TARGETS[name].make()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return [n for n in names if n not in TARGETS[name].skip]


def calls(name: str) -> list[tuple[str, str]]:
    return [(a, v) for a in arguments_of(name) for v in VALUES if to_call(a, v)]


def run(name: str, argument: str, value: str) -> str:
    """What a target makes of one wrong value."""
    function, given = TARGETS[name].make()
    bad = given | {argument: VALUES[value]()}
    names = (argument, *arguments_of(name))
    result = outcome(lambda: TARGETS[name].use(function(**bad)), names)
    parent = getattr(function, "torch_class", None)
    if (
        result == "refused"
        or parent in (None, torch.nn.Module)
        or argument in ("directions", "noise")
    ):
        return result
    # A layer's other arguments are its torch parent's to judge.
    own = inspect.signature(parent).parameters
    own = own if "kwargs" not in own else set(bad) - {"directions", "noise"}
    if argument not in own:
        return result
    plain = {k: v for k, v in bad.items() if k in own}
    as_parent = outcome(lambda: TARGETS[name].use(parent(**plain)), names)
    return "as torch" if kind(as_parent) == kind(result) else result


def kind(result: str) -> list[str]:
    """An outcome without the place and the words of an error."""
    return result.split()[:2]


def _child(todo: Sequence[Any], run: Callable[..., str], write: int) -> None:
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit + (GIGABYTES << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tempfile.tempdir = folder
        for each in todo:
            os.write(write, (json.dumps(run(*each)) + "\n").encode())


def _fork(todo: Sequence[Any], run: Callable[..., str]) -> tuple[int, int]:
    """Start a process that makes the calls; its id and what it writes outcomes to."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    code = 1
    try:
        os.close(read)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        _child(todo, run, write)
        code = 0
    finally:
        os._exit(code)


def examine(todo: Sequence[Any], run: Callable[..., str]) -> Iterator[str]:
    """Yield the outcome of every call, in order; a crash or hang is one, too."""
    done = 0
    while done < len(todo):
        pid, read = _fork(todo[done:], run)
        text, ending = b"", ""
        while not ending:
            if not select.select([read], [], [], SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
                ending = "hang"
            elif chunk := os.read(read, 1 << 16):
                *lines, text = (text + chunk).split(b"\n")
                done += len(lines)
                yield from map(json.loads, lines)
            else:
                ending = "crash"
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        if done < len(todo):
            done += 1
            yield f"{ending}, exit status {status}"


def of_callables() -> Iterator[tuple[Any, str | None]]:
    """Every call of the public callables with its outcome, and why that is in order."""
    for name in TARGETS:
        todo = [(name, *call) for call in calls(name)]
        for call, result in zip(todo, examine(todo, run), strict=True):
            yield (*call, result), verdict(*call, result)


def of_operators() -> Iterator[tuple[Any, str | None]]:
    """The same of the operators, with one and with two wrong values."""
    todo = fuzz_ops.calls()
    for call, result in zip(todo, examine(todo, fuzz_ops.run), strict=True):
        yield (*call, result), fuzz_ops.verdict(call[1], result)


def main(what: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total = 0
    for call, why in {"callables": of_callables, "operators": of_operators}[what]():
        total += 1
        if why is None:
            print(json.dumps(call), flush=True)
    print(json.dumps(total))


if __name__ == "__main__":
    main(sys.argv[1])
