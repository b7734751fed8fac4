"""What every test starts from: a fixed seed, and CUDA tests that skip with a reason."""

import pytest
import torch


def cuda_missing() -> str | None:
    """Why tests marked ``cuda`` cannot run here, or None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "no CUDA device"
    import perturbed

    if not perturbed._C.build_info()["cuda"]:
        return "perturbed was built without its CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = cuda_missing() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {reason}"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """The global seed of inputs and initial weights. The package itself never reads it."""
    torch.manual_seed(0)
    return 0
