"""Operators on rows in any layout, against their twins in plain torch: random sizes and dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from ops import check_bits, check_functional, in_double, make_key, make_sigma, run, stream, twin
from strategies import LAYOUTS, examine, few_and_many
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes of a call on rows, and how its inputs lie in memory."""

    repeats: int
    directions: int
    tokens: int
    out: int
    inputs: int
    antithetic: bool
    rademacher: bool
    shared: bool
    bias: bool
    layout: str
    dtype: torch.dtype
    first: int
    seed: int

    def tensor(self, *shape: int) -> Tensor:
        """Random numbers, laid out as the operators take them: the last dimension is whole."""
        x = LAYOUTS[self.layout](torch.randn(shape).to(self.dtype))
        return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()

    def arguments(self, op: str) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        rows = self.repeats * self.directions
        x = self.tensor(1 if self.shared else rows, self.tokens, self.inputs)
        y = torch.randn(rows, self.tokens, self.out).to(self.dtype)
        key, bias = make_key(first=self.first), stream(1) if self.bias else -1
        draw = {"directions": self.directions, "antithetic": self.antithetic}
        size = 1 + self.seed % max(1, min(self.inputs, 5))
        noise = {"key": key, "sigma": make_sigma()}
        signs = {"rademacher": self.rademacher}
        if op == "dense_linear":
            streams = {"weight_stream": stream(0), "bias_stream": bias}
            return {"y": y, "x": x, **noise, **streams, **draw, **signs}
        if op == "low_rank_linear":
            streams = {"a_stream": stream(2), "b_stream": stream(3), "bias_stream": bias}
            rank = {"directions": self.directions, "rank": size, "antithetic": self.antithetic}
            return {"y": y, "x": x, **noise, **streams, **rank, **signs}
        if op == "sparse_linear":
            streams = {"column_stream": stream(4), "value_stream": stream(5), "bias_stream": bias}
            count = {"directions": self.directions, "count": size, "antithetic": self.antithetic}
            return {"y": y, "x": x, **noise, **streams, **count, **signs}
        own = {"x": x, "key": key, "stream": stream(6), "directions": self.directions}
        own |= {"count": size} if op == "select" else {}
        alone = self.antithetic and not self.shared  # the two exclude each other
        own |= {"antithetic": alone, "shared": self.shared}
        return own | ({"replace": self.rademacher} if op == "select" else {})


@st.composite
def calls(draw: st.DrawFn) -> Call:
    repeats, sizes = draw(st.integers(0, 6)), st.integers(1, 9) | st.sampled_from([17, 33, 65])
    return Call(
        repeats,
        draw(st.integers(1, 7) | st.just(17)),
        draw(st.integers(0, 3)),
        draw(sizes),
        draw(sizes),
        repeats % 2 == 0 and repeats > 0 and draw(st.booleans()),
        draw(st.booleans()),
        repeats > 0 and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        draw(st.sampled_from([0, 1, 2**31, 2**32 - 20])),
        draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("op", ["dense_linear", "low_rank_linear", "sparse_linear"])
@few_and_many(20, 500)
def test_products_are_as_exact_as_plain_torch(op, examples):
    def check(call: Call) -> None:
        arguments = call.arguments(op)
        check_functional(op, arguments)
        got, plain = run(op, arguments).double(), twin(op)(**arguments).double()
        expected = twin(op)(**in_double(arguments))
        if got.numel():
            # Of a few numbers, plain torch's may be right by chance: some units of what is added.
            largest = max(1.0, float(expected.abs().max()), float(arguments["y"].abs().max()))
            limit = 4 * float((plain - expected).abs().max())
            limit += (
                (16 if call.dtype == torch.float64 else 4) * torch.finfo(call.dtype).eps * largest
            )
            assert float((got - expected).abs().max()) <= limit

    examine(check, examples, call=calls())


@pytest.mark.parametrize("op", ["select", "flip"])
@few_and_many(20, 500)
def test_rows_that_are_moved_have_the_bits_of_plain_torch(op, examples):
    def check(call: Call) -> None:
        check_bits(op, call.arguments(op))

    examine(check, examples, call=calls())
