"""A user's script for mypy: the lines with an ignore must be errors, all others must not."""

import torch
from torch import Tensor, nn

import perturbed
from perturbed.particles import TensorList

net = perturbed.convert(nn.Sequential(nn.Linear(4, 3)), directions=8, noise=perturbed.LowRank(2))
pm = perturbed.PerturbedModel(net, directions=8, sigma=0.1)
nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1), shaping="zscore")


def closure() -> Tensor:
    rows: Tensor = pm(pm.replicate(torch.ones(2, 4)))
    return rows.square().mean(-1)


loss: Tensor = nes.step(closure)
best: float = perturbed.PSO(nn.Linear(2, 1), particles=4).best_value
sum_of_lists: TensorList = TensorList([loss]) + 1
member: nn.Module = pm.member(0, 1)

perturbed.NES(net, nes.optimizer)  # type: ignore[arg-type]
perturbed.NES(pm, nes.optimizer, shaping=3)  # type: ignore[arg-type]
perturbed.LowRank(rank="two")  # type: ignore[arg-type]
wrong: int = nes.step(closure)  # type: ignore[assignment]
