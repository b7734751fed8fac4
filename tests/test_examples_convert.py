"""docs/examples/convert_pretrained.py, with a model of a few thousand parameters."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers (requirements.txt)")

FILE = Path(__file__).parent.parent / "docs" / "examples" / "convert_pretrained.py"
TINY = ["--width", "8", "--tokens", "8", "--directions", "4", "--rows", "1"]

pytestmark = pytest.mark.filterwarnings("ignore:convert left")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("convert_pretrained", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_pretrained"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["convert_pretrained"]


@pytest.mark.parametrize("noise", ["low-rank", "normal", "rademacher"])
def test_a_step_updates_the_model_and_memory_is_printed(example, capsys, noise):
    steps = example.main([*TINY, "--noise", noise, "--steps", "2"])
    assert len(steps) == 2
    for step in steps:
        assert step.losses.shape == (2, 4)
        assert step.losses.isfinite().all()
        assert step.losses.std() > 0
        assert step.before != step.after
        assert 0 <= step.peak < 10**9
    out = capsys.readouterr().out
    assert "step 2: 8 members with losses from" in out
    assert "this step: 8 members, gradients, Adam (measured)" in out
    assert "transformer.h.1.ln_2" in out


def test_steps_go_down_on_a_text_that_repeats(example, tmp_path):
    text = tmp_path / "text"
    text.write_text("ab" * 100)
    arguments = ["--text", str(text), "--sigma", "0.05", "--lr", "0.02", "--noise", "normal"]
    steps = example.main([*TINY, *arguments, "--directions", "32", "--steps", "20"])
    # From 5.54 nats per token of a uniform guess.
    assert steps[-1].after < steps[0].before - 0.3


def test_a_saved_model_is_loaded_from_its_folder(example, tmp_path, capsys):
    """Its tokenizer too: one of whole words here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: i for i, word in enumerate(["?", "to", "be", "or", "not"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "text").write_text("to be or not to be " * 4)
    steps = example.main([*TINY, "--model", str(tmp_path), "--text", str(tmp_path / "text")])
    assert steps[0].losses.shape == (2, 4)
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out


def test_losses_are_torch_s(example):
    logits, ids = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    for row, value in enumerate(example.loss_per_row(logits, ids)):
        want = torch.nn.functional.cross_entropy(logits[row, :-1], ids[row, 1:])
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--directions", "0"], "--directions must be at least 1, got 0"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--model", "no/folder"], "--model must be the folder of a saved model, got no/folder"),
        (["--text", "no.txt"], "--text must be a file, got no.txt"),
        (["--noise", "uniform"], "invalid choice: 'uniform'"),
    ],
    ids=str,
)
def test_bad_options_are_named(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(example, tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(SystemExit, match="it has 5 tokens, --tokens asks for 8"):
        example.main([*TINY, "--text", str(tmp_path / "text")])
