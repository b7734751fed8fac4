"""Judge the resource report of ``nvcc -Xptxas -v``, for tests/check_cuda.sh.

    read_ptxas.py SOURCE LOG STACK_BUDGET [--verbose]

Fails if a kernel spills registers or uses more than STACK_BUDGET bytes of stack, if the report is
empty, or if architectures differ in their kernels.
"""

import argparse
import collections
import re
import shutil
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names where c++filt is there to make them."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    readable = (line.replace("perturbed::", "") for line in done.stdout.splitlines())
    return dict(zip(names, readable, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("log")
    parser.add_argument("stack_budget", type=int)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()

    kernels = []  # (arch, mangled name, stack, spills, registers)
    entry = stack = None
    with open(args.log, encoding="utf-8") as log:
        for line in log:
            if match := ENTRY.search(line):
                entry, stack = match.groups(), None
            elif entry and (match := STACK.search(line)):
                stack = [int(group) for group in match.groups()]
            elif entry and stack and (match := REGISTERS.search(line)):
                kernels.append((entry[1], entry[0], stack[0], stack[1] + stack[2], int(match[1])))
                entry = None
    names = collections.defaultdict(set)
    for arch, name, *_ in kernels:
        names[arch].add(name)
    if not kernels or len({frozenset(found) for found in names.values()}) != 1:
        print(f"check-cuda: the report of {args.source} is incomplete", file=sys.stderr)
        return 1
    readable = demangle(sorted(next(iter(names.values()))))
    bad = 0
    for arch, name, frame, spills, registers in kernels:
        wrong = spills > 0 or frame > args.stack_budget
        bad += wrong
        if wrong or args.verbose:
            print(
                f"{arch:7} {registers:4} registers {frame:4} stack {spills:4} spilled  "
                f"{readable[name]}"
            )
    if bad:
        print(f"check-cuda: {bad} kernels of {args.source} spill or use stack", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
