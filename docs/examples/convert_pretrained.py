"""Train a language model of the transformers library without a gradient, one step at a time.

The model is used as it is: ``perturbed.convert`` swaps its layers in place, one forward then
evaluates a population of perturbed models, and its parameters stay the objects that
``save_pretrained`` writes. The report says what has noise; the end says what the step needed in
memory, and what copies of the model or stored noise would have needed.

By default the model is a small GPT-2 with random weights that reads bytes, so that nothing is
downloaded; ``--model`` takes any causal language model that is saved in a folder.

    python docs/examples/convert_pretrained.py
    python docs/examples/convert_pretrained.py --model path/to/gpt2 --sigma 0.001 --lr 0.0001
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perturbed

FAMILIES: dict[str, Callable[[], perturbed.noise.NoiseFamily]] = {
    "low-rank": lambda: perturbed.LowRank(1),
    "normal": perturbed.Dense,
    "rademacher": lambda: perturbed.Dense("rademacher"),
}
BYTES = 256  # the vocabulary of the model with random weights


@dataclass
class Step:
    """What one step did.

    Attributes:
        losses: (S, D) losses of the members, nats per token.
        before, after: loss of the unperturbed model on the same text.
        seconds: of the step.
        peak: bytes of memory that the step needed on top of what was in use before all of it.
        plain_peak: the same of one unperturbed forward of as many rows.
    """

    losses: Tensor
    before: float
    after: float
    seconds: float
    peak: int
    plain_peak: int


# ---- model and text ----------------------------------------------------------------------------


def load(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return the model and the tokens of the text, (length,)."""
    try:
        import transformers
    except ImportError:
        sys.exit('this example needs transformers: pip install "perturbed[examples]"')
    data = options.text.read_bytes()
    if options.model is None:
        torch.manual_seed(options.seed)
        config = transformers.GPT2Config(
            vocab_size=BYTES, n_embd=options.width, n_layer=2, n_head=2, n_positions=512,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        model, ids = transformers.GPT2LMHeadModel(config), list(data)
    else:
        local = {"local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **local)
        ids = tokenizer(data.decode())["input_ids"]
    return model.to(options.device).eval(), torch.tensor(ids, device=options.device)


def batch(ids: Tensor, rows: int, tokens: int, step: int) -> Tensor:
    """Return the pieces of text of one step, (rows, tokens), from all over the text."""
    last = len(ids) - tokens
    starts = [(step * rows + i) * tokens % (last + 1) for i in range(rows)]
    return torch.stack([ids[start : start + tokens] for start in starts])


def loss_per_row(logits: Tensor, ids: Tensor) -> Tensor:
    """Return nats per token of every row: logits (B, T, V) predict the next of ids (B, T)."""
    scores, targets = logits[:, :-1], ids[:, 1:]
    return F.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(1)


# ---- one step and its memory -------------------------------------------------------------------


def memory(device: torch.device, forget: bool = False) -> int:
    """Return the peak of memory in use, in bytes; ``forget`` starts a new peak at what is in use.

    On CUDA that is torch's memory, else that of the process. Where the system cannot start a new
    peak (it is Linux that can), the peak is that of the whole process so far.
    """
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if forget:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def run_step(nes: perturbed.NES, ids: Tensor) -> Step:
    """Evaluate the population on ``ids``, (rows, tokens), and update the model."""
    pm = nes.pm
    rows = pm.replicate(ids)  # every member reads the same text
    targets = rows.full()

    def plain() -> float:
        return loss_per_row(pm.model(input_ids=ids).logits, ids).mean().item()

    before = plain()
    held = memory(ids.device, forget=True)
    loss_per_row(pm.model(input_ids=targets).logits, targets)
    plain_peak = memory(ids.device) - held
    memory(ids.device, forget=True)

    members: list[Tensor] = []

    def closure() -> Tensor:
        values = loss_per_row(pm(input_ids=rows).logits, targets)
        members.append(pm.member_mean(values))
        return values

    start = time.perf_counter()
    nes.step(closure)
    seconds = time.perf_counter() - start
    peak = memory(ids.device) - held
    return Step(members[0], before, plain(), seconds, peak, plain_peak)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def describe_memory(pm: perturbed.PerturbedModel, step: Step) -> str:
    """Compare what the step needed with what other ways to evaluate the population need."""
    parameters = [p for p in pm.model.parameters() if p.requires_grad]
    model = sum(p.numel() * p.element_size() for p in parameters)
    members, base = step.losses.numel(), step.plain_peak
    lines = {
        "the model": model,
        "plain forward of as many rows (measured)": base,
        f"this step: {members} members, gradients, Adam (measured)": step.peak,
        f"  with stored noise of {pm.directions} directions, at least": base
        + pm.directions * model,
        f"  with {members} copies of the model, at least": base + members * model,
    }
    return "\n".join(f"{name:<56}{megabytes(count):>12}" for name, count in lines.items())


# ---- command line ------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a saved model (a random GPT-2)")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="(this program)")
    parser.add_argument("--noise", choices=tuple(FAMILIES), default="low-rank", help="(low-rank)")
    parser.add_argument("--directions", type=int, default=32, help="half the population (32)")
    parser.add_argument("--rows", type=int, default=2, help="texts that all members read (2)")
    parser.add_argument("--tokens", type=int, default=64, help="in each of them (64)")
    parser.add_argument("--steps", type=int, default=1, help="(1)")
    parser.add_argument("--sigma", type=float, default=0.01, help="noise scale (0.01)")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate of Adam (0.003)")
    parser.add_argument("--width", type=int, default=128, help="of the random GPT-2 (128)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise (0)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(cpu)")
    options = parser.parse_args(argv)
    for name in ("directions", "rows", "steps", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {options.tokens}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model must be the folder of a saved model, got {options.model}")
    if not options.text.is_file():
        parser.error(f"--text must be a file, got {options.text}")
    return options


def main(argv: Sequence[str] | None = None) -> list[Step]:
    """Convert, step, report; return the steps."""
    options = parse(argv)
    model, ids = load(options)
    if len(ids) < options.tokens:
        sys.exit(f"--text: it has {len(ids)} tokens, --tokens asks for {options.tokens}")
    perturbed.convert(model, options.directions, FAMILIES[options.noise]())
    pm = perturbed.PerturbedModel(model, options.directions, True, options.sigma, options.seed)
    print(pm.summary(input_ids=ids[None, : options.tokens]), end="\n\n")
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    nes = perturbed.NES(pm, optimizer, shaping="zscore")
    steps = []
    for number in range(options.steps):
        step = run_step(nes, batch(ids, options.rows, options.tokens, number))
        spread = f"{step.losses.min():.4f} to {step.losses.max():.4f}"
        print(
            f"step {number + 1}: {step.losses.numel()} members with losses from {spread} in "
            f"{step.seconds:.2f} s; model {step.before:.4f} -> {step.after:.4f} nats per token"
        )
        steps.append(step)
    print(f"\nmemory\n{describe_memory(pm, steps[0])}")
    perturbed.revert(model)  # a plain model again, with the trained parameters
    return steps


if __name__ == "__main__":
    main()
