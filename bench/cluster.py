"""A step on a cluster of GPUs, from constants that nobody here has measured.

The form of every time is that of ``perturbed``: a process evaluates its share of the directions,
losses are gathered, and the estimate is drawn by each for all ("full") or added up ("sharded").
Every constant is in ASSUMPTIONS, with its source.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A number that was not measured here.

    Attributes:
        what: it is of.
        value: in SI units: seconds, bytes and operations.
        text: how tables write it.
        kind: "data sheet", "counted" (from compiled code) or "guess".
        source: where it is from.
    """

    what: str
    value: float
    text: str
    kind: str
    source: str


H200 = "NVIDIA H200 data sheet"
DGX = "NVIDIA DGX H200 data sheet"
NCCL = "latency table of NCCL's own cost model, src/graph/tuning.cc, protocol LL, rounded"
COUNTED = "instructions of the kernels compiled for sm_90, 132 SMs at 1.83 GHz"
ASSUMPTIONS = {
    "bf16": Assumption(
        "products of bfloat16", 989e12, "989 TFLOP/s", "data sheet", f"{H200}, without sparsity"
    ),
    "fp32": Assumption("products of float32", 67e12, "67 TFLOP/s", "data sheet", H200),
    "used": Assumption(
        "part of it that forwards reach", 0.4, "40 %", "guess", "usual for training of transformers"
    ),
    "memory": Assumption("memory of a GPU", 141e9, "141 GB", "data sheet", H200),
    "memory speed": Assumption(
        "its speed, 80 % of the data sheet's", 3.84e12, "3.84 TB/s", "guess", f"{H200}: 4.8 TB/s"
    ),
    "normal": Assumption(
        "`Dense()`, drawn and added up", 1.5e12, "1.5e12 /s", "counted", f"{COUNTED}, 80 % of them"
    ),
    "signs": Assumption(
        '`Dense("rademacher")`, the same',
        1.4e13,
        "1.4e13 /s",
        "counted",
        f"{COUNTED}, 75 % of them",
    ),
    "factors": Assumption(
        "`LowRank(1)`, a float32 product",
        2.5e13,
        "2.5e13 /s",
        "guess",
        "75 % of the data sheet's float32 products, 2 operations for each element",
    ),
    "factor forward": Assumption(
        "`LowRank(1)` in a forward", 0.18, "18 % more", "counted", "bytes, 4096 x 4096 in bfloat16"
    ),
    "launch": Assumption(
        "start of kernels, for each linear layer", 20e-6, "20 us", "guess", "4 kernels of 5 us"
    ),
    "node": Assumption("GPUs of a node", 8, "8", "data sheet", DGX),
    "inside": Assumption(
        "NVLink, one direction, 80 %", 360e9, "360 GB/s", "guess", f"{H200}: 900 GB/s both ways"
    ),
    "between": Assumption(
        "InfiniBand adapter, one direction, 80 %",
        40e9,
        "40 GB/s",
        "guess",
        f"{DGX}: 400 Gb/s, one adapter for each GPU",
    ),
    "inside latency": Assumption("a hop over NVLink", 0.6e-6, "0.6 us", "guess", NCCL),
    "between latency": Assumption("a hop over InfiniBand", 5e-6, "5 us", "guess", NCCL),
}


def assumed(name: str) -> float:
    """The value of an assumption."""
    return ASSUMPTIONS[name].value


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that a cluster would train.

    Attributes:
        name: in tables.
        parameters: P.
        layers: linear ones.
        tokens: or examples, that every member sees in a step.
        directions: D of the population, of pairs.
        dtype: of parameters, estimate and products: "fp32" or "bf16".
    """

    name: str
    parameters: float
    layers: int
    tokens: int
    directions: int
    dtype: str

    @property
    def nbytes(self) -> float:
        """Of the parameters, and so of the estimate that sharded processes add up."""
        return self.parameters * (4 if self.dtype == "fp32" else 2)


MODELS = (
    Model("1M", 1e6, 3, 256, 8192, "fp32"),
    Model("125M", 125e6, 12 * 6, 4096, 8192, "bf16"),
    Model("7B", 7e9, 32 * 7, 4096, 2048, "bf16"),
)
FAMILIES = {"Dense()": "normal", 'Dense("rademacher")': "signs", "LowRank(1)": "factors"}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs; every adapter carries an equal part of what leaves its node.

    Attributes:
        gpus: N, all together; whole nodes.
        adapters: of each node.
    """

    gpus: int
    adapters: int = 8

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / assumed("node"))

    def all_reduce(self, nbytes: float) -> float:
        """Seconds to add up ``nbytes`` of every GPU: inside nodes, between them, inside again.

        Inside a node it is a ring: 2 (g - 1) hops and 2 (g - 1) / g of the bytes. Between nodes it
        is a ring or a double binary tree, whichever takes less time: 2 (M - 1) hops and
        2 (M - 1) / M of an adapter's bytes, or 2 log2(M) hops and twice an adapter's bytes.
        """
        g, nodes = min(self.gpus, assumed("node")), self.nodes
        inside = 2 * (g - 1) * (assumed("inside latency") + nbytes / g / assumed("inside"))
        if nodes == 1:
            return inside
        share, hop = nbytes / self.adapters / assumed("between"), assumed("between latency")
        ring = 2 * (nodes - 1) * (hop + share / nodes)
        tree = 2 * (math.ceil(math.log2(nodes)) * hop + share)
        return inside + min(ring, tree)

    def all_gather(self, nbytes: float) -> float:
        """Seconds until every GPU has ``nbytes``, of which each gave an equal part: rings."""
        g, nodes = min(self.gpus, assumed("node")), self.nodes
        inside = (g - 1) * (assumed("inside latency") + nbytes / g / assumed("inside"))
        share = nbytes / self.adapters / assumed("between")
        return inside + (nodes - 1) * (assumed("between latency") + share / nodes)


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step on every GPU.

    Attributes:
        forward: of its share of the population.
        gather: of all losses.
        full: estimate of all directions.
        part: estimate of its own directions.
        add_up: of the estimates, with the copies before and after.
        update: of the parameters, by Adam.
    """

    forward: float
    gather: float
    full: float
    part: float
    add_up: float
    update: float

    @property
    def with_full(self) -> float:
        return self.forward + self.gather + self.full + self.update

    @property
    def with_sharded(self) -> float:
        return self.forward + self.gather + self.part + self.add_up + self.update


def step(model: Model, family: str, cluster: Cluster) -> Step:
    """Compute a step from the assumptions.

    Args:
        model: what is trained.
        family: a key of FAMILIES.
        cluster: by what.
    """
    rate = assumed(FAMILIES[family])
    own = model.directions / cluster.gpus  # directions of a GPU
    products = (
        2 * own * model.tokens * 2 * model.parameters / (assumed(model.dtype) * assumed("used"))
    )
    if family == "LowRank(1)":
        forward = products * (1 + assumed("factor forward"))
    else:  # x E_d is a product like x W, and a pair shares the draw of E_d
        forward = 2 * products + own * model.parameters / rate
    speed = assumed("memory speed")
    return Step(
        forward=forward + model.layers * assumed("launch"),
        gather=cluster.all_gather(2 * model.directions * 4),
        full=model.directions * model.parameters / rate,
        part=own * model.parameters / rate,
        # Joined, copied to the wire, copied back: each reads and writes.
        add_up=cluster.all_reduce(model.nbytes) + 6 * model.nbytes / speed,
        update=7 * model.nbytes / speed,  # reads 4 tensors, writes 3
    )


def crossover(model: Model, family: str, cluster: Cluster) -> float:
    """Directions up to which "full" takes no longer than "sharded": a process draws the rest of the
    population, D (1 - 1/N), in the time that the others' sums would travel."""
    each = model.parameters / assumed(FAMILIES[family]) * (1 - 1 / cluster.gpus)
    return step(model, family, cluster).add_up / each
