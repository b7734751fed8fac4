"""docs/examples/optimizer_swarm.py runs; what it compares costs the same number of evaluations."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def example():
    for package in ("mlxtend", "pandas", "matplotlib", "tqdm"):
        pytest.importorskip(package, reason=f"the example needs {package} (the extra `examples`)")
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(
        "optimizer_swarm", EXAMPLES / "optimizer_swarm.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLES))
    digits = module.load_digits()
    module.load_digits = lambda: digits  # parsed once for all tests
    return module


def test_the_net_is_torchzero_s(example):
    net = example.make_network(0)
    assert sum(p.numel() for p in net.parameters()) == 15_738
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("name", ["swarm", "single", "nes"])
def test_a_step_has_twenty_losses_of_each_image(example, name, monkeypatch):
    rows = []
    cross_entropy = torch.nn.functional.cross_entropy

    def counted(scores, labels, **options):
        rows.append(len(scores))
        return cross_entropy(scores, labels, **options)

    monkeypatch.setattr(example.F, "cross_entropy", counted)
    net, step = example.CONTESTANTS[name](example.load_digits(), 1e-3, 0)
    before = [p.detach().clone() for p in net.parameters()]
    for number in range(3):
        step(number)
    assert sum(rows) == 3 * 20 * example.BATCH
    assert not all(map(torch.equal, before, net.parameters()))


def test_it_prints_a_table_and_a_plot(example, tmp_path, capsys):
    last = example.main(["--steps", "3", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert set(last) == {"swarm", "single", "nes"}
    assert "60 losses of a minibatch of 32 each" in text
    assert (tmp_path / "optimizer_swarm.png").stat().st_size > 5000


def test_both_ways_do_the_same_and_are_timed(example, capsys):
    """In both layouts of memory, with the same losses."""
    losses = []
    for together in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(1)
            losses.append(float(example.swarm_step(3, together, layout)()))
    assert max(losses) - min(losses) < 1e-5
    example.compare([1], repeats=1)
    printed = capsys.readouterr().out.splitlines()
    assert [line.count("ms") for line in printed] == [0, 1, 1, 1, 1]
