"""Checkpoints: which files are kept, which one a run goes on from, and whose folder it is."""

import errno
import os
import warnings

import pytest
import torch
from torch import nn
from trainers import Count, nes

from perturbed import Checkpoints, checkpoint
from perturbed.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def train(folder, stop, every=1, keep=2, resume=True, **values):
    """Count to ``stop`` from where the folder is; return the start and the counter."""
    count = Count()
    saved = Checkpoints(folder, every=every, keep=keep, count=count)
    start = saved.resume() if resume else 0
    for step in range(start, stop):
        count.number = step + 1
        saved.after(step, **values)
    return start, count


def names(folder):
    return sorted(os.listdir(folder))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "keep", "stop", "left"),
    [
        (1, 1, 3, [3]),
        (1, 2, 12, [12, 11]),
        (5, 2, 19, [15, 10]),
        (5, 9, 12, [10, 5]),
        (7, 1, 6, []),
    ],
)
def test_the_last_few_are_kept(tmp_path, every, keep, stop, left):
    train(tmp_path / "a", stop, every, keep)
    saved = Checkpoints(tmp_path / "a", count=Count())
    assert [steps for steps, _ in saved.files()] == left
    for steps, file in saved.files():
        assert file.name == f"step-{steps}.pt"
        assert read_checkpoint(file)["parts"]["count"] == {"number": steps}
    assert (tmp_path / "a").exists() == bool(left)


def test_files_sort_by_number_and_others_are_left_alone(tmp_path):
    others = ["step-x.pt", "step-5.pt.old", "notes.txt", "step-99"]
    for name in others:
        (tmp_path / name).write_text("mine")
    train(tmp_path, 101, every=9, keep=3)
    assert [steps for steps, _ in Checkpoints(tmp_path).files()] == [99, 90, 81]
    assert set(others) < set(names(tmp_path))


def test_an_older_file_goes_only_after_the_newer_one_is_there(tmp_path, monkeypatch):
    train(tmp_path, 2, keep=1)
    saved = Checkpoints(tmp_path, keep=1, count=Count())
    assert saved.resume() == 2

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            saved.save(3)
    assert names(tmp_path) == ["step-2.pt"]
    saved.save(3)  # once there is space
    assert names(tmp_path) == ["step-3.pt"]


def test_rests_of_killed_writes_are_removed(tmp_path):
    train(tmp_path, 2)
    for name in (".step-3.pt.partial", ".step-7.pt.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert train(tmp_path, 3)[0] == 2
    assert names(tmp_path) == ["step-2.pt", "step-3.pt"]


# ---- going on ------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_newest(tmp_path):
    assert train(tmp_path, 25, every=10)[0] == 0
    saved = Checkpoints(tmp_path, count=(count := Count()))
    assert saved.resume() == 20
    assert count.number == 20
    assert train(tmp_path, 35, every=10)[0] == 20
    assert names(tmp_path) == ["step-20.pt", "step-30.pt"]


def test_a_run_without_checkpoints_begins(tmp_path):
    saved = Checkpoints(tmp_path / "none", count=(count := Count(3)))
    assert saved.resume() == 0
    assert saved.values == {}
    assert count.number == 3
    assert not (tmp_path / "none").exists()


def test_plain_values_of_parts_and_of_the_moment_come_back(tmp_path):
    curve = []
    saved = Checkpoints(tmp_path, every=2, count=Count(), options={"lr": 0.1}, curve=curve)
    saved.resume()
    for step in range(5):
        curve.append(step)
        saved.after(step, best=step / 2)
    again = Checkpoints(tmp_path, count=Count(), options=None, curve=[])
    assert again.resume() == 4
    assert again.values == {"options": {"lr": 0.1}, "curve": [0, 1, 2, 3], "best": 1.5}


def test_the_one_before_is_used_if_the_newest_is_damaged(tmp_path):
    train(tmp_path, 3, keep=3)
    cut(tmp_path / "step-3.pt")
    with pytest.warns(UserWarning, match=r"step-3\.pt is truncated.*; going back to step-2\.pt"):
        start, count = train(tmp_path, 2)
    assert (start, count.number) == (2, 2)
    assert names(tmp_path) == ["step-1.pt", "step-2.pt", "step-3.pt"]  # nothing is touched yet
    with pytest.warns(UserWarning, match="going back"):
        train(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["step-1.pt", "step-2.pt", "step-3.pt"]  # written anew
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(tmp_path, 3)[0] == 3


def test_a_damaged_file_never_outlives_good_ones_as_the_newest(tmp_path):
    """With keep=1 the damaged file has the greatest number for a while."""
    train(tmp_path, 30, every=10, keep=2)
    cut(tmp_path / "step-30.pt")
    with pytest.warns(UserWarning, match="going back"):
        train(tmp_path, 24, every=4, keep=1)
    assert names(tmp_path) == ["step-24.pt", "step-30.pt.damaged"]
    assert train(tmp_path, 25)[0] == 24


def test_no_whole_file_is_an_error_that_names_all(tmp_path):
    train(tmp_path, 2)
    for file in tmp_path.iterdir():
        cut(file)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-2.*; .*step-1"):
        train(tmp_path, 3)


def test_checkpoints_of_another_run_are_no_reason_to_go_back(tmp_path):
    """Going back would be for damage; here the caller is wrong."""
    run = nes(1).steps(1)
    saved = Checkpoints(tmp_path, **run.parts)
    saved.save(1)
    saved.save(2)
    other = nes(2, directions=6)
    before = other.state()
    with pytest.raises(CheckpointError, match=r"step-2\.pt: nes is of another run: directions was"):
        Checkpoints(tmp_path, **other.parts).resume()
    assert other.state() == before


def test_a_file_that_may_not_be_read_is_an_error_and_no_damage(tmp_path, monkeypatch):
    train(tmp_path, 2)

    def denied(file, mode):  # root, as tests may run, may read anything
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(checkpoint.file, "open", denied, raising=False)
    with pytest.raises(PermissionError, match=r"step-2\.pt"):
        train(tmp_path, 3)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file" / "saved", 1)


def test_only_the_first_process_writes_and_all_read(tmp_path, monkeypatch):
    train(tmp_path, 2)
    saved = Checkpoints(tmp_path, count=(count := Count()))
    monkeypatch.setattr(checkpoint.folder, "is_first", lambda: False)
    assert saved.resume() == 2
    assert count.number == 2
    saved.after(2)
    saved.save(9)
    assert names(tmp_path) == ["step-1.pt", "step-2.pt"]


# ---- whose folder it is --------------------------------------------------------------------------


def test_a_new_run_does_not_write_among_the_files_of_another(tmp_path):
    """It would remove its own files, their numbers being lower, or be resumed as the other."""
    train(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"holds checkpoints of a run \(step-9\.pt\): contin"):
        train(tmp_path, 3, every=100, resume=False)  # at the first step, not at the hundredth
    with pytest.raises(CheckpointError, match="or name another folder"):
        Checkpoints(tmp_path, count=Count()).save(1)
    assert names(tmp_path) == ["step-8.pt", "step-9.pt"]


def test_steps_do_not_go_back(tmp_path):
    saved = Checkpoints(tmp_path, count=Count())
    saved.save(5)
    saved.save(5)  # the end of a run may be a step that has been saved
    with pytest.raises(ValueError, match="steps must be at least 5, those of the last checkpoint"):
        saved.save(4)
    again = Checkpoints(tmp_path, count=Count())
    assert again.resume() == 5
    with pytest.raises(ValueError, match="steps must be at least 5"):
        again.after(3)
    assert names(tmp_path) == ["step-5.pt"]


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got 2.0"),
        ({"keep": True}, TypeError, "keep must be an int, got True"),
        ({"net": object()}, TypeError, "net must have a state_dict or be a plain value"),
        ({"map_location": 1}, ValueError, "map_location is an argument"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else "",
)
def test_bad_arguments_are_named_at_once(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path, **options)
    assert names(tmp_path) == []


def test_bad_steps_and_values_are_named(tmp_path):
    saved = Checkpoints(tmp_path, count=Count())
    for call, error, message in (
        (lambda: saved.after("1"), TypeError, "step must be an int, got '1'"),
        (lambda: saved.save(1.0), TypeError, "steps must be an int, got 1.0"),
        (lambda: saved.save(-1), ValueError, "steps must be at least 0"),
        (lambda: saved.save(1, count=2), ValueError, r"names of their own, .* parts: \['count'\]"),
        (lambda: saved.save(1, log=object()), TypeError, "log must have a state_dict or be a plai"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert names(tmp_path) == []


def test_a_file_of_a_folder_is_a_checkpoint_like_others(tmp_path):
    net = nn.Linear(2, 1)
    Checkpoints(tmp_path, net=net).save(1)
    save_checkpoint(tmp_path / "other.pt", net=net)
    other = nn.Linear(2, 1)
    assert load_checkpoint(tmp_path / "step-1.pt", net=other) == {}
    assert torch.equal(net.weight, other.weight)
