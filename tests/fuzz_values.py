"""Wrong values for any argument, by name, and what a call made of one."""

from __future__ import annotations

import decimal
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class HostileLength:
    """Says it is long, and holds nothing."""

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: Any) -> Any:
        raise IndexError(index)


class HostileNumber:
    """Refuses to be a number, in the way of careless code."""

    def __float__(self) -> float:
        raise TypeError("hostile")

    __index__ = __float__  # type: ignore[assignment]


class Text(str):
    """A subclass of str."""


def _generator() -> Iterator[int]:
    yield from (1, 2, 3)


def _function(*args: Any, **kwargs: Any) -> None:
    return None


# Name -> maker: every call gets a value of its own.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "1e300": lambda: 1e300,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "complex": lambda: 1j,
    "decimal": lambda: decimal.Decimal("0.5"),
    "text": lambda: "nonsense",
    "no_text": lambda: "",
    "number_text": lambda: "1",
    "text_subclass": lambda: Text("nonsense"),
    "bytes": lambda: b"1",
    "list": list,
    "list_of_none": lambda: [None],
    "list_of_text": lambda: ["a", "b"],
    "nested": lambda: [[1, 2], [3]],
    "tuple": tuple,
    "pair": lambda: (1, 2),
    "nan_pair": lambda: (float("nan"), float("nan")),
    "dict": dict,
    "dict_of_none": lambda: {"a": None},
    "set": lambda: {1},
    "range": lambda: range(3),
    "generator": _generator,
    "object": object,
    "class": lambda: int,
    "function": lambda: _function,
    "no_length": HostileLength,
    "no_number": HostileNumber,
    "module": nn.Identity,
    "linear": lambda: nn.Linear(3, 2),
    "numpy_int": lambda: np.int64(2),
    "numpy_float": lambda: np.float32(0.5),
    "numpy_bool": lambda: np.bool_(True),
    "numpy_array": lambda: np.arange(4.0),
    "numpy_texts": lambda: np.array(["a", "b"]),
    "tensor": lambda: torch.ones(4),
    "tensor_scalar": lambda: torch.tensor(0.5),
    "tensor_int": lambda: torch.tensor(2),
    "tensor_ints": lambda: torch.arange(4),
    "tensor_bool": lambda: torch.tensor([True, False, True, True]),
    "tensor_complex": lambda: torch.ones(4, dtype=torch.complex64),
    "tensor_half": lambda: torch.ones(4, dtype=torch.float16),
    "tensor_double": lambda: torch.ones(4, dtype=torch.float64),
    "tensor_nan": lambda: torch.full((4,), float("nan")),
    "tensor_inf": lambda: torch.full((4,), float("inf")),
    "tensor_empty": lambda: torch.empty(0),
    "tensor_3d": lambda: torch.ones(4, 2, 3),
    "tensor_strided": lambda: torch.ones(8, 6)[::2, ::3],
    "tensor_expanded": lambda: torch.ones(1).expand(4),
    "tensor_meta": lambda: torch.empty(4, device="meta"),
    "tensor_sparse": lambda: torch.eye(4).to_sparse(),
    "tensor_grad": lambda: torch.ones(4, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(4)),
    "meta": lambda: "meta",
    "int64": lambda: torch.int64,
    "float16": lambda: torch.float16,
}

MEMORY = ("allocate", "out of memory", "would overflow", "Storage size", "too large", "too big")


def outcome(call: Callable[[], Any], arguments: tuple[str, ...]) -> str:
    """Say what a call did: "accepted", "refused" by an error that names an argument, or else.

    A value may be wrong beside another one, so that either of them may be named.
    """
    try:
        call()
    except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
        if any(re.search(rf"\b{name}\b", str(error)) for name in arguments):
            return "refused"
        if isinstance(error, (RuntimeError, MemoryError)) and any(w in str(error) for w in MEMORY):
            return "memory"
        return f"unnamed {_describe(error)}"
    except MemoryError:
        return "memory"
    except BaseException as error:
        return f"wrong {_describe(error)}"
    return "accepted"


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/perturbed/" in f.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
    return f"{type(error).__name__} at {where}: {str(error)[:160]}"
