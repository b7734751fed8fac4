"""Assertions and parameters that tests and benchmarks share.

Two kinds of equality, never mixed: ``assert_bitwise_equal`` for what the package promises bit by
bit (noise, thread counts, splits), ``assert_close_to_reference`` for what depends on the order of
a sum.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def devices() -> list[Any]:
    """List the devices to run a test on, as parameters of ``pytest.mark.parametrize``.

    They are ``cpu`` and ``cuda``, or what PERTURBED_TEST_DEVICE names (comma-separated, such as
    ``cpu`` or ``cuda:1``). CUDA devices carry the marker ``cuda``; tests/conftest.py skips those,
    with a reason, where they cannot run.

    Raises:
        ValueError: PERTURBED_TEST_DEVICE names something that is no torch device.
    """
    import pytest

    params = []
    for name in os.environ.get("PERTURBED_TEST_DEVICE", "cpu,cuda").split(","):
        try:
            device = torch.device(name.strip())
        except RuntimeError as error:
            raise ValueError(
                f"PERTURBED_TEST_DEVICE must name torch devices, got {name.strip()!r}"
            ) from error
        marks = [pytest.mark.cuda] if device.type == "cuda" else []
        params.append(pytest.param(str(device), marks=marks, id=str(device)))
    return params


def missing_cuda() -> str | None:
    """Say why CUDA kernels cannot run here; None if they can."""
    if torch.version.cuda is None:
        return f"needs CUDA: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "needs CUDA: no device is visible"
    from perturbed import _C

    if not _C.build_info()["cuda"]:
        return "needs CUDA: perturbed was built without its CUDA kernels"
    return None


@contextlib.contextmanager
def cpu_capability(name: str) -> Iterator[None]:
    """Force the CPU kernels of one instruction set, one of ``_C.cpu_capabilities()``.

    Raises:
        ValueError: the processor lacks it.
    """
    from perturbed import _C

    before = _C.cpu_capability()
    _C.set_cpu_capability(name)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


def dtype_id(dtype: torch.dtype) -> str:
    """Readable test id of a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Assert the same dtype, shape and bits; -0.0 differs from 0.0 and a NaN equals itself.

    Raises:
        AssertionError: with the number of differing elements and the first one, in hexadecimal too.
    """
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    as_bits = _BITS[actual.element_size()]
    got, want = (t.contiguous().reshape(-1).view(as_bits) for t in (actual, expected))
    different = (got != want).nonzero()
    if different.numel() == 0:
        return
    first = int(different[0])
    digits = 2 * actual.element_size()
    mask = (1 << 4 * digits) - 1
    raise AssertionError(
        f"{different.numel()} of {got.numel()} elements differ, first at "
        f"{_coordinate(first, actual.shape)}: got {actual.reshape(-1)[first].item()!r} "
        f"(0x{int(got[first]) & mask:0{digits}x}), expected {expected.reshape(-1)[first].item()!r} "
        f"(0x{int(want[first]) & mask:0{digits}x})"
    )


def assert_close_to_reference(
    actual: Tensor, same_dtype: Tensor, reference: Tensor, factor: float = 2.0
) -> None:
    """Assert that ``actual`` errs at most ``factor`` times as much as plain torch in its dtype.

    The rule of flash-attention's tests, free of hand-picked tolerances: with ``reference`` the
    result in float64, the largest error may be ``factor`` times that of ``same_dtype``, plus twice
    what merely rounding ``reference`` to the dtype costs.

    Args:
        actual: result under test, any floating dtype.
        same_dtype: what plain torch computes in the dtype of ``actual``.
        reference: float64 result.
        factor: allowed multiple of plain torch's error.

    Raises:
        AssertionError: with max abs, relative L2, cosine and the first offending coordinate.
    """
    assert reference.dtype == torch.float64, f"reference must be float64, got {reference.dtype}"
    assert actual.dtype == same_dtype.dtype, f"dtype {actual.dtype}, expected {same_dtype.dtype}"
    assert actual.shape == same_dtype.shape == reference.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(same_dtype.shape)} and "
        f"{tuple(reference.shape)}"
    )
    if actual.numel() == 0:
        return
    got, plain, want = (t.detach().cpu().double() for t in (actual, same_dtype, reference))
    rounding = (want.to(actual.dtype).double() - want).abs().max()
    allowed = factor * (plain - want).abs().max() + 2 * rounding
    error = (got - want).abs()
    offending = (~(error <= allowed)).reshape(-1).nonzero()  # negated, so that a NaN offends
    if offending.numel() == 0:
        return
    first = int(offending[0])
    relative = (got - want).norm() / want.norm()
    cosine = torch.nn.functional.cosine_similarity(got.reshape(-1), want.reshape(-1), dim=0)
    raise AssertionError(
        f"max abs error {error.max():.3e} > allowed {allowed:.3e}, relative L2 {relative:.3e}, "
        f"cosine {cosine:.9f}; {offending.numel()} of {got.numel()} elements offend, first at "
        f"{_coordinate(first, actual.shape)}: got {got.reshape(-1)[first]:.9g}, expected "
        f"{want.reshape(-1)[first]:.9g}"
    )


def _coordinate(flat: int, shape: torch.Size) -> tuple[int, ...]:
    position = []
    for size in reversed(shape):
        position.append(flat % size)
        flat //= size
    return tuple(reversed(position))
