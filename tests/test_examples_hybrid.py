"""docs/examples/hybrid_swarm.py: batched training is that of single networks, and it learns."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def example():
    for package in ("mlxtend", "pandas", "matplotlib", "tabulate", "tqdm"):
        pytest.importorskip(package, reason=f"the demo needs {package} (the extra `examples`)")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import hybrid_swarm
        import nes_mnist

        digits = nes_mnist.load_digits()
        patch.setattr(nes_mnist, "load_digits", lambda: digits)  # parsed once for all tests
        yield hybrid_swarm
        for name in ("hybrid_swarm", "nes_mnist"):
            del sys.modules[name]


@pytest.fixture
def small(example, monkeypatch):
    """Sixteen images a batch, a move every second batch, 100 held out."""
    monkeypatch.setattr(example, "BATCH", 16)
    monkeypatch.setattr(example, "INTERVAL", 2)
    images, labels, *test = example.nes_mnist.load_digits()
    digits = images, labels, *(part[:100] for part in test)
    monkeypatch.setattr(example.nes_mnist, "load_digits", lambda: digits)
    return example, digits


def test_together_is_one_by_one(small):
    example, digits = small
    together, apart = example.Together(1), example.Apart(1)
    for number in range(6):
        batch = example.minibatch(digits, 1, number)
        losses = together.train(*batch)
        assert losses == pytest.approx(apart.train(*batch), rel=1e-4)
        if number % 2:
            subset = example.draw_subset(1, number)
            best = together.particle(example.best_of(subset, losses)).clone()
            before = [together.particle(i).clone() for i in range(12)]
            together.move(subset, losses)
            apart.move(subset, losses)
            for i in range(12):
                now = together.particle(i)
                if i in subset:
                    assert now.allclose((before[i] + best) * 0.5, rtol=1e-5, atol=1e-7)
                else:
                    assert now.equals(before[i])
    for i, net in enumerate(apart.nets):
        assert together.particle(i).allclose(list(net.parameters()), rtol=1e-4, atol=1e-5)
    images = digits[2][:30]
    torch.testing.assert_close(together.scores(images), apart.scores(images), rtol=1e-3, atol=1e-4)
    for at, parameter in enumerate(together.average().parameters()):
        mean = torch.stack([list(net.parameters())[at].detach() for net in apart.nets]).mean(0)
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-4, atol=1e-5)


def test_the_setting_is_nytorchs(example):
    assert sum(p.numel() for p in example.make_network(0).parameters()) == 22090
    for number in range(50):
        subset = example.draw_subset(0, number)
        assert len(set(subset)) == 6
        assert set(subset) <= set(range(12))
    assert len({tuple(example.draw_subset(0, n)) for n in range(50)}) > 40
    nan = float("nan")
    assert example.best_of([3, 1, 2], [0.0, nan, 0.5, 0.4]) == 3
    assert example.best_of([1, 2], [0.0, nan, float("inf")]) in (1, 2)
    state = torch.get_rng_state()
    example.make_network(3)
    assert torch.equal(state, torch.get_rng_state())


def test_every_batch_of_a_pass_is_another(example):
    digits = example.nes_mnist.load_digits()
    marked = torch.arange(len(digits[0])), digits[1]
    seen = torch.cat([example.minibatch(marked, 0, n)[0] for n in range(62)])
    assert len(seen.unique()) == 62 * 64
    assert not torch.equal(example.minibatch(marked, 0, 62)[0], seen[:64])


def test_the_report(small, tmp_path, capsys):
    example, _ = small
    results = example.main(["--batches", "4", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "swarm: min" in out
    assert "independent: max" in out
    assert "vote of the 12" in out
    assert "one by one" in out
    assert (tmp_path / "hybrid_swarm.png").stat().st_size > 5000
    swarm, independent = (results[name][0] for name in ("swarm", "independent"))
    assert swarm.accuracies[0] == independent.accuracies[0]  # before the first move
    assert swarm.accuracies[-1] != independent.accuracies[-1]
    for arguments in (["--seeds", "0"], ["--batches", "-1"]):
        with pytest.raises(SystemExit):
            example.main(arguments)


@pytest.mark.slow
def test_it_learns_and_particles_agree(example, tmp_path):
    results = example.main(["--no-costs", "--out", str(tmp_path)])
    (swarm,), (independent,) = results.values()
    first, last = swarm.accuracies[1], swarm.accuracies[-1]
    assert max(last) - min(last) < max(first) - min(first)
    assert min(last) > 0.8
    assert min(last) > min(independent.accuracies[-1]) - 0.05
