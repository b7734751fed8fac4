"""Arguments that work for every operator, with memory around the tensors that are written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from ops import make_key, make_sigma, stream
from torch import Tensor

OPS = torch.ops.perturbed
R, D, T, OUT, IN = 2, 3, 2, 5, 6
EDGE = 64  # elements on both sides of a tensor that is written
MARK = 12345.0
SIDES = ("height", "width")


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor in the middle of a larger one, whose ends must stay as they are."""
    count = int(torch.Size(shape).numel())
    whole = torch.full((count + 2 * EDGE,), MARK, dtype=dtype)
    whole[EDGE : EDGE + count] = 1
    return whole[EDGE : EDGE + count].view(shape)


def edges_are_whole(tensor: Tensor) -> bool:
    """Whether nothing was written beside a tensor of `guarded`."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    count = storage.numel() - 2 * EDGE
    return bool((storage[:EDGE] == MARK).all() and (storage[EDGE + count :] == MARK).all())


def names_of(op: str) -> list[str]:
    """The arguments in the order of the schema."""
    return [a.name for a in getattr(OPS, op).default._schema.arguments]


def written(op: str) -> list[str]:
    """The arguments that the operator writes into."""
    arguments = getattr(OPS, op).default._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def all_ops() -> list[str]:
    """Every operator that the package defines, from the dispatcher's own list."""
    registered = torch._C._dispatch_get_all_op_names()
    found = {re.sub(r"perturbed::([^.]*).*", r"\1", n) for n in registered if "perturbed::" in n}
    return sorted(found)


_VALUES: dict[str, Callable[[], Any]] = {
    "y": lambda: guarded(R * D, T, OUT),
    "x": lambda: torch.ones(R * D, T, IN),
    "z": lambda: torch.ones(R * D, T, OUT),
    "grad": lambda: guarded(OUT, IN),
    "weights": lambda: torch.ones(D),
    "base": lambda: torch.ones(OUT, IN),
    "index": lambda: torch.zeros(R * D, T, dtype=torch.int64),
    "key": make_key,
    "sigma": make_sigma,
    "directions": lambda: D,
    "antithetic": lambda: True,
    "rademacher": lambda: False,
    "accumulate": lambda: True,
    "shared": lambda: False,
    "replace": lambda: False,
    "per_dimension": lambda: True,
    "first": lambda: 0,
    "count": lambda: 2,
    "rows": lambda: OUT,
    "cols": lambda: IN,
    "size": lambda: IN,
    "rank": lambda: 2,
    "dtype": lambda: torch.float32,
    "position": lambda: guarded(4, IN),
    "velocity": lambda: guarded(4, IN),
    "best": lambda: guarded(4, IN),
    "improved": lambda: torch.ones(4, dtype=torch.bool),
    "guide": lambda: torch.zeros(4, dtype=torch.int64),
    "coefficients": lambda: torch.ones(3, dtype=torch.float64),
    "limit": lambda: torch.ones(1),
    "lower": lambda: -torch.ones(1),
    "upper": lambda: torch.ones(1),
    "bounds": lambda: 1,
    "kernels": lambda: torch.ones(D, OUT, IN, 2, 2),
    "bias": lambda: torch.ones(D, OUT),
    **{f"{what}_{axis}": lambda: 1 for what in ("stride", "dilation") for axis in SIDES},
}
# Where a name means another shape.
_OWN: dict[str, dict[str, Callable[[], Any]]] = {
    "conv_members_": {
        "y": lambda: guarded(R, D, OUT, 3, 4),
        "x": lambda: torch.ones(R, D, IN, 4, 5),
    },
}


def arguments_of(op: str) -> dict[str, Any]:
    """Fresh arguments that the operator takes."""
    return {
        name: stream(1 + i)
        if name.endswith("stream")
        else (_OWN.get(op, {}).get(name) or _VALUES[name])()
        for i, name in enumerate(names_of(op))
    }


def changed(value: Any) -> dict[str, Callable[[], Any]]:
    """Wrong values in place of one: name -> maker."""
    if isinstance(value, Tensor):
        return {
            "empty": lambda: value.new_empty(0),
            "scalar": lambda: value.new_ones(()),
            "vector": lambda: value.new_ones(7),
            "matrix": lambda: value.new_ones(7, 3),
            "one_more": lambda: value.new_ones([n + 1 for n in value.shape]),
            "one_less": lambda: value.new_ones([max(0, n - 1) for n in value.shape]),
            "no_rows": lambda: value.new_ones([0, *value.shape[1:]]),
            "no_columns": lambda: value.new_ones([*value.shape[:-1], 0]),
            "four_dims": lambda: value.new_ones(2, 2, 2, 2),
            "turned": lambda: value.new_ones(value.shape[::-1]).permute(
                list(reversed(range(value.dim())))
            ),
            "every_other": lambda: value.new_ones([2 * n for n in value.shape])[
                tuple(slice(None, None, 2) for _ in value.shape)
            ],
            "expanded": lambda: value.new_ones([1] * value.dim()).expand(value.shape),
            "overlapping": lambda: value.new_ones(value.numel() + 1).as_strided(
                value.shape, [1] * value.dim()
            ),
            "double": lambda: value.double(),
            "half": lambda: value.half(),
            "bfloat16": lambda: value.bfloat16(),
            "int64": lambda: value.long(),
            "int32": lambda: value.int(),
            "bool": lambda: value.bool(),
            "complex": lambda: value.to(torch.complex64),
            "nan": lambda: (
                torch.full_like(value, float("nan"))
                if value.is_floating_point()
                else torch.full_like(value, -1)
            ),
            "huge": lambda: torch.full_like(value, 2**62 if value.dtype == torch.int64 else 1),
            "meta": lambda: torch.empty(value.shape, dtype=value.dtype, device="meta"),
            "sparse": lambda: value.clone().to_sparse(),
            "grad": lambda: value.clone().requires_grad_() if value.is_floating_point() else value,
            "none": lambda: None,
            "number": lambda: 1,
        }
    if isinstance(value, bool):
        return {"flipped": lambda: not value, "two": lambda: 2, "none": lambda: None, "text": str}
    if isinstance(value, int):
        numbers = (0, -1, -2, 1, 2, 3, 7, 8, 100, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62)
        numbers += (2**63 - 1, -(2**63), 2**63)
        found: dict[str, Callable[[], Any]] = {str(n): lambda n=n: n for n in numbers}
        return {
            **found,
            "fraction": lambda: 0.5,
            "none": lambda: None,
            "text": str,
            "True": lambda: True,
        }
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.complex64,
    )
    return {
        **{str(d): lambda d=d: d for d in dtypes},
        "none": lambda: None,
        "text": lambda: "float",
    }


Wrong = dict[str, str]  # argument -> name of a wrong value


def calls(pairs: int = 3000) -> list[tuple[str, Wrong]]:
    """Each wrong value alone, and so many pairs of them: operator and wrong values."""
    single = [
        (op, {argument: wrong})
        for op in all_ops()
        for argument, value in arguments_of(op).items()
        for wrong in changed(value)
    ]
    draw = random.Random(0)
    drawn = (draw.choice(single) for _ in range(pairs))
    of_op = {op: [wrong for other, wrong in single if other == op] for op in all_ops()}
    return single + [(op, {**wrong, **draw.choice(of_op[op])}) for op, wrong in drawn]


def verdict(wrong: Wrong, outcome: str) -> str | None:
    """Return why an outcome is in order; None if it is not."""
    if outcome == "refused":
        return outcome
    if outcome != "accepted":
        return None
    # Two wrong values may fit each other: no rows for any number of directions.
    (argument, name), *second = wrong.items()
    missing = name == "-1" and argument in MAY_BE_MISSING
    if not second and name in UNFIT and not missing and argument != "first":
        return None
    return outcome


# Numbers that no operator takes; but for streams of what is not perturbed, and the first direction,
# which is one of 2^32 whatever is asked for.
UNFIT = {"-1", "-2", str(-(2**63)), str(2**40), str(2**62), str(2**63 - 1), str(2**63), "fraction"}
MAY_BE_MISSING = {"weight_stream", "bias_stream", "b_stream", "in_stream", "out_stream"}


def run(op: str, wrong: Wrong) -> str:
    """Call an operator with wrong values; "accepted", "refused" or what went wrong."""
    arguments = arguments_of(op)
    for argument, name in wrong.items():
        arguments[argument] = changed(arguments[argument])[name]()
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    guards = {n: arguments[n] for n in written(op) if n not in wrong}
    try:
        getattr(OPS, op).default(*arguments.values())
    except IndexError:
        if "meta" in wrong.values():
            return "refused"  # by a fake kernel, which looks at shapes that nobody has checked
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        for name in guards:
            if not torch.equal(arguments[name], before[name]):
                return f"refused, but {name} was changed: {text[:100]}"
        if any(name in text for name in names_of(op)) or any(word in text for word in FROM_TORCH):
            return "refused"
        return f"unnamed {type(error).__name__}: {text[:200]}"
    for name, tensor in guards.items():
        if not edges_are_whole(tensor):
            return f"wrote beside {name}"
    for name, old in before.items():
        new = arguments[name]
        if name not in written(op) and not new.is_sparse and not same_bits(new, old):
            return f"wrote into {name}"
    return "accepted"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().nan_to_num(7.0), b.detach().nan_to_num(7.0))


# What torch itself says before an operator is reached, or of a size that no memory has.
FROM_TORCH = (
    "Could not run", "allocate", "memory", "overflow", "not differentiable",
    "Storage size calculation", "no fake impl", "invalid dtype", "would overflow",
    "strides and dilations", "API call failed",
    "Not yet supported ScalarType", "no tensor arguments", "Expected a value",
    "a view of a leaf", "a leaf Variable", "is not supported", "unsupported operation",
)  # fmt: skip
