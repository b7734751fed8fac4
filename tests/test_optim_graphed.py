"""GraphedStep: replayed steps are the steps of the optimizer, with fresh noise each."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.utils._pytree import tree_flatten

import perturbed
from perturbed.optim import graphed
from perturbed.rl import ObservationNorm

FAMILIES = {
    "dense": perturbed.Dense(),
    "signs": perturbed.Dense("rademacher"),
    "stored": perturbed.Dense(storage="stored"),
    "low_rank": perturbed.LowRank(2),
    "sparse": perturbed.Sparse(2),
    "sign_flip": perturbed.SignFlip(),
    "permuted": perturbed.Permuted(),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Return a device whose steps are recorded: by CUDA, or on the CPU by a stand-in."""
    if request.param == "cpu":
        monkeypatch.setattr(graphed, "records", lambda device: True)
        monkeypatch.setattr(graphed, "side_stream", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(graphed, "Graph", Recorder)
    return torch.device(request.param)


def trainer(device, noise=None, algorithm=perturbed.NES, torch_optimizer=None, lr=0.01, **options):
    """Return an optimizer of a small network, and its closure."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    perturbed.convert(net, 8, noise=noise or perturbed.Dense())
    pm = perturbed.PerturbedModel(net, 8, sigma=0.1, seed=3)
    if torch_optimizer is None:
        torch_optimizer = functools.partial(torch.optim.SGD, momentum=0.9, foreach=True)

    def closure(x, y):
        return (pm(pm.replicate(x)) - pm.replicate(y)).square().mean(-1)

    return algorithm(pm, torch_optimizer(net.parameters(), lr=lr), **options), closure


def data(device, n=12):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, generator=generator).to(device), torch.zeros(4, 3, device=device))
        for _ in range(n)
    ]


def outcome(optimizer, losses):
    """Return everything that a step may change."""
    parameters = [p.detach().clone() for p in optimizer.pm.model.parameters()]
    return [torch.stack(losses), *parameters, optimizer.state_dict()]


def assert_same(got, expected):
    """Compare bit by bit, containers of numbers and strings included."""
    leaves, shape = tree_flatten(got)
    others, other_shape = tree_flatten(expected)
    assert shape == other_shape
    for one, other in zip(leaves, others, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


@pytest.mark.parametrize("noise", FAMILIES, ids=list(FAMILIES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 3, "weight_decay": 0.1, "shaping": "zscore"},
        {"reuse": 3, "maximize": True},
        {"algorithm": perturbed.ARS, "top": 5},
    ],
    ids=["plain", "chunk", "reuse", "ars"],
)
def test_replayed_steps_are_the_optimizers(device, noise, options):
    plain, closure = trainer(device, FAMILIES[noise], **options)
    expected = [plain.step(lambda x=x, y=y: closure(x, y)) for x, y in data(device)]
    replayed, closure = trainer(device, FAMILIES[noise], **options)
    step = perturbed.GraphedStep(replayed, closure, warmup=2)
    losses = [step(x, y) for x, y in data(device)]
    assert step.captures == 1
    assert len(set(torch.stack(losses).tolist())) == len(losses)  # fresh noise, other data
    assert_same(outcome(replayed, losses), outcome(plain, expected))


def test_every_replay_draws_fresh_noise(device):
    optimizer, closure = trainer(device, lr=0.0)  # what differs is the noise
    step = perturbed.GraphedStep(optimizer, closure, warmup=1)
    x, y = data(device)[0]
    losses = [float(step(x, y)) for _ in range(8)]
    assert len(set(losses)) == 8
    assert step.captures == 1


def test_sigma_may_follow_a_schedule(device):
    options = {"sigma_schedule": lambda step: 0.1 / (step + 1)}
    plain, closure = trainer(device, **options)
    expected = [plain.step(lambda x=x, y=y: closure(x, y)) for x, y in data(device)]
    replayed, closure = trainer(device, **options)
    step = perturbed.GraphedStep(replayed, closure)
    losses = [step(x, y) for x, y in data(device)]
    assert step.captures == 1
    assert_same(outcome(replayed, losses), outcome(plain, expected))


def test_ordinary_steps_in_between_count(device):
    plain, closure = trainer(device)
    expected = [plain.step(lambda x=x, y=y: closure(x, y)) for x, y in data(device)]
    replayed, closure = trainer(device)
    step = perturbed.GraphedStep(replayed, closure, warmup=1)
    losses = []
    for i, (x, y) in enumerate(data(device)):
        if i in (4, 5, 8):
            losses.append(replayed.step(lambda x=x, y=y: closure(x, y)))
        else:
            losses.append(step(x, y))
        replayed.optimizer.zero_grad()  # drops gradients that the graph writes to
    assert step.captures == 1
    result = outcome(replayed, losses)
    assert_same(result, outcome(plain, expected))
    assert result[-1]["stats"]["nonfinite_total"] == 0


def test_the_graph_is_recorded_anew_where_it_no_longer_fits(device):
    def changes(i, optimizer):
        if i == 4:
            optimizer.optimizer.param_groups[0]["lr"] = 0.002
        if i == 6:
            optimizer.pm.model[0].weight.requires_grad_(False)
        if i == 8:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    plain, closure = trainer(device)
    expected = []
    for i, (x, y) in enumerate(data(device)):
        changes(i, plain)
        x, y = (x[:2], y[:2]) if i > 9 else (x, y)
        expected.append(plain.step(lambda x=x, y=y: closure(x, y)))
    replayed, closure = trainer(device)
    step = perturbed.GraphedStep(replayed, closure, warmup=1)
    losses = []
    for i, (x, y) in enumerate(data(device)):
        changes(i, replayed)
        losses.append(step(*((x[:2], y[:2]) if i > 9 else (x, y))))
    assert step.captures == 5  # at first, and after four changes
    assert_same(outcome(replayed, losses), outcome(plain, expected))


class Descent(torch.optim.Optimizer):
    """Gradient descent whose learning rate is a tensor; torch's own reads it on the host."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"])


def test_a_tensor_learning_rate_is_no_reason_to_record_anew(device):
    rate = torch.tensor(0.01, device=device)
    optimizer, closure = trainer(device, torch_optimizer=Descent, lr=rate)
    step = perturbed.GraphedStep(optimizer, closure, warmup=1)
    for x, y in data(device):
        step(x, y)
        optimizer.optimizer.param_groups[0]["lr"].mul_(0.9)
    assert step.captures == 1


def test_losses_that_are_not_finite_are_counted(device):
    optimizer, _ = trainer(device)
    pm = optimizer.pm

    def closure(x):
        losses = pm(pm.replicate(x)).square().mean(-1)
        return torch.where(torch.arange(len(losses), device=device) == 0, torch.nan, losses)

    step = perturbed.GraphedStep(optimizer, closure, warmup=1)
    for x, _ in data(device, 5):
        step(x)
    assert optimizer.stats["nonfinite"] == 1
    assert optimizer.stats["nonfinite_total"] == 5


def test_the_quality_of_a_replayed_estimate_can_be_read(device):
    qualities = []
    for warmup in (1, 100):  # recorded, and ordinary steps
        optimizer, closure = trainer(device)
        step = perturbed.GraphedStep(optimizer, closure, warmup)
        for x, y in data(device):
            step(x, y)
        qualities.append(perturbed.estimate_quality(optimizer))
    assert qualities[0] == qualities[1]


def test_what_cannot_be_recorded_changes_nothing(device):
    optimizer, closure = trainer(device)
    fail = True

    def reading(x, y):
        losses = closure(x, y)
        if fail:
            float(losses[0])  # waits for the device
        return losses

    step = perturbed.GraphedStep(optimizer, reading, warmup=1)
    batches = data(device)
    step(*batches[0])
    before = optimizer.state_dict()
    with pytest.raises(RuntimeError):
        step(*batches[1])
    assert_same(optimizer.state_dict(), before)
    if device.type == "cpu":  # a failed capture may leave a CUDA context in another state
        fail = False
        plain, closure_ = trainer(device)
        expected = [plain.step(lambda x=x, y=y: closure_(x, y)) for x, y in batches[:3]]
        torch.testing.assert_close(step(*batches[1]), expected[1], rtol=0, atol=0)
        torch.testing.assert_close(step(*batches[2]), expected[2], rtol=0, atol=0)


def test_a_step_without_a_gpu_is_an_ordinary_one():
    cpu = torch.device("cpu")
    plain, closure = trainer(cpu)
    expected = [plain.step(lambda x=x, y=y: closure(x, y)) for x, y in data(cpu)]
    other, closure = trainer(cpu)
    step = perturbed.GraphedStep(other, closure)
    losses = [step(x, y) for x, y in data(cpu)]
    assert step.captures == 0
    assert_same(outcome(other, losses), outcome(plain, expected))


def test_wrong_arguments_are_refused():
    optimizer, closure = trainer(torch.device("cpu"))
    with pytest.raises(TypeError, match="optimizer must be NES or ARS, got SGD"):
        perturbed.GraphedStep(optimizer.optimizer, closure)
    with pytest.raises(TypeError, match="closure must be a function"):
        perturbed.GraphedStep(optimizer, None)
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        perturbed.GraphedStep(optimizer, closure, warmup=0)
    with pytest.raises(TypeError, match="inputs must be tensors, got list as number 1"):
        perturbed.GraphedStep(optimizer, closure)(torch.ones(1), [1.0])
    limited, closure = trainer(torch.device("cpu"), max_memory="1 GB")
    with pytest.raises(ValueError, match="max_memory"):
        perturbed.GraphedStep(limited, closure)
    normalised, closure = trainer(torch.device("cpu"), normalizer=ObservationNorm(6))
    with pytest.raises(ValueError, match="normalizer"):
        perturbed.GraphedStep(normalised, closure)


@pytest.mark.cuda
def test_adam_is_replayed():
    # torch's Adam has no capturable form on the CPU.
    device = torch.device("cuda")
    adam = functools.partial(torch.optim.Adam, capturable=True)
    plain, closure = trainer(device, torch_optimizer=adam)
    expected = [plain.step(lambda x=x, y=y: closure(x, y)) for x, y in data(device)]
    replayed, closure = trainer(device, torch_optimizer=adam)
    step = perturbed.GraphedStep(replayed, closure)
    losses = [step(x, y) for x, y in data(device)]
    assert_same(outcome(replayed, losses), outcome(plain, expected))
