"""How near a row comes to what the machine can do: its least work over the measured rates.

A row cannot be faster than its bytes at the rate of a copy, its floating-point operations at the
rate of a product, or its random numbers at the rate of our own generator (bench/machine.py measures
all three at the start of a run). The roof is the slowest of the three, as if the others ran at the
same time for nothing; a row's fraction of it is below 1 where they do not, and above 1 where the
rate measured is not the limit: small tensors stay in caches, and products of other shapes than the
measured one may be faster.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor, nn

from bench.common import Result, Work
from perturbed import Dense, LowRank, Permuted, SignFlip, Sparse
from perturbed.noise import NoiseFamily
from perturbed.noise.shared_base import choose_sides

ROOF_NAMES = {"copy": "memory", "product": "products", "random": "random numbers"}


def times(work: Work, roofs: dict[str, float]) -> dict[str, float]:
    """Seconds that each kind of work takes at least."""
    random = work.normals / roofs["normals"] + work.signs / roofs["signs"]
    return {
        "copy": work.moved / roofs["copy"],
        "product": work.flops / roofs.get(work.dtype, roofs["float32"]),
        "random": random,
    }


def fraction(result: Result, roofs: dict[str, float]) -> tuple[float, str]:
    """Least time over the median, and the kind of work that takes it.

    A call that was replayed counts as replayed: launches are no work of the kernels.

    Raises:
        ValueError: a result without work.
    """
    if result.work is None:
        raise ValueError(f"the result must have work, got none in {result.key}")
    each = times(result.work, roofs)
    kind = max(each, key=lambda name: each[name])
    return each[kind] / result.best_s, kind


def text(result: Result, roofs: dict[str, float]) -> str:
    """Fraction of the roof and what the roof is, as a cell of a table."""
    if result.work is None or not result.timed:
        return ""
    share, kind = fraction(result, roofs)
    return f"{100 * share:.0f} % ({ROOF_NAMES[kind]})"


def words_text(result: Result) -> str:
    """Random 32-bit words a second: a normal takes one, a sign a bit."""
    work = result.work
    if work is None or not result.timed or not work.normals + work.signs:
        return ""
    return f"{(work.normals + work.signs / 32) / result.median_s:.2g}"


# ---- the least work ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution in numbers, its weight as a matrix (m, n).

    Attributes:
        rows: B.
        directions: D.
        m: outputs, or channels of the output.
        n: inputs, or channels of the input times the window.
        pixels: of a channel of the output; 1 in a linear layer.
        moved: elements of inputs, weights and outputs.
        bias: whether it has one.
        bytes_each: of an element.
        dtype: its name.
    """

    rows: int
    directions: int
    m: int
    n: int
    pixels: int
    moved: int
    bias: bool
    bytes_each: int
    dtype: str

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, x: Tensor, directions: int) -> Layer:
        """Measure a layer and its inputs."""
        weight, pixels = layer.weight, 1
        if isinstance(layer, nn.Conv2d):
            sides = (
                (size + 2 * int(pad) - reach * (k - 1) - 1) // stride + 1
                for size, pad, reach, k, stride in zip(
                    x.shape[2:],
                    layer.padding,
                    layer.dilation,
                    layer.kernel_size,
                    layer.stride,
                    strict=True,
                )
            )
            pixels = math.prod(sides)
        m, rows = weight.shape[0], len(x)
        return cls(
            rows=rows,
            directions=directions,
            m=m,
            n=weight[0].numel(),
            pixels=pixels,
            moved=x.numel() + weight.numel() + rows * m * pixels,
            bias=layer.bias is not None,
            bytes_each=weight.element_size(),
            dtype=str(weight.dtype).removeprefix("torch."),
        )

    def base(self) -> Work:
        """The unperturbed forward."""
        flops = 2.0 * self.rows * self.pixels * self.m * self.n
        return Work(self.bytes_each * self.moved, flops, dtype=self.dtype)

    def stored(self, view: str, networks: int = 0) -> Work:
        """Noise of all directions in memory: read for a forward, drawn before and read for a step.

        Args:
            view: "forward", "update" or "step".
            networks: perturbed weights made of it, which are then what a forward reads.
        """
        held = 4.0 * self.directions * self.m * (self.n + self.bias)
        base = self.base()
        twice = dataclasses.replace(base, flops=base.flops * (1 if networks else 2))
        made = held * networks / self.directions
        forward = twice + Work(made or held, 0)
        update = Work(held, 2.0 * self.directions * self.m * self.n)
        draw = Work(held + (held + made if networks else 0), 0, held / 4)
        return {"forward": forward, "update": update, "step": draw + forward + update}[view]

    def perturbed(self, family: NoiseFamily, view: str) -> Work:
        """A draw and the forward, the estimate with its noise made again, or both."""
        drawn = self._drawn(family)
        forward = self.base() + Work(0, self._forward_flops(family)) + drawn
        update = Work(self.bytes_each * self.m * self.n, self._update_flops(family)) + drawn
        return {"forward": forward, "update": update, "step": forward + update}[view]

    def _sides(self, family: NoiseFamily) -> tuple[bool, bool]:
        """Whether the inputs and the outputs of a shared base are changed."""
        if isinstance(family, Permuted):
            return family.sides(self.m, self.n)
        return choose_sides(family.flip, self.m, self.n)

    def _base_numbers(self, family: NoiseFamily) -> int:
        """Elements of what all directions share."""
        if isinstance(family, Permuted):
            return math.prod(family.base_shape(self.m, self.n))
        return self.m * self.n

    def _drawn(self, family: NoiseFamily) -> Work:
        d, flips = self.directions, 0
        if isinstance(family, Dense):
            count = d * self.m * self.n
        elif isinstance(family, LowRank):
            count = d * family.rank * (self.m + self.n)
        elif isinstance(family, Sparse):
            count = d * family.columns(self.n, d) * self.m
        else:
            count = self._base_numbers(family)
            if isinstance(family, SignFlip):
                flip_in, flip_out = self._sides(family)
                count *= min(d, family.bases_used)
                flips = d * (flip_in * self.n + flip_out * self.m)
        count += d * self.m * self.bias
        signs = family.rademacher
        return Work(0, 0, 0 if signs else count, flips + (count if signs else 0))

    def _forward_flops(self, family: NoiseFamily) -> float:
        each = 2.0 * self.rows * self.pixels
        if isinstance(family, Dense):  # the rate of signs has the additions in it
            return 0.0 if family.rademacher else each * self.m * self.n
        if isinstance(family, LowRank):
            return each * family.rank * (self.m + self.n)
        if isinstance(family, Sparse):
            return each * self.m * family.columns(self.n, self.directions)
        return each * self._base_numbers(family)

    def _update_flops(self, family: NoiseFamily) -> float:
        m, n, d = self.m, self.n, self.directions
        if isinstance(family, Dense):
            return 0.0 if family.rademacher else 2.0 * d * m * n
        if isinstance(family, LowRank):
            return 2.0 * d * family.rank * m * n
        if isinstance(family, Sparse):
            return 2.0 * d * m * family.columns(n, d)
        if all(self._sides(family)):
            return 2.0 * d * self._base_numbers(family)
        if isinstance(family, SignFlip):
            return 2.0 * d * max(m, n) * min(d, family.bases_used) + m * n
        side = n if self._sides(family)[0] else m  # a sum of selections, and one product
        return 2.0 * min(d, side) * m * n
