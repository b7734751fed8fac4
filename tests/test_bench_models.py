"""Suite ``models`` on networks small enough for a test."""

import pytest
import torch

from bench import models
from bench.common import Options
from perturbed import LowRank

SMALL = {
    "resnet": (lambda: models.resnet18(2), (3, 8, 8)),
    "transformer": (lambda: models.transformer(8), (3, 8)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(models, "MODELS", SMALL)
    monkeypatch.setattr(models, "MEMBERS", 4)
    monkeypatch.setattr(models, "FAMILIES", (LowRank(1),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_every_model_is_timed_in_every_way():
    results, notes = models.run(Options(seconds=0.0), memory=False)
    rows = ["Base", "LowRank(1)", "Loop over members", "vmap"]
    assert [r.method for r in results] == rows * 2
    assert all(r.median_s > 0 for r in results)
    assert notes == []


def test_wrong_noise_is_not_timed(monkeypatch):
    monkeypatch.setattr(LowRank, "add_linear", lambda self, y, x, site, shared: y + 0.1)
    with torch.no_grad(), pytest.raises(AssertionError, match="row 3"):
        models.Problem("transformer", torch.device("cpu")).perturbed(LowRank(1)).check()


def test_peak_memory_of_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    name = next(n for n in models.MODELS if n.startswith("transformer"))
    assert models.peak_bytes(name, "Base", torch.device("cpu")) > 100 << 20
