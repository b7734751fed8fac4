"""Trains in child processes, to be killed; see test_checkpoint_kill.py.

Reads a line of JSON for each run: the name of a trainer, the folder of its checkpoints, how many
``steps``, ``every``, ``padding`` (bytes) and the ``result`` file. Forks, so that a run starts
in milliseconds, prints the child's process id, and once the child has ended its exit status.
"""

import json
import os
import sys

import torch
from trainers import TRAINERS

from perturbed import Checkpoints, save_checkpoint


def train(trainer, folder, steps, every, padding, result):
    """Train, going on from what is there; at the end write the state and all losses."""
    run = TRAINERS[trainer](1)
    filler = torch.arange(padding // 8)  # makes writing take long
    saved = Checkpoints(folder, every=every, **run.parts, filler=filler)
    start = saved.resume()
    losses = saved.values.get("losses", [])
    for step in range(start, steps):
        losses.append(float(run.step()))
        saved.after(step, losses=losses)
    save_checkpoint(result, **run.parts, losses=losses)


def main():
    torch.set_num_threads(1)  # a fork of a process with threads may hang
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(**json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
