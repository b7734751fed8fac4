"""Teach a half cheetah to run, without a gradient: two ways.

Gymnasium's HalfCheetah-v5 for as long as ``--seconds`` says; returns still rise then, and no
threshold is claimed. Both ways normalise observations by running statistics that all members share.

    --policy linear   17 inputs, 6 outputs, no bias; ARS V2-t (Mania, Guy, Recht, 2018): 16
                      directions of which the best 8 count, step 0.02, noise 0.03
    --policy mlp      32 tanh units between, 774 weights; NES with Adam on centred ranks, and noise
                      of rank 1 (Sarkar et al., "Evolution Strategies at the Hyperscale", 2025)

    python docs/examples/ars_cheetah.py --seconds 120
    python docs/examples/ars_cheetah.py --seconds 120 --policy mlp
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import perturbed
from perturbed.rl import ObservationNorm

sys.path.insert(0, str(Path(__file__).parent))
import ars_swimmer

HIDDEN = 32


class Linear(ars_swimmer.Run):
    """ARS V2-t on a linear policy."""

    name = "ars_cheetah"
    task = "HalfCheetah-v5"
    target = None
    every = 5
    defaults: ClassVar[dict[str, Any]] = {
        "directions": 16,
        "top": 8,
        "sigma": 0.03,
        "lr": 0.02,
        "horizon": 1000,
    }

    def make_policy(self) -> nn.Module:
        self.norm = ObservationNorm(self.env.observation_size)
        return super().make_policy()


class Mlp(Linear):
    """NES with low-rank noise on a policy of two layers."""

    name = "nes_cheetah"
    defaults: ClassVar[dict[str, Any]] = {
        "directions": 32,
        "sigma": 0.05,
        "lr": 0.02,
        "horizon": 1000,
    }

    def make_policy(self) -> nn.Module:
        self.norm = ObservationNorm(self.env.observation_size)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = nn.Sequential(
                nn.Linear(self.env.observation_size, HIDDEN),
                nn.Tanh(),
                nn.Linear(HIDDEN, self.env.action_size),
            )
        nn.init.zeros_(net[2].weight)  # it starts by doing nothing, as the linear one
        nn.init.zeros_(net[2].bias)
        return perturbed.convert(net, self.options["directions"], perturbed.LowRank(1))

    def make_optimizer(self) -> perturbed.NES:
        adam = torch.optim.Adam(self.net.parameters(), self.options["lr"])
        return perturbed.NES(self.pm, adam, maximize=True, normalizer=self.norm)


KINDS = {"linear": Linear, "mlp": Mlp}


def main(argv: Sequence[str] | None = None) -> list[ars_swimmer.Run]:
    """Train, report and return the runs."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--policy", choices=tuple(KINDS), default="linear", help="(linear)")
    return ars_swimmer.main(argv, KINDS[which.parse_known_args(argv)[0].policy], which)


if __name__ == "__main__":
    main()
