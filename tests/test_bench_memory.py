"""Suite ``memory`` on networks small enough for a test."""

import pytest
import torch
from torch import nn

from bench import memory, report
from bench.common import Options
from bench.files import Run
from perturbed import PerturbedModel

CASE = "small"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))  # noqa: E731
    monkeypatch.setattr(memory, "CASES", {CASE: (make, (3, 4), 32)})


def test_every_way_is_timed_and_checked():
    results, notes = memory.run(Options(seconds=0.0), memory=False)
    names = ["Base", "chunk = D / 4", "chunk = D / 16", "max_memory = peak / 8"]
    assert [r.method for r in results] == names
    assert [r.case for r in results] == ["small, D = 32"] * 4
    assert notes == []
    assert memory.run(Options(views=("forward",)))[0] == []


def test_peaks_stand_in_the_table(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "peak_bytes", lambda *a: asked.append(a[1]) or 8 << 20)
    results, notes = memory.run(Options(seconds=0.0))
    assert asked == [{}, {"chunk": 8}, {"chunk": 2}, {"max_memory": 1 << 20}]
    assert "8.39 MB" in report.markdown(Run(results, {}, notes=notes))
    assert notes == ["memory: max_memory is 1.05 MB for small."]


def test_wrong_losses_are_not_timed(monkeypatch):
    forward = PerturbedModel.forward

    def wrong(self, x):
        return forward(self, x) + (self.directions < self.population)

    monkeypatch.setattr(PerturbedModel, "forward", wrong)
    results, _ = memory.run(Options(seconds=0.0), memory=False)
    reasons = {r.method: r.reason for r in results}
    assert not reasons["Base"]
    assert "AssertionError: chunk = D / 4: relative error" in reasons["chunk = D / 4"]


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    case = next(iter(memory.CASES))
    device = torch.device("cpu")
    whole = memory.peak_bytes(case, {}, device)
    part = memory.peak_bytes(case, {"max_memory": whole // 8}, device)
    assert whole > 60 << 20
    assert part < whole // 4
