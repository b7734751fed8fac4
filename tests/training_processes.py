"""What a process of test_training_processes.py runs, started by torchrun or alone."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import perturbed
from perturbed import Checkpoints
from perturbed.logs import Log


class Everyone(Log):
    everywhere = True
    records = 0

    def __call__(self, record):
        self.records += 1


def survive(folder: Path, steps: int) -> None:
    """Train alone, with a log and frequent checkpoints; may be killed at any moment."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    perturbed.convert(net, 8)
    pm = perturbed.PerturbedModel(net, 8, antithetic=True, sigma=0.1)
    nes = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.05))
    x = torch.ones(4, 6)
    checkpoints = perturbed.Checkpoints(folder / "saved", every=3, net=net, nes=nes)
    for record in perturbed.train(
        nes,
        lambda: (pm(pm.replicate(x)) - 1).square().mean(1),
        steps,
        log=[perturbed.CSVLog(folder / "run.csv")],
        checkpoints=checkpoints,
    ):
        print(record["step"], flush=True)  # what the one who kills waits for
    torch.save(net.state_dict(), folder / "net.pt")


def main(folder: Path, estimate: str) -> None:
    assert perturbed.distributed.init(timeout=60)
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    perturbed.convert(net, 9)
    pm = perturbed.PerturbedModel(net, 9, antithetic=True, sigma=0.1)
    nes = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.05), estimate=estimate)
    x = torch.ones(4, 6)
    everyone = Everyone()
    log = [
        perturbed.CSVLog(folder / "run.csv"),  # of rank 0 alone: no two write one file
        perturbed.EstimateQuality(every=2),
        everyone,
    ]
    records = []
    for record in perturbed.train(
        nes,
        lambda: (pm(pm.replicate(x)) - 1).square().mean(1),
        steps=6,
        log=log,
        checkpoints=Checkpoints(folder / "saved", net=net, nes=nes),
    ):
        records.append({k: v for k, v in record.items() if "second" not in k})
        if record["step"] == 6:
            record["rank"] = rank
    # Clocks differ, the end does not: without agreement one process would wait for the other.
    timed = 0
    for record in perturbed.train(
        nes, lambda: pm(pm.replicate(x)).square().mean(1), seconds=0.05 if rank else 0.1, every=3
    ):
        timed = record["step"]
    result = {"records": records, "timed": timed, "seen": everyone.records}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        survive(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2])
