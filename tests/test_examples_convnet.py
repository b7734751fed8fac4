"""docs/examples/nes_convnet.py runs, learns from counts of errors alone, and resumes."""

import sys
from pathlib import Path

import pytest
import torch

import perturbed

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Tiny: 8 members on 64 images.
TINY = ["--directions", "4", "--batch", "64", "--seconds", "60", "--no-costs"]


@pytest.fixture(scope="module")
def example():
    for package in ("mlxtend", "pandas", "matplotlib", "tqdm"):
        pytest.importorskip(package, reason=f"the demo needs {package} (the extra `examples`)")
    # It imports the example beside it by name, as programs started from a folder can.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import nes_convnet
        import nes_mnist

        digits = nes_mnist.load_digits()
        patch.setattr(nes_mnist, "load_digits", lambda: digits)  # parsed once for all tests
        yield nes_convnet
        for name in ("nes_convnet", "nes_mnist"):
            del sys.modules[name]


def parameters(run):
    return torch.nn.utils.parameters_to_vector(run.net.parameters())


def test_the_network_has_no_gradient_before_its_last_layer(example):
    net = example.make_network(0)
    assert sum(p.numel() for p in net.parameters()) == 2754
    scores = net(torch.rand(5, 784))
    assert scores.shape == (5, 10)
    scores.square().sum().backward()
    *early, weight, _bias = (p.grad for p in net.parameters())
    assert len(early) == 4
    assert all((grad == 0).all() for grad in early)
    assert (weight != 0).any()


@pytest.mark.parametrize("noise", ["normal", "rademacher", "low_rank", "sign_flip"])
def test_all_layers_are_perturbed_and_rows_are_members(example, noise):
    """Signs of sums near zero may differ between two ways to add, so in float64."""
    settings = {**example.ConvRun.defaults, "noise": noise, "directions": 3, "batch": 7}
    run = example.ConvRun(settings, torch.device("cpu"), example.nes_mnist.load_digits())
    run.pm.double()
    report = perturbed.conversion_report(run.net)
    assert not report.unperturbed
    images = run.minibatch(0)[0].double()
    run.pm.set_noise()
    with torch.no_grad():
        scores = run.pm(run.pm.replicate(images)).view(2, 7, 3, 10)
        for d in range(3):
            for half, sign in enumerate((1, -1)):
                want = run.pm.member(d, sign)(images)
                torch.testing.assert_close(scores[half, :, d], want, rtol=1e-9, atol=1e-9)


def test_it_learns_from_errors_alone(example, tmp_path, capsys):
    arguments = ["--directions", "16", "--batch", "128", "--generations", "100", "--no-costs"]
    run = example.main([*arguments, "--out", str(tmp_path)])
    assert run.options["loss"] == "errors"
    assert run.accuracy() > 0.25  # chance is 0.1; worst of four seeds: 0.36
    out = capsys.readouterr().out
    assert "100 generations, 3,200 evaluations of members on 128 images" in out
    assert (tmp_path / "nes_convnet.png").stat().st_size > 10_000


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(example, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    straight = example.main([*TINY, "--generations", "12", "--out", whole])
    example.main([*TINY, "--generations", "5", "--out", parts])
    file = f"{parts}/nes_convnet.pt"
    rest = ["--generations", "12", "--no-costs", "--out", parts]
    resumed = example.main(["--resume", file, *rest])
    assert resumed.nes.steps == 12
    assert torch.equal(parameters(straight), parameters(resumed))
    with pytest.raises(SystemExit, match="is of nes_convnet, not nes_mnist"):
        example.nes_mnist.main(["--resume", file, *rest])


def test_costs_are_of_the_same_rows(example, tmp_path, capsys):
    arguments = ["--directions", "2", "--batch", "8", "--generations", "1"]
    example.main([*arguments, "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith("one forward, 32 rows")
    names = ["perturbed (this run)", "one network, without noise", "loop over the members"]
    assert [line[:30].strip() for line in lines[1:]] == names
    assert all(float(line.split()[-2]) > 0 for line in lines[1:])


def test_bad_options_are_named(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--noise", "uniform"])
    assert "invalid choice: 'uniform'" in capsys.readouterr().err
