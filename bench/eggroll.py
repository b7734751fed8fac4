"""Suite ``eggroll``: the speed protocol of EGGROLL (Sarkar et al., arXiv 2511.16652).

One Linear d x d without bias, a batch of as many rows as members, one input each; the result is the
throughput in per cent of the unperturbed layer's (columns "% of base"). The paper has d = 8192 in
bfloat16 on a GH200: 91 % with the factors of the noise given, 69 % with noise drawn in the call.

torch, factors given    x W^T + sigma (x B) A^T with A and B of all directions in memory
torch, factors drawn    the same, after randn of A and B
torch, compiled         factors given, under torch.compile (on a GPU, or with --full)
torch, full rank given  E_d of all directions in memory, a batched product (OpenES in their table)
torch, full rank drawn  the same, after normal_ (R = 1: on a GPU, or with --full)

Their antithetic pairs share a draw, and so do ours (R = 2); R = 1 is one draw for each member. The
view ``step`` adds the update, (w A)^T B, which the paper leaves out: it costs as much as the
forward. On a GPU, and with --full, batches of 64, 352 and 4096 rows follow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import ours
from bench.common import Options, Result, Row, assert_close, failure, fitting, rtol
from bench.ours import SIGMA
from bench.population import Case
from bench.roofline import Layer
from bench.timing import Rotating, measure

MEMBERS = 1024
OTHER_MEMBERS = (64, 352, 4096)
FEATURES_CPU, FEATURES_GPU = 1024, 8192


class Factors:
    """Rank-1 noise in plain torch, as few operations as it takes: the rows to beat."""

    def __init__(self, case: Case, layer: nn.Linear, x: Tensor, weights: Tensor) -> None:
        self.case, self.layer, self.weights = case, layer, weights.to(x.dtype)
        self.x = x.view(case.repeats, case.directions, case.inputs)
        self.rotating = Rotating(self.x)
        self.draw()
        # Of one direction, s_b sigma of its rows.
        self.scale = torch.full((case.repeats, 1, 1), SIGMA, dtype=x.dtype, device=x.device)
        if case.antithetic:
            self.scale[case.repeats // 2 :].neg_()

    def draw(self) -> None:
        kind = {"dtype": self.x.dtype, "device": self.x.device}
        self.a = torch.randn(self.case.directions, self.case.outputs, **kind)
        self.b = torch.randn(self.case.directions, self.case.inputs, **kind)

    def forward(self) -> Tensor:
        return self.product(self.rotating())

    def product(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.layer.weight)
        inner = (x * self.b).sum(-1, keepdim=True) * self.scale
        return y.addcmul_(inner, self.a)

    def update(self) -> Tensor:
        return (SIGMA * self.weights[:, None] * self.a).t() @ self.b

    def check(self) -> None:
        y, grad = self.forward(), self.update()
        for d in sorted({0, self.case.directions // 2, self.case.directions - 1}):
            for r, scale in enumerate(self.scale.flatten().tolist()):
                member = self.layer.weight + scale * torch.outer(self.a[d], self.b[d])
                expected = F.linear(self.x[r, d], member)
                assert_close(y[r, d], expected, f"torch, row {r}, {d}", rtol(self.x))
        weights = self.weights.double() * self.a[:, -1].double()
        expected = SIGMA * weights @ self.b.double()
        assert_close(grad[-1], expected, "torch, update", 10 * rtol(self.x))

    def rows(self, view: str) -> list[Row]:
        held = self.a.nbytes + self.b.nbytes

        def given() -> None:
            self.forward()
            if view == "step":
                self.update()

        def drawn() -> None:
            self.draw()
            given()

        def row(name: str, call: Callable[[], None]) -> Row:
            return Row(name, call, self.check, held)

        return [row("torch, factors given", given), row("torch, factors drawn", drawn)]

    def compiled(self) -> Row:
        """The forward with factors given, as torch.compile makes it."""
        name = "torch, compiled"
        product = torch.compile(self.product, dynamic=False)
        try:
            y = product(self.x)
        except Exception as error:  # no compiler, no Triton: the machine's lack, not a failure
            return Row.missing(name, failure(error).replace("failed", "torch.compile", 1))

        def check() -> None:
            assert_close(y, self.product(self.x), name, rtol(self.x))

        return Row(name, lambda: product(self.rotating()), check, self.a.nbytes + self.b.nbytes)


class FullRank:
    """Independent noise of every direction, in memory."""

    def __init__(self, factors: Factors) -> None:
        case = factors.case
        shape = (case.directions, case.outputs, case.inputs)
        self.factors, self.noise = factors, factors.x.new_empty(shape)
        self.draw()

    def draw(self) -> None:
        self.noise.normal_()

    def forward(self) -> Tensor:
        x = self.factors.rotating()
        y = F.linear(x, self.factors.layer.weight)
        part = torch.bmm(x.transpose(0, 1), self.noise.mT).transpose(0, 1)
        return y.addcmul_(part, self.factors.scale)

    def check(self) -> None:
        y, f = self.forward(), self.factors
        for r, scale in enumerate(f.scale.flatten().tolist()):
            expected = F.linear(f.x[r, -1], f.layer.weight + scale * self.noise[-1])
            assert_close(y[r, -1], expected, f"torch, full rank, row {r}", rtol(f.x))

    def row(self, drawn: bool) -> Row:
        def call() -> None:
            if drawn:
                self.draw()
            self.forward()

        name = f"torch, full rank {'drawn' if drawn else 'given'}"
        return Row(name, call, self.check, self.noise.nbytes)


Candidates = Iterator[tuple[str, int, Callable[[], Row]]]


def candidates(
    view: str, factors: Factors, layer: nn.Linear, x: Tensor, weights: Tensor, options: Options
) -> Candidates:
    """Name of each row, bytes that it has still to allocate, and how to make it."""
    case, base, rotating = factors.case, layer(x), Rotating(x)
    all_rows = options.full or x.is_cuda
    work = Layer.of(layer, x, case.directions).base()

    def plain() -> Row:
        check = lambda: assert_close(layer(x), base, "Base", rtol(x))  # noqa: E731
        return Row("Base", lambda: layer(rotating()), check, 0, work=work)

    yield "Base", 0, plain
    for row in factors.rows(view):
        yield row.name, 0, lambda row=row: row
    if view == "forward":
        if all_rows and len(x) == MEMBERS:
            yield "torch, compiled", 0, factors.compiled
        held = x.element_size() * case.directions * case.inputs * case.outputs
        full_rank = functools.cache(lambda: FullRank(factors))
        for drawn in (False, True) if all_rows or case.antithetic else (False,):
            name = f"torch, full rank {'drawn' if drawn else 'given'}"
            # Both rows have the same noise, so the second fits if the first did.
            needed = 0 if full_rank.cache_info().currsize else held
            yield name, needed, lambda drawn=drawn: full_rank().row(drawn)
    yield from ours.rows(view, layer, case.directions, x, weights, ours.families(options.full))


@torch.no_grad()
def run(
    options: Options, features: int | None = None, members: int = MEMBERS
) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks.

    Args:
        options: Device, time and views.
        features: d; default: the paper's on a GPU, 1024 on a CPU.
        members: Rows and members.
    """
    on_gpu = options.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    d = features or (FEATURES_GPU if on_gpu else FEATURES_CPU)
    generator = torch.Generator().manual_seed(d)
    layer = nn.Linear(d, d, bias=False, device=options.device, dtype=dtype)
    results: list[Result] = []
    others = OTHER_MEMBERS if on_gpu or options.full else ()
    for rows, repeats in itertools.product((members, *others), (2, 1)):
        x = torch.rand(rows, d, generator=generator).to(options.device, dtype)
        case = Case(d, d, rows // repeats, repeats)
        weights = torch.randn(case.directions, generator=generator).to(options.device)
        factors = Factors(case, layer, x, weights)
        for view in options.chosen(("forward", "step")):
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            options.progress(f"eggroll, {view}: {name}")
            found = fitting(candidates(view, factors, layer, x, weights, options), options.device)
            results += measure("eggroll", view, name, found, options.device, options.seconds)
            del found
    return results, []
