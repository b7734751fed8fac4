"""The example of random_grad_mnist.py: the network, the methods, what it reports."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def example():
    for package in ("matplotlib", "mlxtend", "pandas", "tabulate", "tqdm"):
        pytest.importorskip(package, reason=f"the example needs {package} (the extra `examples`)")
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("rgm", EXAMPLES / "random_grad_mnist.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_network_is_torchzeros(example):
    net = example.make_network(0)
    assert sum(p.numel() for p in net.parameters()) == 15_738
    scores = net(torch.rand(2, 1, 28, 28))
    torch.testing.assert_close(scores.sum(1), torch.ones(2))  # the first of two softmaxes
    x = torch.randn(3, 4, 25, 10)
    assert torch.equal(example.Halve()(x), torch.nn.MaxPool2d(2)(x))
    sure = torch.eye(10)[:1]
    loss = torch.nn.functional.cross_entropy(sure, torch.tensor([0]))
    assert loss.item() == pytest.approx(1.4612, abs=1e-4)  # it cannot fall below


def test_every_method_has_as_many_losses(example, monkeypatch):
    calls = 0
    plain = example.F.cross_entropy

    def counted(scores, labels, **options):
        nonlocal calls
        calls += len(scores) // example.BATCH
        return plain(scores, labels, **options)

    monkeypatch.setattr(example.F, "cross_entropy", counted)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 28, 28, generator=generator)
    labels = torch.arange(64) % 10
    for name in example.METHODS:
        calls = 0
        run = example.train(name, 0, 64, (images, labels, images, labels))
        cost = example.METHODS[name][1]
        assert calls == run["curve"][-1][0] == 64 // cost * cost, name
        assert 0 <= run["last"] <= run["best"] <= 1


def test_the_report(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "POINTS", 2)
    arguments = ["--evaluations", "132", "--seeds", "2", "--out", str(tmp_path)]
    runs = example.main([*arguments, "--methods", "RandomGrad", "AdamW"])
    out = capsys.readouterr().out
    assert "Held-out accuracy after 132 losses of 32 images" in out
    assert "| RandomGrad" in out
    assert [(run["name"], run["seed"]) for run in runs] == [
        ("RandomGrad", 0),
        ("RandomGrad", 1),
        ("AdamW", 0),
        ("AdamW", 1),
    ]
    adamw = [run["last"] for run in runs[2:]]
    assert f"{sum(adamw) / 2:.1%}" in out
    assert min(adamw) > 0.3  # 132 gradients are enough for that
    assert (tmp_path / "random_grad_mnist.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0"])


def test_means_in_float64_tell_smaller_moves(example):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 28, 28, generator=generator)
    _, _, *rows = example.signs(images, torch.arange(64) % 10, moves=10).splitlines()
    shares = [[int(cell.strip(" %")) for cell in row.strip("|").split("|")[1:]] for row in rows]
    assert len(shares) == 3
    narrow, _, wide = shares[0]  # of the smallest moves
    assert wide >= 80
    assert narrow <= wide


@pytest.mark.slow
def test_it_learns(example, tmp_path):
    arguments = ["--evaluations", "12000", "--methods", "RandomGrad", "--out", str(tmp_path)]
    (run,) = example.main(arguments)
    assert run["best"] > 0.25  # chance is 0.1
