"""Train a convolutional network of hard signs on how many digits it gets right: ``make demo-conv``.

Nothing here has a derivative: torch.sign follows both convolutions, and what members are ranked by
is their error rate, which is flat almost everywhere. perturbed.convert makes an ordinary
nn.Sequential a population; natural evolution strategies do the rest. Each generation, one forward
convolves every member's own kernels with a minibatch that all of them see.

Data, options, checkpoints and the learning curve are those of nes_mnist.py, which is the place to
read about them. At the end the population's forward is timed beside the same network without noise,
and beside a loop over the members as plain torch modules.

    python docs/examples/nes_convnet.py --seconds 60
    python docs/examples/nes_convnet.py --noise low_rank --loss cross_entropy
    python docs/examples/nes_convnet.py --resume runs/nes_convnet.pt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import nes_mnist  # beside this file
import torch
from nes_mnist import CLASSES, Sign, time_generation
from torch import nn

import perturbed

SIDE = 28  # pixels
CHANNELS = 8, 16


def make_network(seed: int) -> nn.Sequential:
    """Return a network of 2,754 parameters: (B, 784) pixels -> (B, 10) scores."""
    torch.manual_seed(seed)
    first, second = CHANNELS
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, first, 4, stride=4),  # (B, 8, 7, 7)
        Sign(),
        nn.Conv2d(first, second, 3, stride=2),  # (B, 16, 3, 3)
        Sign(),
        nn.Flatten(),
        nn.Linear(second * 3 * 3, CLASSES),
    )


class ConvRun(nes_mnist.Run):
    """A training run of the convolutional network."""

    name = "nes_convnet"
    title = "conv 8, 16 (sign)"
    defaults: ClassVar[dict] = {
        **nes_mnist.RUN,
        "batch": 256,
        "loss": "errors",
        "sigma": 0.1,
        "lr": 0.02,
    }
    noises: ClassVar[dict[str, perturbed.noise.NoiseFamily]] = {
        **nes_mnist.Run.noises,
        "low_rank": perturbed.LowRank(1),
        "sign_flip": perturbed.SignFlip(bases=8),
    }
    make_network = staticmethod(make_network)

    @torch.no_grad()
    def costs(self) -> str:
        """Time one forward of all members on a minibatch, and two that give as many scores."""
        images, _ = self.minibatch(0)
        rows, d = self.pm.replicate(images), self.options["directions"]
        pixels = rows.full()
        self.pm.set_noise()
        # Copies made beforehand: only their forwards are timed.
        members = [self.pm.member(k, sign) for sign in (1, -1) for k in range(d)]
        ways = {
            "perturbed (this run)": lambda: self.pm(rows),
            "one network, without noise": lambda: self.net(pixels),
            "loop over the members": lambda: [member(images) for member in members],
        }
        lines = [f"{'one forward, ' + format(len(pixels), ',') + ' rows':30}{'time':>10}"]
        for name, call in ways.items():
            lines.append(f"{name:30}{time_generation(call, self.device) * 1e3:>7.1f} ms")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> nes_mnist.Run:
    """Train, report and return the run."""
    return nes_mnist.main(argv, ConvRun)


if __name__ == "__main__":
    main()
