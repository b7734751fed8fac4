"""One file: round trips of all that trains, writes that fail, damage."""

import errno
import os
import random
import resource
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from trainers import TRAINERS, Count, each_trainer, members, nes, network

import perturbed
from perturbed.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from perturbed.description import digest


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.pt"


# ---- round trips ---------------------------------------------------------------------------------


@each_trainer
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make, file):
    straight = make(1).steps(3)
    save_checkpoint(file, **straight.parts, losses=[0.5, None])
    resumed = make(2).steps(1)  # other weights, other noise
    assert resumed.state() != straight.state()
    assert load_checkpoint(file, **resumed.parts) == {"losses": [0.5, None]}
    assert resumed.state() == straight.state()
    assert resumed.steps(3).state() == straight.steps(3).state()


@each_trainer
def test_the_order_of_parts_does_not_matter(make, file):
    """Members of SNES are drawn around the module's parameters, and PSO writes its best to them."""
    straight = make(1).steps(2)
    for part in straight.parts.values():
        if hasattr(part, "ask"):
            part.ask()
    with torch.no_grad():
        for parameter in straight.parts["net"].parameters():
            parameter.add_(0.25)  # no longer PSO's best
    save_checkpoint(file, **straight.parts)
    resumed = make(2)
    load_checkpoint(file, **dict(reversed(resumed.parts.items())))
    assert resumed.state() == straight.state()
    swarms = [getattr(run.parts.get("trainer"), "swarm", None) for run in (straight, resumed)]
    if swarms[0] is not None and make is TRAINERS["pso-constriction"]:
        assert torch.equal(swarms[0].positions, swarms[1].positions)


def test_a_run_goes_on_with_another_chunk(file):
    straight = nes(1).steps(2)
    save_checkpoint(file, **straight.parts)
    resumed = nes(2, chunk=1)
    load_checkpoint(file, **resumed.parts)
    assert resumed.steps(3).state() == straight.steps(3).state()


def test_torch_reads_the_file_as_plain_weights(file):
    run = nes(1).steps(2)
    save_checkpoint(file, **run.parts)
    content = torch.load(file, weights_only=True)
    assert set(content["parts"]) == set(run.parts)
    for name, parameter in run.parts["net"].named_parameters():
        assert torch.equal(content["parts"]["net"][name], parameter)


def test_plain_values_come_back_as_they_were(file):
    values = {
        "numbers": [1, -(2**70), True, 0.1, float("inf"), 1 + 2j, None, "ä"],
        "nested": {"a": (1, [2, {"b": ()}]), 3: OrderedDict(x=1), None: torch.Size([2])},
        "generator": np.random.default_rng(0).bit_generator.state,
        "tensors": [torch.arange(3), torch.zeros(0, 2), torch.tensor(1.5, dtype=torch.bfloat16)],
        "parameter": nn.Parameter(torch.ones(2)),
        "complex": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
    }
    save_checkpoint(file, **values)
    found = load_checkpoint(file)
    assert digest(found) == digest(values)
    assert list(found) == list(values)
    assert found["generator"] == values["generator"]
    assert type(found["nested"]["a"]) is tuple


def test_a_number_out_of_a_larger_tensor_is_saved(file):
    column = torch.randn(1, 17)[:, 3]  # one number, stride 17
    save_checkpoint(file, column=column)
    assert torch.equal(load_checkpoint(file)["column"], column)


def test_a_generator_goes_on_where_it_was(file):
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    save_checkpoint(file, generator=generator)
    wanted = torch.rand(5, generator=generator)
    load_checkpoint(file, generator=generator)
    assert torch.equal(torch.rand(5, generator=generator), wanted)


def test_the_global_random_state_is_left_alone_unless_it_is_a_part(file):
    run = nes(1).steps(1)
    before = torch.get_rng_state()
    save_checkpoint(file, **run.parts)
    load_checkpoint(file, **run.parts)
    assert torch.equal(torch.get_rng_state(), before)
    save_checkpoint(file, rng=torch.default_generator)
    wanted = torch.rand(3)
    load_checkpoint(file, rng=torch.default_generator)
    assert torch.equal(torch.rand(3), wanted)


def test_a_trained_model_saves_with_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    for run in (nes(1).steps(2), members("PSO", 1).steps(2)):
        net = run.parts["net"]
        safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
        plain = network(2)  # of torch's own layers
        plain.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
        x = torch.randn(5, 3)
        assert torch.equal(plain(x), net(x))


# ---- writing -------------------------------------------------------------------------------------


def fail(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_the_file_is_forced_to_the_disk_before_it_takes_its_name(file, monkeypatch):
    events = []

    def watch(name):
        function = getattr(os, name)

        def watched(*args):
            events.append(name)
            return function(*args)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "replace"):
        watch(name)
    save_checkpoint(file, epoch=1)
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder's entries


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_failed_write_leaves_what_was_there(file, monkeypatch, where, error):
    save_checkpoint(file, epoch=1)
    with monkeypatch.context() as patch:
        patch.setattr(where, fail(error))
        with pytest.raises(type(error)):
            save_checkpoint(file, epoch=2)
    assert load_checkpoint(file) == {"epoch": 1}
    assert os.listdir(file.parent) == ["run.pt"]


@pytest.mark.parametrize("room", [0, 3_000, 100_000])
def test_a_disk_that_is_full_in_the_middle_is_an_os_error(file, room):
    """The system itself refuses: no file of this process may grow beyond ``room`` bytes."""
    save_checkpoint(file, epoch=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises((OSError, RuntimeError)) as raised:
            save_checkpoint(file, tensor=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    chain, error = [], raised.value
    while error is not None:
        chain.append(error)
        error = error.__context__
    assert any(isinstance(e, OSError) and e.errno == errno.EFBIG for e in chain)
    assert load_checkpoint(file) == {"epoch": 1}
    assert os.listdir(file.parent) == ["run.pt"]


def test_the_rest_of_a_killed_write_is_overwritten(file):
    leftover = file.with_name(".run.pt.partial")
    leftover.write_bytes(b"half" * 1000)
    save_checkpoint(file, epoch=1)
    assert load_checkpoint(file) == {"epoch": 1}
    assert not leftover.exists()


def test_folders_are_made_and_strings_are_paths(tmp_path):
    save_checkpoint(f"{tmp_path}/a/b/run.pt", epoch=1)
    assert load_checkpoint(f"{tmp_path}/a/b/run.pt") == {"epoch": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "part must have a state_dict or be a plain value .*, got object"),
        ({"a": [1, np.float64(1)]}, r"part\['a'\]\[1\] must .*, got float64"),
        ({np.int64(1): 1}, "a key of part must .*, got int64"),
        (defaultdict(list), "part must .*, got defaultdict"),
        (b"bytes", "part must .*, got bytes"),
        (torch.zeros(2, 2).to_sparse(), r"part must be a dense tensor with data, got torch.spar"),
        (torch.zeros(2, device="meta"), r"part must be a dense tensor with data, got .* on meta"),
        (perturbed.Replicated(torch.ones(2), 1, 1), "part must .*, got Replicated"),
        (lambda: 0, "part must .*, got function"),
    ],
    ids=lambda given: type(given).__name__ if not isinstance(given, str) else "",
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(file, value, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(file, part=value)
    count = Count(number=value)
    with pytest.raises(TypeError, match=message.replace("part", r"count\['number'\]", 1)):
        save_checkpoint(file, count=count)
    assert os.listdir(file.parent) == []


def test_a_part_needs_another_name_than_an_argument(file):
    with pytest.raises(ValueError, match="map_location is an argument of load_checkpoint"):
        save_checkpoint(file, map_location=1)
    save_checkpoint(file, path=1)
    assert load_checkpoint(file) == {"path": 1}


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture
def saved(file):
    """The bytes of a checkpoint, a run that differs from it, and the digest of its content."""
    save_checkpoint(file, **nes(1).steps(2).parts, loss=0.1234567, epoch=77)
    return file.read_bytes(), nes(2).steps(1), digest(read_checkpoint(file))


def test_a_file_cut_anywhere_is_damaged(file, saved):
    data, run, _ = saved
    before = run.state()
    for length in (*range(0, len(data), 50), len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpointError, match=r"run\.pt is truncated, corrupted or no"):
            load_checkpoint(file, **run.parts)
    assert run.state() == before


def test_a_flipped_bit_is_noticed_or_without_effect(file, saved):
    data, run, content = saved
    before, draw, harmless = run.state(), random.Random(0), 0
    for _ in range(400):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            found = read_checkpoint(file)
        except DamagedCheckpointError:
            continue
        assert digest(found) == content  # in what pads the archive, or repeats what is elsewhere
        harmless += 1
    assert 0 < harmless < 400
    assert run.state() == before


def test_a_flipped_bit_in_a_weight_or_a_number_is_noticed(file, saved):
    data, run, _ = saved
    before = run.state()
    parts = read_checkpoint(file)["parts"]
    weight = parts["net"]["0.weight"].numpy().tobytes()
    epoch = b"epoch"
    for what, first, count in (
        (weight, 0, len(weight)),
        (np.float64(0.1234567).byteswap().tobytes(), 0, 8),
        (epoch, 0, len(epoch)),
    ):
        start = data.index(what) + first
        for place in range(start, start + count, 3):
            file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(DamagedCheckpointError, match="corrupted"):
                load_checkpoint(file, **run.parts)
    assert run.state() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is no checkpoint of this package"),
        ({"weight": torch.ones(2)}, "is no checkpoint of this package"),
        ({"format": "perturbed checkpoint", "version": 1}, "does not match its digest"),
        (nn.Linear(1, 1), "truncated, corrupted or no checkpoint"),
    ],
    ids=["list", "state_dict", "no digest", "module"],
)
def test_files_of_others_are_refused(file, content, message):
    torch.save(content, file)
    with pytest.raises(DamagedCheckpointError, match=message):
        read_checkpoint(file)


def test_another_version_is_named_and_is_no_damage(file):
    save_checkpoint(file, epoch=1)
    content = {**read_checkpoint(file), "version": 2}
    torch.save({**content, "digest": digest(content)}, file)
    with pytest.raises(CheckpointError, match="has version 2, this package reads 1") as raised:
        read_checkpoint(file)
    assert not isinstance(raised.value, DamagedCheckpointError)


def test_a_missing_file_is_file_not_found(file):
    with pytest.raises(FileNotFoundError, match=r"run\.pt"):
        load_checkpoint(file)
