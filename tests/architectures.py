"""Real architectures, small and with random weights; all but one are built by ``transformers``.

Nobody here wrote their code: they are what conversion has to cope with.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

TOKENS, WORDS = 5, 23
_TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A model and its input.

    Attributes:
        make: () -> the model, in float32.
        inputs: number of rows -> keyword arguments.
        bare: parameters that no layer owns, which stay without noise.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    bare: frozenset[str] = frozenset()

    def build(self) -> nn.Module:
        """Make the model, in float64, for evaluation, with no two parameters alike."""
        torch.manual_seed(0)
        model = self.make().double().eval()
        with torch.no_grad():  # norms start at 1 and biases at 0, which would hide mistakes
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model


def _transformers(module: str, config: str, model: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pytest.importorskip("transformers", reason="needs transformers (requirements.txt)")
        package = importlib.import_module(f"transformers.models.{module}")
        # Repeated keywords would only differ in dropout, which evaluation switches off.
        return getattr(package, model)(getattr(package, config)(**options))

    return make


def _images(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"pixel_values": torch.randn(rows, 3, size, size, dtype=torch.float64)}


def _text(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(WORDS, (rows, TOKENS))}


class LSTMLanguageModel(nn.Module):
    """Two LSTM layers between an embedding and an output that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, WORDS)
        self.head.weight = self.embed.weight  # Press and Wolf (2017)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(input_ids))[0])


ARCHITECTURES = {
    # The four stages of two basic blocks that ResNet-18 has, with fewer channels.
    "resnet18": Architecture(
        _transformers(
            "resnet", "ResNetConfig", "ResNetForImageClassification", layer_type="basic",
            embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[2, 2, 2, 2], num_labels=3,
        ),
        _images(16),
    ),
    "mobilenet_v2": Architecture(
        _transformers(
            "mobilenet_v2", "MobileNetV2Config", "MobileNetV2ForImageClassification",
            image_size=16, depth_multiplier=0.05, min_depth=2, depth_divisible_by=2, num_labels=3,
        ),
        _images(16),
    ),
    "gpt2": Architecture(
        _transformers(
            "gpt2", "GPT2Config", "GPT2LMHeadModel", n_positions=8, n_embd=8, n_layer=2, n_head=2,
            **_TEXT,
        ),
        _text,
    ),
    "llama": Architecture(
        _transformers(
            "llama", "LlamaConfig", "LlamaForCausalLM", hidden_size=8, intermediate_size=12,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **_TEXT,
        ),
        _text,
    ),
    "bert": Architecture(
        _transformers(
            "bert", "BertConfig", "BertForMaskedLM", num_hidden_layers=1,
            max_position_embeddings=8, **_BERT, **_TEXT,
        ),
        _text,
    ),
    "vit": Architecture(
        _transformers(
            "vit", "ViTConfig", "ViTForImageClassification", image_size=8, patch_size=4,
            num_hidden_layers=2, num_labels=3, **_BERT,
        ),
        _images(8),
        frozenset({"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ),
    "lstm": Architecture(LSTMLanguageModel, _text),
}  # fmt: skip
