"""Logs: files that go on where a run does, a bar, TensorBoard."""

import csv
import io
import math
import sys
import types

import pytest
import torch

from perturbed import CSVLog, Progress, TensorBoard


def at(step):
    """What a log asks of an optimizer."""
    return types.SimpleNamespace(steps=step)


def write(path, records, step=0):
    log = CSVLog(path)
    log.open(at(step))
    for record in records:
        log(record)
    log.close()


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- CSV ---------------------------------------------------------------------------------------


def test_rows_have_all_digits_and_no_other_form(tmp_path):
    file = tmp_path / "folder" / "run.csv"
    numbers = {"mean": 0.1 + 0.2, "best": torch.tensor(0.5), "count": torch.tensor([3])}
    rest = {"nothing": math.nan, "text": 'a "b",\nc', "low": -math.inf}
    write(file, [{"mean": 1.0, "step": 1}, {"step": 2, **numbers, **rest}])
    first, second = read(file)
    assert first["step"] == "1"
    assert list(second) == ["step", "mean", "best", "count", "nothing", "text", "low"]
    assert float(second["mean"]) == 0.1 + 0.2
    assert (second["best"], second["count"], second["text"]) == ("0.5", "3", 'a "b",\nc')
    assert math.isnan(float(second["nothing"]))
    assert float(second["low"]) == -math.inf
    assert first["best"] == ""


def test_a_row_is_in_the_file_at_once(tmp_path):
    log = CSVLog(tmp_path / "run.csv")
    log.open(at(0))
    for step in (1, 2):
        log({"step": step})
        assert [row["step"] for row in read(log.path)] == ["1", "2"][:step]
    log.close()


def test_a_name_that_is_new_gets_a_column(tmp_path):
    file = tmp_path / "run.csv"
    write(file, [{"step": 1, "a": 1}, {"step": 2, "b": 2}, {"step": 3, "a": 3, "b": 3}])
    assert [list(row.values()) for row in read(file)] == [
        ["1", "1", ""],
        ["2", "", "2"],
        ["3", "3", "3"],
    ]
    write(file, [{"step": 4, "c": 4}], step=3)  # of a resumed run, too
    assert [row["c"] for row in read(file)] == ["", "", "", "4"]
    assert list(tmp_path.iterdir()) == [file]  # nothing partial


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, ["1", "2"]), (7, ["1", "2", "4"])])
def test_rows_after_the_resumed_step_are_dropped(tmp_path, step, kept):
    file = tmp_path / "run.csv"
    write(file, [{"step": s, "mean": s / 2} for s in (1, 2, 4)])
    write(file, [], step)
    assert file.exists()
    assert [row["step"] for row in read(file)] == kept
    write(file, [{"step": 9, "mean": 1.0}], step)
    assert [row["step"] for row in read(file)] == [*kept, "9"]


def test_a_file_that_was_cut_anywhere_goes_on(tmp_path):
    file = tmp_path / "run.csv"
    write(file, [{"step": s, "note": "two\nlines", "mean": s / 3} for s in (1, 2)])
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        if 0 < length < len("step"):  # too little to tell: rather refused than lost
            with pytest.raises(ValueError, match="is no log of a run"):
                write(file, [], 2)
            continue
        write(file, [{"step": 3, "note": "", "mean": 1.0}], 2)
        rows = read(file)
        assert rows[-1]["step"] == "3"
        assert [r["step"] for r in rows] in (["3"], ["1", "3"], ["1", "2", "3"])
        assert all(r["note"] == "two\nlines" for r in rows[:-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,price\nbread,2\n", "first column must be 'step', got 'name,price'"),
        ("hello", "first column must be 'step', got 'hello'"),
        ("steps taken,x\n1,2\n", "first column must be 'step', got 'steps taken,x'"),
        ("step,mean\n1,2\n2\n3,4\n", "row 3 must have a step and 2 columns, got"),
        ("step,mean\nx,2\n", "row 2 must have a step and 2 columns, got"),
    ],
)
def test_other_files_are_left_alone(tmp_path, text, message):
    file = tmp_path / "run.csv"
    file.write_text(text)
    for step in (0, 5):
        with pytest.raises(ValueError, match=message):
            CSVLog(file).open(at(step))
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_log_must_be_open_and_a_record_have_a_step(tmp_path):
    log = CSVLog(tmp_path / "run.csv")
    with pytest.raises(RuntimeError, match="is closed: call open"):
        log({"step": 1})
    log.close()
    log.open(at(0))
    with pytest.raises(ValueError, match=r"must have the entry 'step', got \['mean'\]"):
        log({"mean": 1})
    log.close()


# ---- a bar -------------------------------------------------------------------------------------


def test_the_bar_shows_where_a_run_is():
    screen = io.StringIO()
    log = Progress(show=("mean", "test"), desc="learning", file=screen, mininterval=0)
    log.open(at(10), 20)
    log({"step": 11, "mean": 0.25, "best": 1})
    log({"step": 14, "mean": 0.125, "test": torch.tensor(0.5)})
    log.close()
    text = screen.getvalue()
    assert "learning:  50%" in text
    assert "mean=0.25" in text
    assert "14/20" in text
    assert "mean=0.125, test=0.5" in text
    assert "best" not in text
    log.close()


def test_a_bar_of_a_run_without_an_end():
    screen = io.StringIO()
    log = Progress(file=screen, mininterval=0)
    log.open(at(0))
    log({"step": 3})
    log.close()
    assert "3step" in screen.getvalue()
    with pytest.raises(TypeError, match="show must be a list of names, got 'mean'"):
        Progress(show="mean")


# ---- TensorBoard -------------------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `log`")
    log = TensorBoard(tmp_path, prefix="train/")
    log.open(at(0))
    for step in (1, 2, 3):
        log({"step": step, "mean": step / 2, "best": torch.tensor(step), "note": "text"})
    log.close()
    assert scalars(tmp_path) == {
        "train/mean": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "train/best": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    log.open(at(1))  # resumed after step 1
    log({"step": 2, "mean": 7.0, "best": 8})
    log.close()
    assert scalars(tmp_path)["train/mean"] == [(1, 0.5), (2, 7.0)]


@pytest.mark.parametrize(
    ("log", "module", "message"),
    [
        (lambda: TensorBoard("runs"), "torch.utils.tensorboard", "needs the package tensorboard"),
        (Progress, "tqdm", "needs tqdm"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, log, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message + r': pip install "perturbed\[log\]"'):
        log()
