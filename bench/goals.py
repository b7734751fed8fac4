"""What we want of rows, and whether they have it.

Goals were set before the kernels were written, from the rates of the machines named here: of CPUs
for two cores with AVX-512, of GPUs for an H200. They hold for 1024 x 1024 layers with 1024 rows
where they do not say otherwise; on other machines they are a comparison, no promise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bench.common import Result

R1, PAIRS, R16 = "R=1 ", "R=2 ", "R=16 "
NORMAL, SIGNS = "Dense('normal')", "Dense('rademacher')"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio of two rows of one case that is to be large, or small.

    Attributes:
        suite: of both rows.
        view: of both rows.
        case: what its label begins with.
        repeats: a part of the label; empty for any.
        method: the row that has the goal.
        against: the row that it is compared with.
        cpu: the goal on a CPU; None for none.
        cuda: the goal on a GPU; None for none.
        at_most: the time over the other's is to be at most the goal; else the other's time over
            its own at least.
    """

    suite: str
    view: str
    case: str
    repeats: str
    method: str
    against: str
    cpu: float | None
    cuda: float | None
    at_most: bool = False

    def applies(self, result: Result) -> bool:
        return (
            (result.suite, result.view, result.method) == (self.suite, self.view, self.method)
            and result.case.startswith(self.case)
            and self.repeats in result.case
        )

    def verdict(self, own: float, other: float, wanted: float) -> str:
        """A cell of a table, such as "112x Stored, at least 100x: met"."""
        value = own / other if self.at_most else other / own
        met = value <= wanted if self.at_most else value >= wanted
        sign = "at most" if self.at_most else "at least"
        return f"{value:.3g}x {self.against}, {sign} {wanted:g}x: {'met' if met else 'missed'}"


def _layer(view: str, repeats: str, method: str, against: str, cpu: float, cuda: float) -> Goal:
    return Goal("linear", view, "1024x1024", repeats, method, against, cpu, cuda)


def _times_base(repeats: str, method: str, cpu: float, cuda: float) -> Goal:
    return Goal("linear", "forward", "1024x1024", repeats, method, "Base", cpu, cuda, True)


def _share(view: str, repeats: str, method: str, share: float) -> Goal:
    """Throughput in parts of the plain layer's, at the size of EGGROLL's paper, on a GPU."""
    return Goal("eggroll", view, "8192x8192", repeats, method, "Base", None, share)


GOALS = (
    _layer("step", R1, NORMAL, "Stored", 8, 2),
    _layer("step", R1, NORMAL, "vmap", 12, 5),
    _layer("step", R1, NORMAL, "Loop", 23, 500),
    _layer("forward", R1, NORMAL, "Stored", 0.5, 1.3),
    _layer("step", R1, SIGNS, "Stored", 100, 15),
    _layer("step", R1, SIGNS, "Loop", 250, 500),
    _times_base(R1, NORMAL, 42, 17),
    _times_base(PAIRS, NORMAL, 22, 9),
    _times_base(R16, NORMAL, 4.5, 2),
    _times_base(R1, SIGNS, 4.2, 2.9),
    _times_base(PAIRS, SIGNS, 3, 1.9),
    _times_base(R1, "Sparse(1)", 1.1, 1.15),
    _times_base(R1, "SignFlip('in')", 2.1, 1.2),
    _times_base(R1, "Permuted('in')", 2.1, 1.2),
    _times_base(R1, "LowRank(1)", 1.5, 1.5),
    _share("forward", R1, "LowRank(1)", 0.8),
    _share("forward", PAIRS, "LowRank(1)", 0.85),
    _share("forward", R1, "LowRank(1, 'rademacher')", 0.9),
    _share("forward", R1, "LowRank(4)", 0.8),
    _share("forward", R1, "SignFlip('in')", 0.47),
    _share("step", R1, "LowRank(1)", 0.45),
    Goal("eggroll", "step", "", "", "LowRank(1)", "torch, factors drawn", 1.5, 1.5),
    *(
        Goal("conv", "forward", case, R1, NORMAL, "Base", 1.15, 2.0, True)
        for case in ("16-16, 3x3, ", "32-32, 3x3, ", "64-64, 3x3, ", "32-32, 1x1, ")
    ),
    *(
        Goal("conv", "step", case, R1, NORMAL, "Stored", cpu, 2.0)
        for case, cpu in (("16-16, 3x3, ", 2.2), ("64-64, 3x3, ", 1.5))
    ),
    Goal("network", "step", "64-256-256-10", "", "LowRank(1)", "EvoX VirtualLoRA", 40, None),
    Goal("network", "step", "64-256-256-10", "", "LowRank(1)", "EvoTorch PGPE", 140, None),
)


def verdicts(results: Sequence[Result], on_gpu: bool) -> dict[tuple[str, ...], str]:
    """Row -> its goals and whether it met them; rows without a goal, or a time, are left out."""
    by_key = {result.key: result for result in results}
    found: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        for goal in GOALS:
            wanted = goal.cuda if on_gpu else goal.cpu
            if wanted is None or not goal.applies(result):
                continue
            other = by_key.get((*result.key[:3], goal.against))
            if other is None or math.isnan(result.median_s + other.median_s):
                continue
            verdict = goal.verdict(result.best_s, other.best_s, wanted)
            found.setdefault(result.key, []).append(verdict)
    return {key: "; ".join(texts) for key, texts in found.items()}
