"""Timing on CUDA, with a GPU that is an account of what was asked of it."""

import pytest
import torch

from bench import machine, timing
from bench.common import Row
from bench.timing import REPLAYED_CALLS, Clock, Rotating, replayed

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch):
    """What a fake GPU was asked for, in order; its calls take 5 ms each between events."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 5.0  # milliseconds

    class Buffer:
        def zero_(self):
            log.append("flush")

    def empty(numel, dtype, device):
        assert (numel, dtype, device) == (2 * 1000, torch.uint8, GPU)
        return Buffer()

    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    return log


def test_a_call_is_timed_between_events_after_the_cache_was_overwritten(asked):
    seconds = Clock(GPU)(lambda: asked.append("call"))
    assert seconds == 0.005
    assert asked == ["flush", "event", "call", "event", "wait"]


def test_short_calls_are_replayed_and_long_ones_are_not(asked, monkeypatch):
    monkeypatch.setattr(timing, "replayed", lambda call: 1e-6)
    rows = [Row("Base", lambda: None, lambda: None, 0), Row("x", lambda: None, lambda: None, 0)]
    base, _ = timing.measure("s", "step", "c", rows, GPU, 0.0)
    assert base.median_s == 0.005
    assert base.replay_s != base.replay_s
    monkeypatch.setattr(timing, "LAUNCH_BOUND_S", 0.01)
    base, x = timing.measure("s", "step", "c", rows, GPU, 0.0)
    assert base.replay_s == x.replay_s == x.best_s == 1e-6


def test_a_replay_that_writes_nothing_is_a_failure(asked, monkeypatch):
    def wrong(call):
        raise AssertionError("a replay")

    monkeypatch.setattr(timing, "replayed", wrong)
    monkeypatch.setattr(timing, "LAUNCH_BOUND_S", 0.01)
    (base,) = timing.measure("s", "v", "c", [Row("Base", lambda: 0, lambda: None, 0)], GPU, 0.0)
    assert base.failed


def test_replayed_divides_by_the_calls_of_a_graph():
    y = torch.zeros(3)
    found = replayed(lambda: y, lambda call: (lambda: y.fill_(1.0), [y]), lambda replay: 0.008)
    assert found == 0.008 / REPLAYED_CALLS


def test_replayed_outputs_must_be_written_again():
    y = torch.zeros(3)
    with pytest.raises(AssertionError, match="must write all"):
        replayed(lambda: y, lambda call: (lambda: None, [y]), lambda replay: 1.0)


def test_what_cannot_be_captured_has_no_time():
    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    found = replayed(lambda: None, capture, lambda replay: 1.0)
    assert found != found


def test_capture_ends_and_leaves_its_stream_when_a_call_fails(monkeypatch):
    log = []

    class Graph:
        def capture_begin(self):
            log.append("begin")

        def capture_end(self):
            log.append("end")

        def replay(self):
            log.append("replay")

    class Stream:
        def wait_stream(self, other):
            log.append("order")

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *error):
            log.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replay, outputs = timing.capture(lambda: torch.ones(2))
    assert log == ["order", "enter", "begin", "end", "leave", "order"]
    assert len(outputs) == REPLAYED_CALLS
    replay()
    log.clear()
    calls = iter(range(5))

    def fails_when_captured():
        if next(calls) == 4:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        timing.capture(fails_when_captured)
    assert log == ["order", "enter", "begin", "end", "leave"]


def test_calls_read_copies_in_turn_on_a_gpu_and_one_tensor_on_a_cpu():
    x = torch.arange(4.0)
    assert Rotating(x)().data_ptr() == x.data_ptr()
    turning = Rotating(x, cache=1000)
    seen = [turning() for _ in range(2 * REPLAYED_CALLS)]
    assert len({y.data_ptr() for y in seen}) == REPLAYED_CALLS
    assert all(torch.equal(y, x) for y in seen)
    assert len(Rotating(x, cache=16).copies) == 1  # no room for it in the cache


def test_quartiles_lie_between_the_extremes():
    row = Row("Base", lambda: None, lambda: None, 0)
    (r,) = timing.measure("s", "v", "c", [row], torch.device("cpu"), 0.0)
    assert r.min_s <= r.low_s <= r.median_s <= r.high_s <= r.max_s
    for samples in ([1.0], [1.0, 3.0], [1.0, 2.0, 9.0]):
        r = timing._result("s", "v", "c", row, samples)
        assert r.min_s <= r.low_s <= r.median_s <= r.high_s <= r.max_s


def test_tf32_is_said_for_every_library_and_rates_are_measured():
    libraries = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
    )
    before = [library.fp32_precision for library in libraries]
    try:
        for on, name in ((True, "tf32"), (False, "ieee")):
            machine.set_tf32(on)
            assert [library.fp32_precision for library in libraries] == [name] * 3
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.fp32_precision = value
    rates = machine.roofs(torch.device("cpu"), small=True)
    assert set(rates) == {"copy", "float32", "normals", "signs"}
    assert all(rate > 0 for rate in rates.values())


def test_the_machine_is_named_without_its_paths():
    facts = machine.machine(torch.device("cpu"))
    assert {"cpu", "cores", "threads", "torch", "compiler", "date"} < set(facts)
    assert not any("/" in value for value in facts.values())
