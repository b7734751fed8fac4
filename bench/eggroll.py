"""Suite ``eggroll``: the speed protocol of EGGROLL (Sarkar et al., arXiv 2511.16652).

One Linear d x d without bias, a batch of as many rows as members, one input each; the result is the
throughput in per cent of the unperturbed layer's (columns "% of base"). The paper has d = 8192 in
bfloat16 on a GH200: 91 % with the factors of the noise given, 69 % with noise drawn in the call.

torch, factors given   x W^T + sigma (x B) A^T with A and B of all directions in memory
torch, factors drawn   the same, after randn of A and B

Their antithetic pairs share a draw, and so do ours (R = 2); R = 1 is one draw for each member. The
view ``step`` adds the update, (w A)^T B, which the paper leaves out: it costs as much as the
forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import ours
from bench.common import Options, Result, Row, assert_close, measure, rtol
from bench.ours import SIGMA
from bench.population import Case

MEMBERS = 1024


class Factors:
    """Rank-1 noise in plain torch, as few operations as it takes: the rows to beat."""

    def __init__(self, case: Case, layer: nn.Linear, x: Tensor, weights: Tensor) -> None:
        self.case, self.layer, self.weights = case, layer, weights.to(x.dtype)
        self.x = x.view(case.repeats, case.directions, case.inputs)
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
        y = F.linear(self.x, self.layer.weight)
        inner = (self.x * self.b).sum(-1, keepdim=True) * self.scale
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
    d = features or (8192 if on_gpu else 1024)
    generator = torch.Generator().manual_seed(d)
    layer = nn.Linear(d, d, bias=False, device=options.device, dtype=dtype)
    x = torch.rand(members, d, generator=generator).to(options.device, dtype)
    results: list[Result] = []
    for repeats in (2, 1):
        case = Case(d, d, members // repeats, repeats)
        weights = torch.randn(case.directions, generator=generator).to(options.device)
        base = F.linear(x, layer.weight)
        for view in options.chosen(("forward", "step")):
            name = f"{case}, {str(dtype).removeprefix('torch.')}"
            options.progress(f"eggroll, {view}: {name}")
            rows = [
                Row(
                    "Base",
                    lambda: layer(x),
                    lambda base=base: assert_close(layer(x), base, "Base", rtol(x)),
                    0,
                ),
                *Factors(case, layer, x, weights).rows(view),
            ]
            for noise in ours.families(options.full):
                rows.append(ours.Population(layer, noise, case.directions, x, weights).row(view))
            results += measure("eggroll", view, name, rows, options.device, options.seconds)
    return results, []
