"""docs/examples/es_finetune_lm.py samples members rightly, learns both ways, resumes, reports."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
# Tiny: 8 members that write 6 lines each.
TINY = ["--directions", "4", "--lines", "6", "--hidden", "12", "--pretraining", "3"]
TINY = [*TINY, "--seconds", "100"]


@pytest.fixture(scope="module")
def example():
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason=f"the demo needs {package} (the extra `examples`)")
    # It imports the example beside it by name, as programs started from a folder can.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import es_finetune_lm

        patch.setattr(es_finetune_lm, "SAMPLES", 100)
        yield es_finetune_lm
        for name in ("es_finetune_lm", "nes_mnist"):
            del sys.modules[name]


def make_run(example, **options):
    settings = {**example.RUN, "hidden": 24, "directions": 3, "lines": 7, **options}
    return example.LanguageRun(settings, torch.device("cpu"))


def parameters(net):
    return torch.nn.utils.parameters_to_vector(net.parameters())


def test_lines_are_distinct_and_split(example):
    train, held_out = (example.decode(part) for part in example.load_lines())
    assert len(held_out) == 2000
    assert len(train) > 10_000
    assert len({*train, *held_out}) == len(train) + 2000
    assert all(12 <= len(line) <= 39 and line.strip() == line for line in train)
    assert not any(line.startswith("#") for line in train)
    # About half of the lines of a program are statements of their own.
    assert 0.4 < sum(map(example.is_python, held_out)) / 2000 < 0.65


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = f(y) + 123", True),
        ("for x in some_list:", False),
        ("x = 'unfinished", False),
        ("x = 1", False),  # too short
        ("# comments are no statements", False),
        ("x = " + "1" * 36, False),  # too long: of a line that has not ended
        ("x = f(y)\0 + 123", False),
        ("x = '\\d is no escape sequence'", True),
        ("~" * 39, False),
        ("(" * 39, False),
    ],
    ids=str,
)
def test_the_reward_is_the_parser_s_word(example, line, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert example.is_python(line) is expected


@pytest.mark.parametrize("noise", ["low_rank", "normal", "stored", "rademacher", "sign_flip"])
def test_every_member_writes_its_own_lines(example, noise):
    """Lines of the population are those of each member alone, though ended rows leave the batch."""
    run = make_run(example, noise=noise, sigma=0.3)
    with torch.no_grad():
        run.net.head.bias[example.END] += 3  # lines of all lengths
    run.pm.double()
    run.pm.set_noise()
    uniforms = run.uniforms(1, 7).double()
    rows = []
    handle = run.net.head.register_forward_hook(lambda m, x, y: rows.append(len(y)))
    with run.pm.perturbed():
        written = example.sample(run.net, uniforms, 2, 3).view(2, 7, 3, -1)
    handle.remove()
    assert rows[0] == 42
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 42 or len(rows) < 20  # lines did end
    lines = set()
    for d in range(3):
        for half, sign in enumerate((1, -1)):
            alone = example.sample(run.pm.member(d, sign), uniforms)
            assert torch.equal(written[half, :, d], alone)
            lines.add(tuple(example.decode(alone)))
    assert len(lines) == 6  # six members, six texts


def test_sampling_follows_the_distribution(example):
    """A model that knows nothing but frequencies writes symbols at these frequencies."""
    net = make_run(example).start
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.fill_(-100.0)
        wanted = {0: 0.5, 17: 0.3, example.END: 0.2}
        for symbol, probability in wanted.items():
            net.head.bias[symbol] = torch.tensor(probability).log()
    generator = torch.Generator().manual_seed(0)
    first = example.sample(net, torch.rand(20_000, 40, generator=generator))[:, 0]
    share = first.bincount(minlength=example.SYMBOLS) / 20_000
    for symbol, probability in wanted.items():
        deviation = (probability * (1 - probability) / 20_000) ** 0.5
        assert abs(share[symbol] - probability) < 5 * deviation
    assert share[list(wanted)].sum() == 1


def test_pretraining_lowers_the_loss_and_is_determined_by_the_options(example):
    run = make_run(example, pretraining=40)
    before = run.held_out_loss(run.start)
    assert 4.3 < before < 4.8  # ln 96 = 4.56 is a uniform guess
    run.pretrain()
    assert run.held_out_loss(run.start) < 4.0  # worst of four seeds: 3.80
    assert torch.equal(parameters(run.start), parameters(run.net))
    again = make_run(example, pretraining=40)
    again.pretrain()
    assert torch.equal(parameters(run.start), parameters(again.start))


def test_evolution_raises_a_reward(example, monkeypatch):
    """At this size hardly a line is Python: the reward is an open bracket in a long enough line."""
    monkeypatch.setattr(example, "is_python", lambda line: len(line) >= 12 and "(" in line)
    run = make_run(example, pretraining=40, directions=16, lines=16, lr=2e-3, sigma=0.05)
    run.pretrain()
    before = run.report(run.net)["parse rate"]
    for _ in range(40):
        run.step()
    after = run.report(run.net)["parse rate"]
    assert after > before + 0.3  # worst of four seeds: 0.39 -> 0.92
    assert run.nes.stats["evaluations"] == 40 * 32


@pytest.mark.slow
def test_evolution_teaches_python(example):
    """The real thing, shorter: a third of the pretraining, 25 generations of the default size."""
    run = example.LanguageRun({**example.RUN, "pretraining": 200}, torch.device("cpu"))
    run.pretrain()
    before = run.report(run.net)
    for _ in range(25):
        run.step()
    after = run.report(run.net)
    assert after["parse rate"] > before["parse rate"] + 0.05  # seed 0: 0.10 -> 0.21
    assert after["distinct"] > 0.9


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(example, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny = [*TINY, "--no-baseline", "--seed", "7", "--lr", "0.01"]
    (straight,) = example.main([*tiny, "--generations", "12", "--out", whole])
    example.main([*tiny, "--generations", "5", "--out", parts])
    file = f"{parts}/es_finetune_lm_7.pt"
    rest = ["--generations", "12", "--seconds", "100", "--no-baseline", "--out", parts]
    (resumed,) = example.main(["--resume", file, *rest])
    assert resumed.options == straight.options
    assert resumed.nes.steps == 12
    assert not torch.equal(parameters(resumed.net), parameters(resumed.start))
    assert torch.equal(parameters(straight.net), parameters(resumed.net))
    assert torch.equal(parameters(straight.start), parameters(resumed.start))
    assert straight.nes.stats == resumed.nes.stats
    with pytest.raises(SystemExit, match=r"other options than \{'lines': 5\}"):
        example.main(["--resume", file, "--lines", "5", *rest])


def test_the_report_compares_models_over_seeds(example, tmp_path, capsys):
    arguments = [*TINY, "--generations", "2", "--seeds", "2", "--seed", "3"]
    runs = example.main([*arguments, "--out", str(tmp_path)])
    assert [run.options["seed"] for run in runs] == [3, 4]
    out = capsys.readouterr().out
    samples = out.split("es_finetune_lm_3.pt\n")[1].splitlines()[:11]
    assert samples[0].split() == ["pretrained", "evolved"]
    assert len([line for line in samples if line]) == 11
    table = out.split("parse rate    distinct        loss\n")[1].splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in table[:9]]
    names = ["pretrained", "evolved", "more Adam instead"]
    assert [row[:2] for row in rows] == [[n, s] for n in names for s in ("3", "4", "mean")]
    losses = {(name, seed): float(row[-1]) for name, seed, *row in rows}
    for run, seed in zip(runs, ("3", "4"), strict=True):
        assert losses["evolved", seed] == round(run.held_out_loss(run.net), 3)
        # The clock decides how many steps of Adam there are: at least one.
        assert losses["more Adam instead", seed] < losses["pretrained", seed]
    assert (tmp_path / "es_finetune_lm.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--directions", "0"], "must be greater than 0, got 0"),
        (["--sigma", "-1"], "must be greater than 0, got -1"),
        (["--hidden", "2"], "--hidden must be at least 3, got 2"),
        (["--noise", "uniform"], "invalid choice: 'uniform'"),
        (["--seeds", "2", "--resume", "x"], "--seeds: a checkpoint is of one run"),
    ],
    ids=str,
)
def test_bad_options_are_named(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
