"""Speeds as their authors published them, each with its source and machine.

A line is one number of one table, and where the same work is measured here: the suite, view and
case, the row that does it in their way, and the row that does it in ours. bench/sidebyside.py puts
the three beside each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Line:
    """A published number and its counterparts here.

    Attributes:
        label: of the case, as published.
        name: of the row, as published.
        seconds: published time; NaN where there is none.
        times_base: published multiple of the unperturbed layer's time; NaN where there is none.
        suite: of both counterparts.
        view: of both.
        case: parts of the label of the case here, all of which it must have.
        theirs: the row here that does it in their way; empty for none.
        ours: the row that does it in ours; empty for none.
    """

    label: str
    name: str
    seconds: float
    times_base: float
    suite: str
    view: str
    case: tuple[str, ...]
    theirs: str
    ours: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
        title: of the table.
        source: who published it, where, and on which machine.
        remark: what differs here.
        lines: its numbers.
        per_cent: whether the unit is the throughput in per cent of the unperturbed layer's.
    """

    title: str
    source: str
    remark: str
    lines: tuple[Line, ...]
    per_cent: bool = False


MS = 1e-3
NORMAL = "Dense('normal')"

# ---- NESgpu, README ------------------------------------------------------------------------------

# Layer -> milliseconds at 256, 512 and 1024 features.
README_LINEAR = {
    "PerturbedLinear": (0.863, 3.229, 12.252),
    "SparsePerturbedLinear, k = 1": (0.188, 0.396, 0.641),
    "SparsePerturbedLinear, k = 2": (0.226, 0.483, 1.041),
    "PermutedLinear": (0.222, 0.348, 0.867),
    "Base": (0.051, 0.109, 0.306),
    "Naive": (22.282, 22.420, 23.259),
}
LINEAR_ROWS = {
    "PerturbedLinear": ("Stored", NORMAL),
    "SparsePerturbedLinear, k = 1": ("torch sparse 1", "Sparse(1)"),
    "SparsePerturbedLinear, k = 2": ("torch sparse 2", "Sparse(2)"),
    "PermutedLinear": ("torch permuted", "Permuted('both')"),
    "Base": ("Base", ""),
    "Naive": ("Naive", ""),
}
# Layer -> milliseconds of the shapes of bench/conv.py.
README_CONV = {
    "PerturbedConv2d": (20.251, 33.983, 24.370, 9.730, 85.235),
    "PermutedConv2d": (17.947, 35.562, 18.163, 5.604, 1.362),
    "Base": (7.010, 13.805, 7.269, 1.734, 0.614),
    "Naive": (43.680, 42.905, 42.851, 38.517, 161.733),
}
CONV_ROWS = {
    "PerturbedConv2d": ("Stored", NORMAL),
    "PermutedConv2d": ("torch permuted", "Permuted('out')"),
    "Base": ("Base", ""),
    "Naive": ("Naive", ""),
}
CONV_SHAPES = (
    "16-16, 3x3, 64x64",
    "32-32, 3x3, 64x64",
    "64-64, 3x3, 32x32",
    "32-32, 1x1, 32x32",
    "1024-1024, 1x1, 1x1",
)


def _readme_linear() -> Iterator[Line]:
    for i, n in enumerate((256, 512, 1024)):
        for name, times in README_LINEAR.items():
            seconds, base = times[i] * MS, README_LINEAR["Base"][i] * MS
            case = (f"{n}x{n}, ", "R=1 ")
            rows = LINEAR_ROWS[name]
            yield Line(f"{n}x{n}", name, seconds, seconds / base, "linear", "forward", case, *rows)


def _readme_conv() -> Iterator[Line]:
    for i, shape in enumerate(CONV_SHAPES):
        for name, times in README_CONV.items():
            seconds, base = times[i] * MS, README_CONV["Base"][i] * MS
            case = (f"{shape}, ", "R=1 ")
            yield Line(
                shape, name, seconds, seconds / base, "conv", "forward", case, *CONV_ROWS[name]
            )


# ---- NESgpu, paper -------------------------------------------------------------------------------

# Noise -> multiples of the unperturbed forward, then milliseconds of the update; NaN: not given.
PAPER_LINEAR = {
    "IID": ((28.52, 42.96, 13.04), (4.44, 14.3, 0.41)),
    "Antithetic": ((14.82, 22.4, 6.26), (1.89, 7.19, 0.28)),
    "Sign flip": ((2.39, 2.46, 2.22), (0.314, 0.325, 0.33)),
    "Permutation": ((3.28, 2.9, 2.37), (2.67, 5.09, 0.54)),
    "Permutation, 50 %": ((3.02, 2.23, 2.37), (1.50, 2.60, 0.53)),
    "Permutation, 10 %": ((3.14, 2.08, 2.29), (0.66, 0.91, 0.48)),
}
PAPER_LINEAR_BASE = (0.141, 0.354, 0.233)
PAPER_CONV = {
    "IID": ((5.99, 2.54, 3.74, 10.96, 18.88), (0.36, 0.52, 1.61, 6.24, 29.1)),
    "Antithetic": ((4.39, 3.79, 3.86, 6.56, 10.42), (0.27, 0.27, 0.33, 1.11, 4.40)),
    "Sign flip": ((2.2, 2.23, 2.14, 2.07, 2.01), (0.33, 0.32, 0.32, 0.29, 0.32)),
    "Permutation": ((1.78, 2.27, 2.15, 2.09, 2.05), (0.55, 0.59, 0.66, 0.64, 0.82)),
    "Permutation, 50 %": ((1.69, 1.78, 1.67, 1.61, 1.58), (NAN,) * 5),
    "Permutation, 10 %": ((1.69, 1.69, 1.44, 1.29, 1.25), (0.52, 0.58, 0.56, 0.54, 0.63)),
}
PAPER_CONV_BASE = (1.161, 3.792, 2.918, 2.729, 2.871)
PAPER_ROWS = {
    "IID": ("R=1 ", "Stored", NORMAL),
    "Antithetic": ("R=2 ", "Stored", NORMAL),
    "Sign flip": ("R=1 ", "", "SignFlip('in')"),
    "Permutation": ("R=1 ", "", "Permuted('in')"),
    "Permutation, 50 %": ("R=1 ", "", "Permuted('in', in_sparsity=0.5)"),
    "Permutation, 10 %": ("R=1 ", "", "Permuted('in', in_sparsity=0.1)"),
}
PAPER_LINEAR_SHAPES = ("256x256", "512x512", "512x10")
PAPER_CONV_SHAPES = (
    "3-64, 3x3 pad 1, 32x32",
    "64-64, 3x3 pad 1, 32x32",
    "128-128, 3x3 pad 1, 16x16",
    "256-256, 3x3 pad 1, 8x8",
    "512-512, 3x3 pad 1, 4x4",
)


def _paper(
    suite: str,
    shapes: tuple[str, ...],
    bases: tuple[float, ...],
    numbers: dict[str, tuple[tuple[float, ...], tuple[float, ...]]],
) -> Iterator[Line]:
    for i, shape in enumerate(shapes):
        for name, (forwards, updates) in numbers.items():
            repeats, theirs, ours = PAPER_ROWS[name]
            case = (f"{shape}, ", repeats)
            for view, seconds, times in (
                ("forward", forwards[i] * bases[i] * MS, forwards[i]),
                ("update", updates[i] * MS, updates[i] / bases[i]),
            ):
                label = f"{shape}, {view}"
                yield Line(label, name, seconds, times, suite, view, case, theirs, ours)


# ---- EGGROLL -------------------------------------------------------------------------------------

# Name -> published share of the throughput of pure inference, their way here, ours.
EGGROLL = {
    "EGGROLL, rank 1, noise given": (0.91, "torch, factors given", ""),
    "EGGROLL, rank 1, noise drawn": (0.69, "torch, factors drawn", "LowRank(1)"),
    "OpenES, noise given": (0.0041, "torch, full rank given", ""),
    "OpenES, noise drawn": (0.00054, "torch, full rank drawn", NORMAL),
}


def _eggroll() -> Iterator[Line]:
    for name, (share, theirs, ours) in EGGROLL.items():
        label, case = "8192x8192, 1024 members", ("R=2 D=512,",)
        yield Line(label, name, NAN, 1 / share, "eggroll", "forward", case, theirs, ours)


# ---- packages ------------------------------------------------------------------------------------

NETWORK_ROWS = {
    "EvoX VirtualLoRAES, rank 1": ("EvoX VirtualLoRA", "LowRank(1)"),
    "EvoX VirtualLoRAES, rank 4": ("EvoX VirtualLoRA, rank 4", "LowRank(4)"),
    "EvoTorch PGPE": ("EvoTorch PGPE", NORMAL),
    "torch.func.vmap": ("torch vmap", NORMAL),
    "a plain loop": ("torch loop", NORMAL),
    "torch, rank 1, by hand": ("torch rank 1", "LowRank(1)"),
}
PSO_ROWS = {"EvoX PSO": "EvoX PSO", "torch._foreach_*": "Naive", "a plain loop": "Loop"}
PSO_CASES = ("51 parameters, 20 particles", "51 parameters, 4096 particles")
PSO_CASES += ("1M parameters, 16 particles", "1M parameters, 64 particles")


def _systems() -> Iterator[Line]:
    label, case = "MLP 64-256-256-10, 1024 members", ("64-256-256-10, ",)
    for view in ("step", "forward"):
        for name, (theirs, ours) in NETWORK_ROWS.items():
            yield Line(f"{label}, {view}", name, NAN, NAN, "network", view, case, theirs, ours)
    for pso_case in PSO_CASES:
        for name, theirs in PSO_ROWS.items():
            if theirs == "Loop" and pso_case != PSO_CASES[0]:  # of more particles it takes minutes
                continue
            own = f"PSO update, {pso_case}"
            yield Line(own, name, NAN, NAN, "pso", "update", (pso_case,), theirs, "PSO")


NESGPU = "NESgpu (James Amand, github.com/jamesal1/NESgpu, 2020)"
TABLES = {
    "readmelinear": Table(
        "NESgpu's README: a linear layer, 1024 rows, 1024 directions",
        f"{NESGPU}, README; GeForce 1080 Ti, float32, median of 100.",
        "Their forwards find the noise drawn, there and here; ours draw it in the call. Naive is "
        "the unperturbed layer, once for every row.",
        tuple(_readme_linear()),
    ),
    "readmeconv": Table(
        "NESgpu's README: a convolution, one row for each direction",
        f"{NESGPU}, README; GeForce 1080 Ti, float32, 1024 rows, median of 100.",
        "Their forwards find the noise drawn; ours draw it in the call. On a CPU, without --full, "
        "a sixteenth of the rows: compare multiples.",
        tuple(_readme_conv()),
    ),
    "paperlinear": Table(
        "NESgpu's paper: linear layers, 8192 rows",
        "Amand, NESgpu, draft of a paper in the repository (2021); RTX 2070, float16, median of "
        "100.",
        "float32 here. Their way is timed for independent noise alone, on a CPU with --full, since "
        "drawing it takes minutes there.",
        tuple(_paper("nesgpu", PAPER_LINEAR_SHAPES, PAPER_LINEAR_BASE, PAPER_LINEAR)),
    ),
    "paperconv": Table(
        "NESgpu's paper: convolutions, 512 rows",
        "Amand, NESgpu, draft of a paper in the repository (2021); RTX 2070, float16, median of "
        "100.",
        "float32 here; on a CPU, without --full, a sixteenth of the rows, and no pairs.",
        tuple(_paper("conv", PAPER_CONV_SHAPES, PAPER_CONV_BASE, PAPER_CONV)),
    ),
    "eggrolls": Table(
        "EGGROLL's protocol: one Linear d x d, as many rows as members, in pairs",
        "Sarkar et al., EGGROLL (arXiv 2511.16652, 2025); GH200, bfloat16, JAX.",
        "d = 8192 in bfloat16 on a GPU, 1024 in float32 on a CPU. Throughput in per cent of the "
        "unperturbed layer's; the update, which costs as much as the forward, is not in it.",
        tuple(_eggroll()),
        per_cent=True,
    ),
    "systems": Table(
        "EvoX, EvoTorch, torch.func.vmap and a plain loop",
        "EvoX 1.4 and EvoTorch 0.6 publish no times of these tasks.",
        "The same population, learning rate and loss for all; ours with the noise of the same "
        "rank. Times base are multiples of the plain forward of all rows.",
        tuple(_systems()),
    ),
}
