"""What 64 and 1,024 GPUs would do: ``python -m bench.scaling RESULTS.json [RESULTS.json ...]``.

Prints the tables of docs/scaling.md, which ``python -m bench.docs`` writes there. The form of every
time is that of ``perturbed``: a process evaluates its share of the directions, losses are gathered,
and the estimate is drawn by each for all ("full") or added up ("sharded"). That form, and the bytes
that travel, are held against a run of suite ``distributed``. The constants of a cluster of GPUs are
not measured: every one of them is in ASSUMPTIONS, with its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.common import Result
from bench.distributed import shared, sharing
from bench.report import duration, ratio, size, table


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


# ---- tables --------------------------------------------------------------------------------------


def assumptions_table() -> str:
    rows = [[a.what, a.text, a.kind, a.source] for a in ASSUMPTIONS.values()]
    return table(["what", "value", "kind", "source"], rows)


def models_table() -> str:
    names = {"fp32": "float32", "bf16": "bfloat16"}
    rows = [
        [
            m.name,
            f"{m.parameters:,.0f}",
            names[m.dtype],
            str(m.layers),
            f"{m.tokens:,}",
            f"{m.directions:,}",
        ]
        for m in MODELS
    ]
    headers = ["model", "parameters", "dtype", "linear layers", "tokens a member", "D (pairs)"]
    return table(headers, rows)


def rates_table(results: Sequence[Result]) -> str:
    """Measured, one thread: what a direction costs, and elements of an estimate a second."""
    rows = []
    for case, of in shared(results, "strong").items():
        alone, s = of[1, "full"], sharing(of[1, "full"])
        rest = (alone.median_s - s.estimate_s) / s.directions
        rate = s.directions * s.parameters / s.estimate_s
        rows.append(
            [_name(case), duration(rest), duration(s.estimate_s / s.directions), f"{rate:.2g}"]
        )
    headers = ["model, noise, population", "step without estimate", "estimate", "elements / s"]
    return table(headers, rows)


def formula_table(results: Sequence[Result], processes: int = 2) -> str:
    """The form of a step's time, from one process and the exchanges, beside measured steps."""
    rows = []
    for case, of in shared(results, "strong").items():
        if (processes, "sharded") not in of:
            continue
        alone = of[1, "full"]
        estimate = sharing(alone).estimate_s
        full, sharded = of[processes, "full"], of[processes, "sharded"]
        waits = {way: sharing(of[processes, way]).transfer_s for way in ("full", "sharded")}
        expected_full = (alone.median_s - estimate) / processes + estimate + waits["full"]
        expected_sharded = alone.median_s / processes + waits["sharded"]
        each = estimate / sharing(alone).directions * (1 - 1 / processes)
        even = max(0.0, waits["sharded"] - waits["full"]) / each
        rows.append(
            [
                _name(case),
                duration(expected_full),
                f"{duration(full.median_s)} ({ratio(full.median_s / expected_full)})",
                duration(expected_sharded),
                f"{duration(sharded.median_s)} ({ratio(sharded.median_s / expected_sharded)})",
                f"{even:,.0f}",
                sharing(full).auto,
            ]
        )
    headers = ["model, noise, population", "full: formula", "measured", "sharded: formula"]
    headers += ["measured", "D up to which full pays", "auto takes"]
    return table(headers, rows)


def _name(case: str) -> str:
    model, rest = case.split(", ", 1)
    family, population = rest.rsplit(", ", 1)
    return f"{model}, `{family}`, {population}"


def traffic_table() -> str:
    """Payload of a GPU and step, and how long it takes."""
    rows = []
    for model in MODELS:
        for gpus in (64, 1024):
            wide, narrow = Cluster(gpus), Cluster(gpus, adapters=1)
            losses = 2 * model.directions * 4
            rows.append(
                [
                    model.name,
                    f"{gpus:,}",
                    size(losses / gpus),
                    duration(wide.all_gather(losses)),
                    size(model.nbytes),
                    duration(wide.all_reduce(model.nbytes)),
                    duration(narrow.all_reduce(model.nbytes)),
                ]
            )
    headers = ["model", "GPUs", "losses", "all-gather", "estimate", "all-reduce"]
    return table([*headers, "with 1 adapter a node"], rows)


def clusters_table() -> str:
    """A step of every model and family, both ways."""
    rows = []
    for model in MODELS:
        for family in FAMILIES:
            for gpus in (64, 1024):
                s = step(model, family, Cluster(gpus))
                alone = step(model, family, Cluster(1))
                best = min(s.with_full, s.with_sharded)
                rows.append(
                    [
                        f"{model.name}, `{family}`",
                        f"{gpus:,}",
                        duration(s.forward),
                        duration(s.full),
                        duration(s.with_full),
                        f"{duration(s.part)} + {duration(s.add_up)}",
                        duration(s.with_sharded),
                        "full" if s.with_full <= s.with_sharded else "sharded",
                        f"{alone.with_full / best / gpus:.0%}",
                    ]
                )
    headers = ["model, noise", "GPUs", "forward", "estimate, full", "step, full"]
    headers += ["estimate, sharded", "step, sharded", "take", "efficiency"]
    return table(headers, rows)


def crossover_table() -> str:
    """Directions up to which "full" pays."""
    rows = []
    for model in MODELS:
        for gpus in (8, 64, 1024):
            for adapters in (8, 1) if gpus > 8 else (8,):
                cluster = Cluster(gpus, adapters)
                cells = [f"{crossover(model, family, cluster):,.0f}" for family in FAMILIES]
                between = "" if gpus == 8 else str(adapters)
                rows.append([model.name, f"{gpus:,}", between, *cells])
    headers = ["model", "GPUs", "adapters a node", *(f"`{family}`" for family in FAMILIES)]
    return table(headers, rows)


def memory_table() -> str:
    """What a GPU holds beside activations, which `chunk` bounds."""
    rows = []
    for model in MODELS:
        held = 4 * model.nbytes
        most = held + 2 * model.nbytes
        fits = "yes" if most < assumed("memory") else "no"
        cells = [2 * model.nbytes, 2 * model.nbytes, held, most]
        rows.append([model.name, *(size(cell) for cell in cells), fits])
    headers = ["model", "parameters, estimate", "Adam", "full", "sharded, at its peak"]
    return table([*headers, "fits"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    options = parser.parse_args(argv)
    results: list[Result] = []
    for path in options.results:
        found, facts, _ = report.read_json(path)
        results += [r for r in found if r.suite == "distributed"]
        print(f"{path.name}: {report.machine_line(facts)}\n")
    if not results:
        parser.error("the files must hold results of suite distributed, got none")
    for title, text in (
        ("Measured, 1 thread: a direction", rates_table(results)),
        ("Measured, 2 processes", formula_table(results)),
        ("Assumed", assumptions_table()),
        ("Models", models_table()),
        ("Payload of a step and GPU", traffic_table()),
        ("Steps", clusters_table()),
        ("Directions up to which full pays", crossover_table()),
        ("Memory of a GPU", memory_table()),
    ):
        print(f"### {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
