"""What every test starts from: a fixed seed, and CUDA tests that skip with a reason."""

import os
from collections.abc import Iterator

import pytest
import torch

from perturbed import _C, _ops, reference
from perturbed.testing import cpu_capability


def missing_cuda() -> str | None:
    """Why tests marked ``cuda`` cannot run here; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _C.build_info()["cuda"] else "the extension was built without CUDA kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip CUDA tests that cannot run, unless the device was asked for by name."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked or os.environ.get("PERTURBED_TEST_DEVICE"):
        return
    reason = missing_cuda()
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed the inputs and initial weights; the package itself never reads the global generator."""
    torch.manual_seed(0)


@pytest.fixture(params=_C.cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn."""
    with cpu_capability(request.param):
        yield request.param


@pytest.fixture(params=[c for c in _C.cpu_capabilities() if c != _C.cpu_capability()])
def other_capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set but the one in use, for what other tests run on that one."""
    with cpu_capability(request.param):
        yield request.param


@pytest.fixture
def fast_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference draw through `dense_materialise` of the device under test.

    That saves most of the time, and on CUDA the normals are those of its special-function units.
    test_noise_layout.py ties the operator's noise to the contract.
    """
    monkeypatch.setattr(
        reference.noise,
        "dense_materialise",
        lambda *args, exact=True: _ops.dense_materialise(*args),
    )
