"""Ctrl-C and errors in the middle of a step: nothing half-changed, and the run goes on."""

import pytest
import torch
from torch import nn
from torch.backends import mha
from trainers import TRAINERS, Run, each_trainer, loss, network

import perturbed
from perturbed.description import digest

# Runs that need an inner gradient: their closure calls backward, and nothing of ours is half done.
POPULATIONS = [name for name in TRAINERS if name != "clipup"]


class Interrupt:
    """Raises KeyboardInterrupt in a module's ``at``-th forward, after the layers have run."""

    def __init__(self, net: nn.Module, at: int) -> None:
        self.left = at
        self.handle = net.register_forward_hook(self)

    def __call__(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def remove(self) -> None:
        self.handle.remove()


def model_of(run: Run) -> perturbed.PerturbedModel | None:
    for part in run.parts.values():
        if isinstance(getattr(part, "pm", None), perturbed.PerturbedModel):
            return part.pm
    return None


def learned(run: Run) -> str:
    """Digest of what trains; without the test's own generator, which a step reads at its start."""
    states = {
        name: part.state_dict()
        for name, part in run.parts.items()
        if not isinstance(part, torch.Generator)
    }
    return digest(states)


def assert_at_rest(run: Run) -> None:
    """No noise is on, all directions are shown, and the draw's tensors hold its numbers."""
    assert mha.get_fastpath_enabled()
    pm = model_of(run)
    if pm is None:
        return
    state = pm.state
    assert not state.active
    assert state.rows is None
    assert (pm.first_direction, pm.directions) == (0, pm.population)
    for key, sigma, shared in state._tensors.values():
        assert key.tolist() == state._key()
        assert shared.tolist() == [*state._key()[:2], 0]
        assert float(sigma) == state.sigma


def count_forwards(name: str) -> int:
    run = TRAINERS[name](0).steps(2)
    counter = Interrupt(run.parts["net"], 0)
    run.step()
    return -counter.left


@pytest.mark.parametrize("name", POPULATIONS)
def test_ctrl_c_in_any_forward_of_a_step(name):
    """The step has not happened; the next ones give what they would have given."""
    for at in range(1, count_forwards(name) + 1):
        run = TRAINERS[name](0).steps(2)
        generator = run.parts.get("generator")
        before, inputs = learned(run), generator.get_state() if generator else None
        interrupt = Interrupt(run.parts["net"], at)
        with pytest.raises(KeyboardInterrupt):
            run.step()
        interrupt.remove()
        if name != "ars-v2":  # its step updates the normalizer itself, before the optimizer's
            assert learned(run) == before
        assert_at_rest(run)
        if generator:
            generator.set_state(inputs)
        if name != "ars-v2":
            assert run.steps(2).state() == TRAINERS[name](0).steps(4).state()


@each_trainer
def test_a_step_after_ctrl_c_between_layers(make):
    """A hook of an inner layer raises in the middle of the network; the next step runs."""
    run = make(0).steps(1)
    handle = run.parts["net"][0].register_forward_pre_hook(lambda *_: _raise(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.step()
    handle.remove()
    assert_at_rest(run)
    run.step()
    assert_at_rest(run)


def _raise(kind: type[BaseException], *_) -> None:
    raise kind("interrupted")


# ---- other functions of the user that a step calls -----------------------------------------------


def population(**options):
    net = perturbed.convert(network(0), 4)
    pm = perturbed.PerturbedModel(net, 4, sigma=0.1)
    inner = torch.optim.Adam(net.parameters(), 0.05)
    trainer = perturbed.NES(pm, inner, **options)
    x = torch.ones(5, 3)
    return Run(lambda: trainer.step(lambda: loss(pm, pm.replicate(x))), net=net, nes=trainer)


class Switch:
    """A function that raises while ``on``."""

    def __init__(self, function):
        self.function, self.on = function, False

    def __call__(self, *args):
        if self.on:
            raise KeyboardInterrupt
        return self.function(*args)


@pytest.mark.parametrize("which", ["shaping", "sigma_schedule"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_ctrl_c_in_a_function_of_the_user(which, chunk):
    functions = {
        "shaping": perturbed.optim.SHAPINGS["centered_rank"],
        "sigma_schedule": lambda step: 0.1 / (1 + step),
    }
    switch = Switch(functions[which])
    run = population(**{which: switch, "chunk": chunk}).steps(2)
    before = run.state()
    switch.on = True
    with pytest.raises(KeyboardInterrupt):
        run.step()
    switch.on = False
    assert run.state() == before
    assert_at_rest(run)
    undisturbed = population(**{which: Switch(functions[which]), "chunk": chunk})
    assert run.steps(2).state() == undisturbed.steps(4).state()


def test_ctrl_c_in_the_torch_optimizer():
    """What the inner optimizer has not begun has not happened."""
    run = population().steps(2)
    before = run.state()
    inner = run.parts["nes"].optimizer
    handle = inner.register_step_pre_hook(lambda *_: _raise(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.step()
    handle.remove()
    assert run.state() == before
    assert_at_rest(run)
    assert run.steps(2).state() == population().steps(4).state()


def test_ctrl_c_in_a_log_and_a_scheduler():
    """`train` leaves after a whole step: the trainer is at that step, and may go on."""
    run = population()
    records = []

    def log(record):
        records.append(record)
        if len(records) == 3:
            raise KeyboardInterrupt

    trainer = run.parts["nes"]
    pm, x = trainer.pm, torch.ones(5, 3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    every_step = perturbed.train(
        trainer,
        lambda: loss(pm, pm.replicate(x)),
        steps=10,
        every=1,
        log=[log],
        schedulers=[scheduler],
    )
    with pytest.raises(KeyboardInterrupt):
        list(every_step)
    assert_at_rest(run)
    assert trainer.steps == 3
    assert scheduler.last_epoch == 3
