"""Checkpoints of other runs are refused by what differs, and nothing is ever half restored."""

import pytest
import torch
from torch import nn
from trainers import Count, each_trainer, members, nes, network

import perturbed
from perturbed.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.pt"


# ---- other runs ----------------------------------------------------------------------------------

OTHERS = {
    "architecture": (
        lambda: nes(hidden=5),
        r"net is of another run: parameters '0.weight' was \(4, 3\) .*here it is \(5, 3\) .*'2.we",
    ),
    "dtype": (
        lambda: nes(dtype=torch.float64),
        r"parameters '0.weight' was \(4, 3\) torch.float32, here it is \(4, 3\) torch.float64",
    ),
    "family": (
        lambda: nes(noise=perturbed.LowRank(1)),
        r"nes is of another run: noise '0' was Dense\('normal'\), here it is LowRank\(1\)",
    ),
    "population": (
        lambda: nes(directions=6),
        "nes is of another run: directions was 4, here it is 6$",
    ),
    "antithetic": (
        lambda: nes(antithetic=None),
        "nes is of another run: antithetic was True, here it is None",
    ),
    "optimizer": (
        lambda: nes(optimizer=torch.optim.SGD),
        "nes is of another run: optimizer was Adam, here it is SGD",
    ),
    "sign": (lambda: nes(maximize=True), "nes is of another run: maximize was False, here it is T"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_differs_is_named_and_nothing_changes(what, file):
    make, message = OTHERS[what]
    save_checkpoint(file, **nes(1).steps(2).parts)
    other = make().steps(1)
    before = other.state()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(file, **other.parts)
    assert other.state() == before


def test_another_activation_or_a_model_that_is_not_converted_is_another_architecture(file):
    save_checkpoint(file, net=network(1))
    other = network(1)
    other[1] = nn.ReLU()
    with pytest.raises(CheckpointError, match="modules '1' was Tanh, here it is ReLU"):
        load_checkpoint(file, net=other)
    converted = perturbed.convert(network(1), 4)
    with pytest.raises(CheckpointError, match="modules '0' was Linear, here it is PerturbedLinear"):
        load_checkpoint(file, net=converted)


def test_another_trainer_variant_or_number_of_particles_is_named(file):
    run = members("PSO", variant="constriction").steps(1)
    save_checkpoint(file, **run.parts)
    for other, message in (
        (members("SNES"), "trainer is of another run: class was PSO, here it is SNES"),
        (members("PSO", variant="inertia"), "state must be of the variant Constriction|Inertia"),
    ):
        before = other.steps(1).state()
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(file, **other.parts)
        assert other.state() == before
    save_checkpoint(file, pso=perturbed.PSO(network(1), particles=4))
    with pytest.raises(CheckpointError, match="particles was 4, here it is 6"):
        load_checkpoint(file, pso=perturbed.PSO(network(1), particles=6))


def test_missing_and_additional_parts_are_named(file):
    run = nes(1)
    save_checkpoint(file, **run.parts, epoch=1)
    before = run.steps(1).state()
    fewer = {name: part for name, part in run.parts.items() if name != "scheduler"}
    for parts, message in (
        (fewer, r"missing \['scheduler'\], unknown \[\]"),
        ({**run.parts, "extra": Count()}, r"missing \[\], unknown \['extra'\]"),
        ({**run.parts, "epoch": Count()}, r"missing \[\], unknown \['epoch'\]"),
        ({}, r"missing \['generator', 'nes', 'net', 'scheduler'\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(file, **parts)
    assert run.state() == before
    parts = read_checkpoint(file)["parts"]  # one alone is for the taking
    run.parts["net"].load_state_dict(parts["net"])


def test_a_plain_value_cannot_be_restored_into(file):
    save_checkpoint(file, net=network(1), epoch=1)
    with pytest.raises(CheckpointError, match=r"unknown \['epoch'\]"):
        load_checkpoint(file, net=network(1), epoch=2)


# ---- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("odd"), AttributeError("odd"), IndexError("odd")], ids=repr
)
def test_a_part_that_refuses_its_state_undoes_the_others(file, error):
    run = nes(1).steps(2)
    save_checkpoint(file, **run.parts, last=Count(1))
    other, last = nes(2).steps(1), Count(2, refuses=error)
    before = other.state()
    with pytest.raises(CheckpointError, match="last cannot be restored: odd; nor could what last"):
        load_checkpoint(file, **other.parts, last=last)
    assert other.state() == before
    assert last.number == 2


def test_an_interrupt_undoes_what_was_restored(file):
    save_checkpoint(file, first=Count(1), last=Count(1))
    first, last = Count(2), Count(2)
    calls = []

    def interrupted(state):
        calls.append(state)
        last.number = state["number"]
        if len(calls) == 1:
            raise KeyboardInterrupt

    last.load_state_dict = interrupted
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(file, first=first, last=last)
    assert (first.number, last.number) == (2, 2)


def test_a_buffer_of_another_size_is_refused_whole(file):
    """torch copies what fits before it complains."""

    def make(size, fill):
        net = nn.Linear(2, 2)
        net.register_buffer("seen", torch.zeros(size))
        nn.init.constant_(net.weight, fill)
        return net

    save_checkpoint(file, net=make(3, 1.0))
    other = make(4, 2.0)
    with pytest.raises(CheckpointError, match=r"net cannot be restored: .*\n\tsize mis"):
        load_checkpoint(file, net=other)
    assert (other.weight == 2).all()


@each_trainer
def test_a_failed_load_changes_no_bit_of_what_follows(make, file):
    """What is put back is not merely equal: the run goes on as if nothing had been tried."""
    straight, tried = make(2).steps(2), make(2).steps(2)
    with torch.no_grad():
        for run in (straight, tried):
            next(run.parts["net"].parameters()).add_(1)
    save_checkpoint(file, **make(1).steps(3).parts, last=Count())
    with pytest.raises(CheckpointError, match="last cannot be restored"):
        load_checkpoint(file, **tried.parts, last=Count(refuses=ValueError("odd")))
    assert tried.state() == straight.state()
    assert tried.steps(2).state() == straight.steps(2).state()
