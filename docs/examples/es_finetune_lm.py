"""Fine-tune a language model on what Python's parser says of its samples: ``make demo-lm``.

A GRU of 173,280 parameters learns the standard library's source by Adam, character by character:
half a minute that leaves it with plausible lines of which one in five is Python. Evolution
strategies then train all of its weights on a reward that has no gradient: does ``ast.parse`` accept
the sampled line. A line counts if it has 12 to 39 characters, as all lines of the data have, and is
not only a comment; otherwise the way to a perfect score would be to say nothing.

Every generation, each member of a population writes the same number of lines: one batch through the
perturbed model, a character a step. Line i of every member is drawn with the same uniform numbers,
so that members differ by their weights alone. Rows whose line has ended leave the batch.

The reward is all that counts here, and the report says what it costs: the loss of the language
model on lines held out from pretraining, the share of distinct samples, samples side by side before
and after, and what as many seconds of more Adam would have done instead. Options, checkpoints and
the loop around a generation are those of nes_mnist.py.

    python docs/examples/es_finetune_lm.py --seconds 60 --seeds 3
    python docs/examples/es_finetune_lm.py --resume runs/es_finetune_lm_0.pt
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import math
import random
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from nes_mnist import Run, make_parser, parse_arguments, positive, saved_options, train
from torch import Tensor, nn
from tqdm import tqdm

import perturbed

SHORTEST, LONGEST = 12, 39  # characters of a line
SYMBOLS = 96  # printable ASCII, and the end of a line, which is also what comes before its start
END = SYMBOLS - 1
HELD_OUT = 2000  # lines that no training sees
SAMPLES = 1000  # lines that a parse rate is measured on
BATCH, PEAK_LR = 64, 4e-3  # of Adam

# What determines a run. Tuned for a minute on two cores.
RUN = {
    "directions": 16,
    "lines": 64,
    "noise": "low_rank",
    "sigma": 0.02,
    "lr": 4e-4,
    "pretraining": 500,
    "hidden": 192,
    "seed": 0,
}


# ---- data and reward ---------------------------------------------------------------------------


@functools.cache
def load_lines() -> tuple[Tensor, Tensor]:
    """Return lines to train on and those held out, as symbols, (n, LONGEST + 1).

    They are the distinct lines of the standard library's modules, without indentation; those that
    are comments or hold other than ASCII are left out. Which lines there are depends on the version
    of Python; how they are split does not depend on the run.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    lines = {
        line.strip()
        for file in folder.glob("*.py")
        for line in file.read_text("utf8", errors="ignore").splitlines()
    }
    chosen = sorted(
        line
        for line in lines
        if SHORTEST <= len(line) <= LONGEST
        and line.isascii()
        and line.isprintable()
        and not line.startswith("#")
    )
    random.Random(0).shuffle(chosen)
    padded = (line.ljust(LONGEST + 1, chr(32 + END)) for line in chosen)
    symbols = torch.frombuffer(bytearray("".join(padded), "ascii"), dtype=torch.uint8) - 32
    symbols = symbols.view(len(chosen), LONGEST + 1).long()
    return symbols[HELD_OUT:], symbols[:HELD_OUT]


def decode(symbols: Tensor) -> list[str]:
    """Return the lines of symbols (n, LONGEST + 1), each up to its first END."""
    data = (symbols + 32).to(torch.uint8).cpu().numpy().tobytes().decode("ascii")
    width, end = symbols.shape[1], chr(32 + END)
    return [data[i : i + width].partition(end)[0] for i in range(0, len(data), width)]


@functools.lru_cache(maxsize=1 << 16)  # members often write the same line
def is_python(line: str) -> bool:
    """The reward: whether a line is as long as those of the data, and Python on its own.

    A sample that has not ended after LONGEST characters counts as too long.
    """
    if not SHORTEST <= len(line) <= LONGEST:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of an invalid escape sequence
            return bool(ast.parse(line).body)  # a comment has an empty one
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


# ---- the model ---------------------------------------------------------------------------------


class CharacterModel(nn.Module):
    """A language model of characters: (B, T) symbols -> (B, T, SYMBOLS) scores of the next."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, hidden // 3)
        self.gru = nn.GRU(hidden // 3, hidden, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, symbols: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = self.gru(self.embed(symbols), state)
        return self.head(output), state


def loss_of(net: nn.Module, lines: Tensor) -> Tensor:
    """Return the mean loss over the symbols of lines, their end included, in nats."""
    scores, _ = net(F.pad(lines[:, :-1], (1, 0), value=END))
    inside = F.pad(lines[:, :-1] != END, (1, 0), value=True)
    return F.cross_entropy(scores[inside], lines[inside])


@torch.no_grad()
def sample(net: nn.Module, uniforms: Tensor, signs: int = 1, directions: int = 1) -> Tensor:
    """Write n lines with every member; line i of all members by the same uniform numbers.

    A symbol is the inverse of its cumulative distribution at the uniform number of its line and
    place, so that members with nearly the same weights write nearly the same lines. Rows are in the
    order of docs/conventions.md, R = signs * n repeats of D directions, and remain so where lines
    that have ended are dropped: as many from every member, the rest of the ended ones idle along.

    Args:
        net: a CharacterModel; as a population inside ``pm.perturbed()``.
        uniforms: (n, LONGEST + 1) in [0, 1).
        signs: S, 2 for an antithetic population; 1 for a plain net, too.
        directions: D; 1 for a plain net.

    Returns:
        (S * n * D, LONGEST + 1) symbols; those behind an END are END.
    """
    device, shape = uniforms.device, (signs, len(uniforms), directions)
    rows = torch.arange(math.prod(shape), device=device).view(shape)  # those still in the batch
    written = torch.full((rows.numel(), uniforms.shape[1]), END, device=device)
    symbol, state = written[:, 0], None
    ended = torch.zeros(shape, dtype=torch.bool, device=device)
    for place in range(uniforms.shape[1]):
        scores, state = net(symbol[:, None], state)
        cumulative = scores[:, 0].softmax(-1).cumsum_(-1)
        number = uniforms[rows.flatten() // directions % len(uniforms), place, None]
        symbol = (cumulative < number * cumulative[:, -1:]).sum(-1)
        symbol = symbol.masked_fill_(ended.flatten(), END)
        written[rows.flatten(), place] = symbol
        ended = symbol.view(rows.shape) == END
        going = int((~ended).sum(1).max())  # lines that the slowest member has yet to finish
        if going == 0:
            break
        if going <= 0.9 * rows.shape[1]:  # dropping copies the state: not for a row or two
            kept = ended.byte().argsort(dim=1, stable=True)[:, :going]  # first those not ended
            here = torch.arange(rows.numel(), device=device).view(rows.shape).gather(1, kept)
            rows, ended = rows.gather(1, kept), ended.gather(1, kept)
            symbol, state = symbol[here.flatten()], state[:, here.flatten()]
    return written


# ---- training by Adam --------------------------------------------------------------------------


def adam(net: nn.Module, seed: int, lr: float, done: Iterable[float]) -> None:
    """Train on the language-model loss; ``done`` gives the fraction done before every step."""
    lines, _ = load_lines()
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for fraction in done:
        optimizer.param_groups[0]["lr"] = lr * (1 - fraction)
        chosen = torch.randint(len(lines), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss_of(net, lines[chosen].to(device)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def elapsed(seconds: float) -> Iterator[float]:
    """Yield the fraction of ``seconds`` that has passed, until all have."""
    start = time.perf_counter()
    while (fraction := (time.perf_counter() - start) / seconds) < 1:
        yield fraction


# ---- the run -----------------------------------------------------------------------------------


class LanguageRun(Run):
    """Pretraining, which its options determine, and evolution, which a checkpoint continues."""

    name = "es_finetune_lm"
    measure = "parse rate"
    kept: ClassVar[tuple[str, ...]] = ("net", "start", "nes")
    defaults: ClassVar[dict] = RUN
    noises: ClassVar[dict[str, perturbed.noise.NoiseFamily]] = {
        "low_rank": perturbed.LowRank(1),
        "normal": perturbed.Dense(),
        "stored": perturbed.Dense(storage="stored"),
        "rademacher": perturbed.Dense("rademacher"),
        "sign_flip": perturbed.SignFlip(bases=4, storage="stored"),
    }

    def __init__(self, options: dict, device: torch.device) -> None:
        self.options, self.device = options, device
        directions, seed = options["directions"], options["seed"]
        torch.manual_seed(seed)
        self.start = CharacterModel(options["hidden"]).to(device)  # what evolution starts from
        self.net = copy.deepcopy(self.start)
        perturbed.convert(self.net, directions, self.noises[options["noise"]])
        self.pm = perturbed.PerturbedModel(self.net, directions, True, options["sigma"], seed)
        optimizer = torch.optim.SGD(self.net.parameters(), options["lr"])
        self.nes = perturbed.NES(self.pm, optimizer, shaping="zscore", maximize=True)
        self.seconds = 0.0
        # generation, seconds, parse rate, loss on held-out lines
        self.curve: list[tuple[int, float, float, float]] = []

    def pretrain(self) -> None:
        steps = self.options["pretraining"]
        bar = tqdm(range(steps), desc="pretraining by Adam", leave=False)
        adam(self.start, self.options["seed"], PEAK_LR, (step / steps for step in bar))
        self.net.load_state_dict(self.start.state_dict())

    def uniforms(self, number: int, lines: int) -> Tensor:
        """Return the random numbers that lines are sampled with, (lines, LONGEST + 1)."""
        generator = torch.Generator().manual_seed(self.options["seed"] * 1_000_003 + number)
        return torch.rand(lines, LONGEST + 1, generator=generator).to(self.device)

    def step(self) -> None:
        """Run one generation."""
        uniforms = self.uniforms(self.nes.steps + 1, self.options["lines"])

        def rewards() -> Tensor:
            with self.pm.perturbed():  # pm(x) for a loop whose batch shrinks
                symbols = sample(self.net, uniforms, 2, self.options["directions"])
            return torch.tensor([is_python(line) for line in decode(symbols)])

        self.nes.step(rewards)

    def samples(self, net: nn.Module) -> list[str]:
        """Return the lines of an unperturbed net on random numbers that no training sees."""
        return decode(sample(net, self.uniforms(0, SAMPLES)))

    @torch.no_grad()
    def held_out_loss(self, net: nn.Module) -> float:
        return loss_of(net, load_lines()[1].to(self.device)).item()

    def record(self, seconds: float) -> None:
        rate = statistics_of(self.samples(self.net))["parse rate"]
        self.curve.append((self.nes.steps, seconds, rate, self.held_out_loss(self.net)))

    def report(self, net: nn.Module) -> dict[str, float]:
        """Return what the report says of a net."""
        return {**statistics_of(self.samples(net)), "loss": self.held_out_loss(net)}

    def more_adam(self) -> nn.Module:
        """Return the pretrained net after as many seconds of Adam as evolution had."""
        net = copy.deepcopy(self.start)
        adam(net, self.options["seed"] + 1, PEAK_LR / 2, elapsed(self.seconds))
        return net


def statistics_of(lines: Sequence[str]) -> dict[str, float]:
    """Return the share of lines that are Python, and the share of distinct ones."""
    return {
        "parse rate": sum(map(is_python, lines)) / len(lines),
        "distinct": len(set(lines)) / len(lines),
    }


def side_by_side(before: Sequence[str], after: Sequence[str]) -> str:
    """Return two columns of samples of the same random numbers; a + marks Python."""

    def marked(line: str) -> str:
        return ("+ " if is_python(line) else "  ") + line

    pairs = zip(map(marked, ("pretrained", *before)), map(marked, ("evolved", *after)), strict=True)
    return "\n".join(f"{left:<{LONGEST + 4}}{right}".rstrip() for left, right in pairs)


def results_table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return a line for every model and seed, and the means; results by model, then by seed."""
    names = ("parse rate", "distinct", "loss")
    lines = [f"{'':24}{'seed':>6}" + "".join(f"{name:>12}" for name in names)]
    for model, by_seed in results.items():
        means = {name: sum(r[name] for r in by_seed.values()) / len(by_seed) for name in names}
        rows = {**by_seed, "mean": means} if len(by_seed) > 1 else by_seed
        for seed, row in rows.items():
            numbers = f"{row['parse rate']:>12.3f}{row['distinct']:>12.3f}{row['loss']:>12.3f}"
            lines.append(f"{model:24}{seed:>6}{numbers}")
    return "\n".join(lines)


def plot(runs: Sequence[LanguageRun], file: Path) -> None:
    """Draw the parse rate and the loss of the language model over the seconds of evolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for run in runs:
        _, seconds, rates, losses = zip(*run.curve, strict=True)
        axes[0].plot(seconds, rates, linewidth=1, label=f"seed {run.options['seed']}")
        axes[1].plot(seconds, losses, linewidth=1)
    axes[0].set_ylabel("samples that are Python")
    axes[1].set_ylabel("loss on held-out lines, nats per character")
    for axis in axes:
        axis.set_xlabel("seconds of evolution")
        axis.grid(alpha=0.3)
    axes[0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---- command line ------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """Return what this call does, and those of the run's options that were given."""
    described: dict[str, dict] = {
        "directions": {"type": positive(int), "help": "half the population"},
        "lines": {"type": positive(int), "help": "that every member writes in a generation"},
        "noise": {"choices": tuple(LanguageRun.noises), "help": "family of the perturbations"},
        "sigma": {"type": positive(float), "help": "noise scale"},
        "lr": {"type": positive(float), "help": "learning rate of evolution"},
        "pretraining": {"type": positive(int), "help": "steps of Adam"},
        "hidden": {"type": positive(int), "help": "size of the recurrent state"},
        "seed": {"type": int, "help": "of weights, noise and samples"},
    }
    parser = make_parser("Teach a language model to write Python.", RUN, described)
    parser.add_argument("--seeds", type=positive(int), default=1, help="runs, from --seed on (1)")
    parser.add_argument(
        "--no-baseline", action="store_true", default=False, help="skip more Adam at the end"
    )
    options, given = parse_arguments(parser, argv, RUN)
    if options.resume is not None and options.seeds > 1:
        parser.error("--seeds: a checkpoint is of one run")
    if given.get("hidden", 3) < 3:
        parser.error(f"--hidden must be at least 3, got {given['hidden']}")
    return options, given


def main(argv: Sequence[str] | None = None) -> list[LanguageRun]:
    """Pretrain, evolve, report and return the runs."""
    options, given = parse(argv)
    first = saved_options(options, given, LanguageRun) or {**RUN, **given}
    print(", ".join(f"{name} {value}" for name, value in first.items()))
    results: dict[str, dict[int, dict[str, float]]] = {}
    runs = []
    for seed in range(first["seed"], first["seed"] + options.seeds):
        run = LanguageRun({**first, "seed": seed}, options.device)
        if options.resume is None:
            run.pretrain()
            run.record(0.0)
        else:
            run.load(options.resume)
            print(f"resumed at generation {run.nes.steps}, {run.seconds:.0f} s of evolution")
        file = options.out / f"{run.name}_{seed}.pt"
        train(run, options.seconds, options.generations, file)
        models: dict[str, nn.Module] = {"pretrained": run.start, "evolved": run.net}
        if not options.no_baseline:
            models["more Adam instead"] = run.more_adam()
        for model, net in models.items():
            results.setdefault(model, {})[seed] = run.report(net)
        print(f"\nseed {seed}: {run.nes.steps:,} generations in {run.seconds:.0f} s, {file}")
        print(side_by_side(run.samples(run.start)[:10], run.samples(run.net)[:10]))
        runs.append(run)
    print(f"\n{results_table(results)}")
    curve = options.out / f"{LanguageRun.name}.png"
    plot(runs, curve)
    print(f"curve: {curve}")
    return runs


if __name__ == "__main__":
    main()
