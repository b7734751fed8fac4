"""Swing up an acrobot with as many processes as there are: ``make demo-distributed``.

Augmented random search, version V2-t (Mania, Guy, Recht, 2018): a linear policy, observations
normalised by statistics that all members share, the best of the directions. Every process plays the
episodes of its directions and holds the whole model; what they exchange is the returns, and the
moments of what was observed. The run is the same to the last bit with any number of processes, and
goes on with any other number from its last checkpoint, also after a process was killed.

    python docs/examples/distributed_ars.py
    torchrun --nproc-per-node=2 --max-restarts=3 docs/examples/distributed_ars.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import perturbed
from perturbed import distributed
from perturbed.checkpoint import CheckpointError, Checkpoints
from perturbed.description import digest
from perturbed.rl import Acrobot, ObservationNorm, evaluate, rollout

EPISODES = 2  # of each member in a generation
CHECK = 100  # episodes that decide when to stop
TARGET = -95.0  # mean return, minus the steps it takes; gymnasium calls -100 solved
# Directions of a forward. Forwards of one size, whatever the number of processes, have one result;
# torch adds up larger products in another order.
CHUNK = 4


def train(directions: int, steps: int, seed: int, folder: Path) -> nn.Module:
    """Train until the target or for ``steps`` generations, going on from the last checkpoint."""
    distributed.init()  # joins the processes that torchrun started, if it did
    torch.set_num_threads(1)  # the policy is too small to share
    norm = ObservationNorm(6)
    policy = perturbed.PerturbedLinear(6, 3, directions, bias=False)
    nn.init.zeros_(policy.weight)
    pm = perturbed.PerturbedModel(policy, directions, antithetic=True, sigma=0.1, seed=seed)
    ars = perturbed.ARS(
        pm, top=directions // 2, lr=0.05, maximize=True, normalizer=norm, chunk=CHUNK
    )
    saved = Checkpoints(folder, every=2, policy=policy, ars=ars)
    start = saved.resume()

    def returns() -> torch.Tensor:
        # pm.directions: those of this forward.
        env = Acrobot(lanes=2 * pm.directions * EPISODES)
        return rollout(pm, env, EPISODES, seed=seed, norm=norm).returns

    processes = ars.evaluation.processes
    if distributed.is_first():  # prints and writes
        print(f"{1 if processes is None else processes.size} processes, from generation {start} on")
    begin = time.perf_counter()
    for step in range(start, steps):
        before = 0 if processes is None else processes.bytes
        mean = float(ars.step(returns))
        saved.after(step)
        # Every process checks, on the same episodes: what it decides must be what all decide.
        check = evaluate(policy, Acrobot(CHECK), CHECK, seed=seed, norm=norm).mean
        if distributed.is_first():
            sent = "" if processes is None else f"  {processes.bytes - before} bytes sent"
            seconds = time.perf_counter() - begin
            print(f"{step:>3}  members {mean:5.1f}  policy {check:5.1f}  {seconds:5.1f} s{sent}")
        if check >= TARGET:
            break
    if distributed.is_first():
        print(f"policy and statistics: {digest([policy.state_dict(), norm.state_dict()])[:16]}")
    return policy


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description="Train a policy over any number of processes.")
    parser.add_argument("--directions", type=int, default=16, help="half the population (16)")
    parser.add_argument("--steps", type=int, default=20, help="most generations (20)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and episodes (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distributed_ars"), help="folder of checkpoints"
    )
    options = parser.parse_args(argv)
    try:
        return train(options.directions, options.steps, options.seed, options.out)
    except CheckpointError as error:
        sys.exit(f"{error}; name another folder: --out")


if __name__ == "__main__":
    main()
