"""Our convolution of members against torch's grouped convolution: times of a layer, and the choice.

    OMP_NUM_THREADS=1 python -m bench.conv_ways
    OMP_NUM_THREADS=2 python -m bench.conv_ways --wall

A line is a 3x3 `PerturbedConv2d` with stored members; entries are its time in our kernel, over
that in torch's convolution, for 1, 8 and 32 rows a member. A star: `conv_kernel.pays` takes ours.
docs/kernels.md has the table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

import perturbed
from perturbed.noise import conv_kernel

DIRECTIONS, ROWS = 10, (1, 8, 32)
MOST_PRODUCTS = 1 << 31  # of a measurement; larger ones have fewer members, or are left out
# channels, size of x, padding, whether all members see the same rows
CASES = [
    *((c, size, 1, False) for c in ((1, 16), (3, 32), (12, 16)) for size in (32, 8)),
    *(
        (c, size, 1, False)
        for c in ((16, 16), (64, 64), (128, 128), (256, 256))
        for size in (32, 8)
    ),
    *(((c, c), size, 0, False) for c in (16, 64, 256) for size in (26, 10)),
    *((c, 28, 0, True) for c in ((1, 16), (3, 32), (64, 64))),
]


def forward(
    channels: tuple[int, int], size: int, padding: int, shared: bool, rows: int, last: bool
) -> Callable[[], Tensor] | None:
    """A forward of a layer whose members are held, or None if it would take too long."""
    products = rows * (size + 2 * padding - 2) ** 2 * 9 * channels[0] * channels[1]
    directions = min(DIRECTIONS, MOST_PRODUCTS // products)
    if directions < 2:
        return None
    layer = perturbed.PerturbedConv2d(
        *channels, 3, directions, padding=padding, noise=perturbed.Explicit()
    )
    layout = torch.channels_last if last else torch.contiguous_format
    layer.to(memory_format=layout)
    pm = perturbed.PerturbedModel(layer, directions)
    pm.set_members({n: torch.randn(directions, *p.shape) for n, p in layer.named_parameters()})
    x = torch.randn(rows if shared else rows * directions, channels[0], size, size)
    x = x.to(memory_format=layout)
    batch = pm.replicate(x) if shared else x
    return lambda: pm(batch)


def entry(call: Callable[[], Tensor], clock: Callable[[], float], seconds: float) -> str:
    """Our time in units of torch's, medians of calls that take turns."""
    chosen: list[bool] = []
    pays = conv_kernel.pays

    def asked(*arguments: object) -> bool:
        chosen.append(pays(*arguments))  # type: ignore[arg-type]
        return chosen[-1]

    with mock.patch.object(conv_kernel, "pays", asked):
        call()
    taken: dict[bool, list[float]] = {True: [], False: []}
    end = time.perf_counter() + seconds
    while len(taken[True]) < 5 or time.perf_counter() < end:
        for ours, times in taken.items():
            with mock.patch.object(conv_kernel, "pays", lambda *_, ours=ours: ours):
                start = clock()
                call()
                times.append(clock() - start)
    ours, other = (statistics.median(times[1:]) for times in taken.values())
    return f"{ours / other:.2f}{'*' if chosen[0] else ' '}"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wall", action="store_true", help="time of the clock, not of processors")
    parser.add_argument("--seconds", type=float, default=0.15, help="of an entry (0.15)")
    options = parser.parse_args(arguments)
    clock = time.perf_counter if options.wall else time.process_time
    print(f"{torch.get_num_threads()} threads; 1, 8, 32 rows; planes, then channels last")
    for channels, size, padding, shared in CASES:
        entries = []
        for last in (False, True):
            for rows in ROWS:
                call = forward(channels, size, padding, shared, rows, last)
                entries.append("  -  " if call is None else entry(call, clock, options.seconds))
        kind = "shared" if shared else f"padding {padding}"
        name = f"{channels[0]}-{channels[1]}, {size}x{size}, {kind}"
        print(f"{name:26}" + "  ".join(entries), flush=True)


if __name__ == "__main__":
    main()
