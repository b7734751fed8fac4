"""Use the installed package: python smoke.py PREFIX, the environment that must have it."""

import importlib.metadata
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import perturbed

assert Path(perturbed.__file__).is_relative_to(Path(sys.argv[1]).resolve()), perturbed.__file__
assert importlib.metadata.version("perturbed") == perturbed.__version__
for folder in ("tests", "bench", "docs", "csrc"):
    assert not (Path(perturbed.__file__).parent.parent / folder).exists(), folder

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
names = [name for name, _ in net.named_parameters()]
noise = {"0": perturbed.Dense("rademacher"), "*": perturbed.LowRank(1)}
perturbed.convert(net, 64, noise)
pm = perturbed.PerturbedModel(net, 64, sigma=0.1)
nes = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.02))
x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3


def loss() -> float:
    with torch.no_grad():
        return F.cross_entropy(net(x), y).item()


first = loss()
for _ in range(10):
    nes.step(lambda: F.cross_entropy(pm(pm.replicate(x)), pm.replicate(y), reduction="none"))
assert loss() < first, (first, loss())
rows = pm(pm.replicate(x))  # every row is what its member gives
member = pm.member(5, -1)
torch.testing.assert_close(rows.view(2, -1, 64, 3)[1, :, 5], member(x), atol=1e-4, rtol=1e-4)
perturbed.revert(net)
assert type(net[3]) is nn.Linear
assert [name for name, _ in net.named_parameters()] == names

swarm = perturbed.PSO(nn.Linear(2, 1), particles=8)
assert swarm.step(lambda net: net.weight.square().sum().item()).isfinite()
print(f"smoke: loss {first:.3f} -> {loss():.3f} in {nes.stats['evaluations']:,} evaluations")
