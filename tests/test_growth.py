"""Memory over many steps: nothing piles up, and what is deleted is gone at once."""

import contextlib
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from trainers import TRAINERS, Run, each_trainer, loss, nes, network

import perturbed
from perturbed.rl import CartPole, rollout

D = 4


def convert_and_revert() -> Run:
    """A conversion, a population and a forward each step, all of it undone."""
    net = network(0)
    x = torch.ones(2 * D, 3)

    def step():
        perturbed.convert(net, D)
        pm = perturbed.PerturbedModel(net, D)
        pm.set_noise()
        value = pm(x).sum()
        perturbed.revert(net)
        return value

    return Run(step, net=net)


def stored_noise() -> Run:
    return nes(noise=perturbed.Dense(storage="stored"))


def freed_noise() -> Run:
    run = stored_noise()
    step = run.step

    def and_free():
        value = step()
        run.parts["nes"].pm.free_memory()
        return value

    return Run(and_free, **run.parts)


def reused_noise() -> Run:
    net = perturbed.convert(network(0), D)
    pm = perturbed.PerturbedModel(net, D, sigma=0.1)
    trainer = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.05), reuse=3)
    x = torch.ones(5, 3)
    return Run(lambda: trainer.step(lambda: loss(pm, pm.replicate(x))), net=net, nes=trainer)


def bounded_memory() -> Run:
    """Forwards whose memory is measured, by hooks on every tensor."""
    net = perturbed.convert(network(0), D)
    pm = perturbed.PerturbedModel(net, D, sigma=0.1)
    trainer = perturbed.NES(pm, torch.optim.SGD(net.parameters(), 0.05), max_memory="1 MB")
    x = torch.ones(5, 3)
    return Run(lambda: trainer.step(lambda: loss(pm, pm.replicate(x))), net=net, nes=trainer)


def swarm_of_optimizers() -> Run:
    """Members that die young, and others in their place."""
    net = perturbed.convert(network(0), D, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, D)
    swarm = perturbed.optim.SwarmOfOptimizers(
        pm, lambda p: torch.optim.Adam(p, 0.01), old_steps=2, noise=0.01
    )
    x = torch.ones(5, 3)

    def step():
        return swarm.step(lambda: loss(pm, pm.replicate(x)).view(-1, D).mean(0))

    return Run(step, net=net, swarm=swarm)


def summary_and_members() -> Run:
    run = nes()
    pm = run.parts["nes"].pm
    pm.set_noise()

    def step():
        pm.summary(torch.ones(1, 3))
        pm.member(1, -1)
        perturbed.conversion_report(pm.model)
        return pm(torch.ones(2 * D, 3)).sum()

    return Run(step)


def episodes() -> Run:
    net = perturbed.convert(nn.Linear(4, 2), D)
    pm = perturbed.PerturbedModel(net, D, sigma=0.1)
    pm.set_noise()
    env = CartPole(lanes=2 * D)
    return Run(lambda: rollout(pm, env, max_steps=5).returns.sum())


RUNS = {
    **{name: lambda make=make: make(0) for name, make in TRAINERS.items()},
    "nes-chunks": lambda: nes(chunk=3),
    "nes-stored": stored_noise,
    "nes-freed": freed_noise,
    "nes-reuse": reused_noise,
    "nes-max-memory": bounded_memory,
    "swarm-of-optimizers": swarm_of_optimizers,
    "convert-revert": convert_and_revert,
    "summary-members": summary_and_members,
    "rollout": episodes,
}
# One of each kind in the default suite.
FEW = ("ars-v2", "snes", "spsa", "pso-inertia", "nes-stored", "nes-chunks", "convert-revert")
each_run = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, make in RUNS.items()
    ],
)


def tensors_alive() -> int:
    """Tensors that the collector knows of."""
    return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.fixture(autouse=True, scope="module")
def only_new_objects():
    """The collector leaves alone, and does not count, what was there before these tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def assert_no_growth(step, warm: int, steps: int) -> None:
    """As many objects and tensors after the steps as before; no memory beyond some caches."""
    for _ in range(warm):
        step()
    gc.collect()
    objects, tensors = len(gc.get_objects()), tensors_alive()
    blocks, resident = sys.getallocatedblocks(), resident_bytes()
    for _ in range(steps):
        step()
    gc.collect()
    assert tensors_alive() <= tensors
    # A leak adds one a step at least. What else changes is the interpreter's own: blocks that are
    # no objects come at up to 2 a step in the first hundred steps, at one in five later.
    assert len(gc.get_objects()) - objects < steps / 2
    if steps >= 1000:
        assert sys.getallocatedblocks() - blocks < steps
    # One small tensor a step, 1 kB with all that torch has around it, would be as much.
    assert resident_bytes() - resident < max(4 << 20, 1024 * steps)


@each_run
def test_no_growth_over_steps(make):
    assert_no_growth(make().step, 5, 30)


@pytest.mark.slow
@each_run
def test_no_growth_over_a_thousand_steps(make):
    assert_no_growth(make().step, 20, 1000)


# ---- what is deleted -----------------------------------------------------------------------------


@contextlib.contextmanager
def without_collector():
    """Nothing is freed but by the last reference to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parameters_of(run: Run) -> list[weakref.ref]:
    return [weakref.ref(p) for p in run.parts["net"].parameters()]


@each_trainer
def test_a_run_that_is_deleted_frees_its_parameters_at_once(make):
    """No circle of references holds them until the collector's next visit."""
    run = make(0).steps(2)
    held = parameters_of(run)
    scheduler = "scheduler" in run.parts  # torch's own circle: it wraps the optimizer's step
    with without_collector():
        del run
        if not scheduler:
            assert all(reference() is None for reference in held)
    gc.collect()
    assert all(reference() is None for reference in held)


@pytest.mark.parametrize("noise", [None, perturbed.Dense(storage="stored"), perturbed.Explicit()])
def test_a_population_that_is_deleted_leaves_the_model_alone(noise):
    """Neither the draw nor hooks stay behind, and the model does not hold its PerturbedModel."""
    net = perturbed.convert(network(0), D, noise)
    hooks = [n for n in vars(net[0]) if n.endswith("hooks")]
    before = {n: len(getattr(net[0], n)) for n in hooks}
    pm = perturbed.PerturbedModel(net, D)
    if noise is not None and noise.absolute:
        pm.set_members({n: torch.ones(D, *p.shape) for n, p in net.named_parameters()})
    else:
        pm.set_noise()
    pm(torch.ones(D, 3))
    pm.allocate_memory()
    population, held = weakref.ref(pm), [weakref.ref(t) for t in pm.state.held.values()]
    with without_collector():
        del pm
        assert population() is None
        perturbed.PerturbedModel(net, D)  # the layers leave the old draw
        assert all(reference() is None for reference in held)
    assert {n: len(getattr(net[0], n)) for n in hooks} == before
    references = [weakref.ref(p) for p in net.parameters()]
    with without_collector():
        del net
        assert all(reference() is None for reference in references)


def test_checkpoints_and_a_pool_do_not_grow(tmp_path):
    run = nes()
    checkpoints = perturbed.Checkpoints(tmp_path, every=1, keep=2, nes=run.parts["nes"])

    def step():
        run.step()
        checkpoints.save(run.parts["nes"].steps)

    assert_no_growth(step, 5, 30)
    net = network(0)
    rows = torch.ones(3, sum(p.numel() for p in net.parameters()))
    with perturbed.WorkerPool(_first, net, workers=1, start_method="fork") as pool:
        assert_no_growth(lambda: pool.evaluate(rows), 5, 30)


def _first(net: nn.Module) -> float:
    return float(next(net.parameters()).flatten()[0])
