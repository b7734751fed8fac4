"""Suite ``pso`` on swarms small enough for a test."""

import pytest
import torch
from torch import nn

from bench import pso
from bench.common import Options

CPU = torch.device("cpu")
SMALL = pso.Case("small", 6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    def net():
        return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))

    monkeypatch.setitem(pso.NETWORKS, "small", (net, 4))


def test_every_row_of_both_views_is_timed():
    results, notes = pso.run(Options(seconds=0.0), [SMALL], memory=False)
    found = [(r.view, r.method) for r in results if r.method != "EvoX PSO"]
    assert found == [
        *(("step", name) for name in ("Base", "PSO", "Naive", "Loop")),
        *(("update", name) for name in ("PSO", "Naive", "Loop", "operator")),
    ]
    assert all(r.over_naive > 0 for r in results if r.timed)
    assert {r.method for r in results if not r.timed} <= {"EvoX PSO"}
    held = {r.method: r.noise_bytes for r in results if r.view == "update"}
    assert held["PSO"] == held["Naive"] == held["Loop"] == 3 * 6 * 242 * 4
    assert len(notes) <= 1


def test_the_views_can_be_chosen():
    results, _ = pso.run(Options(seconds=0.0, views=("update",)), [SMALL], memory=False)
    assert {r.view for r in results} == {"update"}


def test_forwards_agree():
    swarm = pso.Swarm(SMALL, CPU)
    ours, stacked, loop = (kind(swarm) for kind in (pso.Ours, pso.Stacked, pso.Loop))
    with torch.no_grad():
        want = stacked.forward()
        torch.testing.assert_close(ours.forward().view(4, 6, 2).transpose(0, 1), want)
        looped = torch.stack([net(swarm.x) for net in loop.nets])
    torch.testing.assert_close(looped, want)


@pytest.mark.parametrize("kind", [pso.Ours, pso.Stacked, pso.Loop])
def test_a_wrong_update_is_not_timed(kind, monkeypatch):
    swarm = pso.Swarm(SMALL, CPU)
    with torch.no_grad():
        pso.make_row("update", kind, swarm).check()
        right = kind.update

        def wrong(self, losses):
            right(self, -losses)

        monkeypatch.setattr(kind, "update", wrong)
        with pytest.raises(AssertionError, match="velocities are not between"):
            pso.make_row("update", kind, swarm).check()


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own():
    name = pso.Case("51 parameters", 20)
    nothing, ours = (pso.peak_bytes(name, row, CPU) for row in ("", "PSO"))
    assert ours > nothing > 100 << 20
