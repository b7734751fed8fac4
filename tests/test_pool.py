"""Functions of a module, member by member: in this process and in workers.

Most tests fork: a spawned worker takes seconds to import torch. Those at the end spawn.
"""

import contextlib
import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import perturbed
from perturbed import WorkerError, WorkerPool, evaluate_one_by_one
from perturbed._worker import SharedMemory


class Net(nn.Module):
    """Running statistics, a frozen parameter and a buffer that is bound anew by every forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(2, momentum=0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.norm(self.linear(x) * self.frozen) + self.calls


SIZE = 3 * 2 + 2 + 2 + 2


def members(count, seed=0):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def loss(net):
    """Depends on buffers and modes, and leaves a mess."""
    x = torch.linspace(-1, 1, 12).view(4, 3)
    value = net(x).square().mean() + net.norm.running_mean.sum()
    net.frozen += 1
    net.eval()
    return value


def on_device(net):
    """The sum of squares, wherever the module is."""
    return sum(p.square().sum() for p in net.parameters())


def first_parameter(net):
    return net.linear.weight[0, 0]


def expected(net, vectors, function=loss):
    """A fresh copy of the module for every member."""
    values = []
    for vector in vectors:
        own = copy.deepcopy(net)
        parameters = [p for p in own.parameters() if p.requires_grad]
        nn.utils.vector_to_parameters(vector, parameters)
        with torch.no_grad():
            values.append(float(function(own)))
    return torch.tensor(values, dtype=torch.float64)


def pool_of(function, net=None, **options):
    return WorkerPool(function, net or Net(), **{"start_method": "fork", **options})


def children():
    return {p.pid for p in multiprocessing.active_children()}


@pytest.fixture(autouse=True)
def no_process_is_left():
    """And one thread, as in the workers: sums of several threads differ in their last bits."""
    before, threads = children(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert children() <= before


# ---- what is evaluated -------------------------------------------------------------------------


def test_one_by_one_is_a_fresh_copy_a_member_and_leaves_the_module_alone():
    net = Net().train()
    net.norm.eval()
    net.linear.weight.grad = torch.ones(2, 3)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    vectors = members(5)
    values = evaluate_one_by_one(loss, net, vectors)
    assert values.dtype == torch.float64
    assert torch.equal(values, expected(net, vectors))
    assert len(set(values.tolist())) == 5
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not net.norm.training
    assert net.linear.weight.grad.eq(1).all()


def test_one_by_one_puts_everything_back_if_the_function_raises():
    net = Net()

    def fail(model):
        model.linear.weight.grad = torch.zeros(2, 3)
        model.linear.weight = nn.Parameter(torch.zeros(2, 3))
        loss(model)
        raise RuntimeError("first")

    weight, state = net.linear.weight, {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="first"):
        evaluate_one_by_one(fail, net, members(3))
    assert net.linear.weight is weight
    assert weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_workers_give_what_one_by_one_gives_in_order_over_generations(dtype):
    net = Net()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pool_of(loss, net, workers=3) as pool:
        workers = children()
        for generation, count in enumerate((1, 40, 7, 60)):  # shared memory grows twice
            vectors = members(count, generation).to(dtype)
            values = pool.evaluate(vectors)
            assert torch.equal(values, evaluate_one_by_one(loss, net, vectors))
        assert children() == workers
        assert pool.replaced == 0
        assert pool.evaluate(members(0)).shape == (0,)
        rows = list(members(4))
        assert torch.equal(pool.evaluate(iter(rows)), expected(net, rows))
        assert torch.equal(pool.evaluate(members(4).numpy()), expected(net, rows))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_the_module_is_copied_when_the_pool_is_made():
    net = Net()
    before = evaluate_one_by_one(loss, net, members(3))
    with pool_of(loss, net, workers=1) as pool:
        with torch.no_grad():
            net.frozen.add_(1)
        net.eval()
        assert torch.equal(pool.evaluate(members(3)), before)


def test_numbers_of_any_kind_are_results_and_nan_is_one():
    kinds = [lambda: 1, lambda: 2.5, lambda: np.float32(3), lambda: torch.tensor(4), lambda: True]
    kinds += [lambda: torch.ones(1, 1), lambda: np.array(0.5), lambda: float("nan")]
    kinds += [lambda: torch.tensor(float("inf"))]
    vectors = torch.zeros(len(kinds), SIZE)
    vectors[:, 0] = torch.arange(len(kinds))
    with pool_of(lambda net: kinds[int(first_parameter(net))]()) as pool:
        values = pool.evaluate(vectors)
    wanted = torch.tensor([1, 2.5, 3, 4, 1, 1, 0.5, float("nan"), float("inf")])
    assert torch.equal(values.nan_to_num(-1), wanted.double().nan_to_num(-1))


@pytest.mark.parametrize("value", [None, "1.0", 1j, torch.zeros(2), torch.zeros(0)], ids=str)
def test_results_that_are_no_numbers_are_refused(value):
    with pytest.raises(TypeError, match="function must return a number or a 0-dim tensor, got"):
        evaluate_one_by_one(lambda net: value, Net(), members(1))
    with pool_of(lambda net: value, workers=1) as pool, pytest.raises(TypeError, match="number"):
        pool.evaluate(members(1))


def test_evaluation_records_no_gradients_and_uses_the_threads_asked_for():
    def check(net):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():  # for those who want them
            net.linear.weight.sum().backward()
        return torch.get_num_threads()

    with pool_of(check, workers=1) as pool:
        assert pool.evaluate(members(2)).tolist() == [1, 1]


# ---- what goes wrong ---------------------------------------------------------------------------


class OwnError(Exception):
    """Does not unpickle: its constructor takes two arguments, and pickle gives one."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def raise_at_two(net):
    index = int(first_parameter(net))
    if index == 2:
        raise ZeroDivisionError("at two")
    if index == 3:
        raise OwnError("this", "that")
    if index == 4:
        sys.exit(5)
    return index


def numbered(count):
    vectors = torch.zeros(count, SIZE)
    vectors[:, 0] = torch.arange(count)
    return vectors


def test_an_exception_reaches_the_caller_and_the_pool_stays_usable():
    with pool_of(raise_at_two) as pool:
        workers = children()
        with pytest.raises(ZeroDivisionError, match="at two") as caught:
            pool.evaluate(numbered(3))
        cause = caught.value.__cause__
        assert isinstance(cause, WorkerError)
        assert "member 2, in its worker" in str(cause)
        assert 'raise ZeroDivisionError("at two")' in str(cause)
        assert pool.evaluate(numbered(2)).tolist() == [0, 1]
        with pytest.raises(WorkerError, match=r"(?s)member 0.*OwnError: this and that"):
            pool.evaluate(numbered(4)[3:])
        with pytest.raises(WorkerError, match=r"(?s)member 0.*SystemExit: 5"):
            pool.evaluate(numbered(5)[4:])
        assert pool.evaluate(numbered(2)).tolist() == [0, 1]
        assert children() == workers


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), 9), lambda: os._exit(3)])
def test_a_worker_that_dies_is_replaced_and_its_member_tried_again(tmp_path, end):
    flag = tmp_path / "died"

    def die_once(net):
        index = int(first_parameter(net))
        if index == 3 and not flag.exists():
            flag.touch()
            end()
        return index

    with pool_of(die_once) as pool:
        assert pool.evaluate(numbered(6)).tolist() == list(range(6))
        assert pool.replaced == 1
        assert len(children()) >= 2


def test_a_member_that_kills_every_worker_is_named():
    def die(net):
        index = int(first_parameter(net))
        if index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return index

    with pool_of(die, retries=2) as pool:
        with pytest.raises(RuntimeError, match=r"member 1: .* \(killed by SIGUSR1\) at .* 3 tries"):
            pool.evaluate(numbered(3))
        assert pool.replaced == 3
        assert pool.evaluate(numbered(1)).tolist() == [0]


def test_idle_workers_that_are_killed_are_replaced():
    with pool_of(first_parameter) as pool:
        for _ in range(2):
            assert pool.evaluate(numbered(4)).tolist() == [0, 1, 2, 3]
            for worker in pool._workers:
                os.kill(worker.process.pid, signal.SIGKILL)
                worker.process.join()  # else it may still take a member with it
        assert pool.evaluate(numbered(4)).tolist() == [0, 1, 2, 3]


def hang_at_one(net):
    index = int(first_parameter(net))
    if index == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return index


def test_an_evaluation_that_hangs_is_cut_off():
    with pool_of(hang_at_one, timeout=1.0) as pool:
        with pytest.raises(TimeoutError, match=r"member 1: evaluation took longer than 1\.0 s"):
            pool.evaluate(numbered(3))
        assert pool.replaced == 1
        assert pool.evaluate(numbered(1)).tolist() == [0]
    with pool_of(hang_at_one, timeout=1.0, on_timeout="nan") as pool:
        values = pool.evaluate(numbered(6))
        assert values.isnan().tolist() == [False, True, False, False, False, False]
        assert values[2:].tolist() == [2, 3, 4, 5]


def test_waiting_costs_no_processor_time():
    def slow(net):
        time.sleep(0.5)
        return 0

    with pool_of(slow, timeout=600) as pool:
        pool.evaluate(numbered(1))
        before = time.process_time()
        pool.evaluate(numbered(4))
        assert time.process_time() - before < 0.1


def test_an_interrupt_kills_what_is_running_and_the_pool_goes_on():
    """Ctrl-C goes to the whole group of processes; workers leave it to the caller."""

    def hang(net):
        if int(first_parameter(net)) == 1:
            time.sleep(600)
        return 0

    with pool_of(hang) as pool:
        pool.evaluate(numbered(1))
        for worker in pool._workers:  # some of which may be starting
            os.kill(worker.process.pid, signal.SIGINT)
        while not all(worker.ready for worker in pool._workers):
            pool.evaluate(numbered(1))
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.evaluate(numbered(3))
        finally:
            timer.cancel()
        assert pool.replaced == 1
        assert pool.evaluate(numbered(1)).tolist() == [0]


def test_arguments_are_checked():
    net = Net()
    for options, error, message in [
        ({"workers": 0}, ValueError, "workers must be at least 1, got 0"),
        ({"workers": 1.5}, TypeError, r"workers must be an integer, got 1\.5"),
        ({"retries": -1}, ValueError, "retries must be at least 0, got -1"),
        ({"timeout": 0}, ValueError, "timeout must be None or seconds greater than 0, got 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be None or seconds"),
        ({"on_timeout": "skip"}, ValueError, 'on_timeout must be "raise" or "nan"'),
        ({"start_method": "thread"}, ValueError, "start_method must be one of"),
        ({"device": "cuda"}, ValueError, 'start_method must be "spawn" with CUDA, got "fork"'),
        ({"device": []}, ValueError, "got an empty one"),
        ({"threads": 2}, ValueError, "threads must be 1 with start_method='fork'"),
    ]:
        with pytest.raises(error, match=message):
            pool_of(loss, net, **options)
    with pytest.raises(TypeError, match="function must be callable, got int"):
        pool_of(3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        pool_of(loss, loss)
    with pytest.raises(ValueError, match="model must have a parameter that requires grad"):
        pool_of(loss, net.requires_grad_(False))
    assert not children()


def test_members_are_checked():
    net = Net()
    with pool_of(loss, net, workers=1) as pool:
        for function in (pool.evaluate, lambda m: evaluate_one_by_one(loss, net, m)):
            with pytest.raises(ValueError, match=r"\(P, N\) with N = 12, .*, got \(3, 11\)"):
                function(torch.zeros(3, 11))
            with pytest.raises(ValueError, match=r"= \(12,\), got \(4,\) as member 1"):
                function([torch.zeros(12), torch.zeros(4)])
            with pytest.raises(TypeError, match=r"floating-point, got torch\.int64"):
                function(torch.zeros(3, 12, dtype=torch.int64))
            with pytest.raises(TypeError, match="iterable of vectors, got int"):
                function(3)


# ---- processes and memory ----------------------------------------------------------------------


def test_closing_ends_the_processes_and_is_final():
    pool = pool_of(loss)
    pids = children()
    pool.close()
    pool.close()
    assert not children() & pids
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.evaluate(members(1))


def test_a_pool_that_is_dropped_ends_its_processes():
    pool = pool_of(loss)
    pool.evaluate(members(2))
    assert children()
    del pool
    assert not children()


def test_shared_memory_goes_with_its_last_user():
    def maps():
        return Path("/proc/self/maps").read_text().count("memfd:perturbed")

    memory = SharedMemory(1 << 16)
    tensor = memory.matrix(4, 8, torch.float64)
    tensor.fill_(3)
    assert memory.matrix(2, 16, torch.float64).eq(3).all()
    assert maps() == 1
    descriptor = memory.descriptor
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert tensor.eq(3).all()
    del tensor
    assert maps() == 0
    assert not [name for name in os.listdir("/dev/shm") if "perturbed" in name]


PROGRAM = """
import os, sys, time, torch, perturbed
def loss(net):
    if os.environ.get("HANG"):
        print(os.getpid(), flush=True)
        time.sleep(600)
    return 1.0
pool = perturbed.WorkerPool(loss, torch.nn.Linear(2, 1), workers=1, start_method="fork")
print(pool.evaluate(torch.zeros(3, 3)).tolist(), pool._workers[0].process.pid)
"""


def run(program, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    return False


def test_a_program_that_forgets_to_close_ends_cleanly():
    process = run(PROGRAM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""
    assert out.startswith("[1.0, 1.0, 1.0]")
    assert not alive(int(out.split()[-1]))


def own_a_pool(end):
    pool = pool_of(loss)
    pool.evaluate(members(4))
    end.send([w.process.pid for w in pool._workers])
    time.sleep(600)


def test_workers_leave_when_their_caller_is_killed():
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    caller = context.Process(target=own_a_pool, args=(theirs,))
    caller.start()
    pids = mine.recv()
    assert len(pids) == 2
    assert all(map(alive, pids))
    caller.kill()
    caller.join()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


# ---- spawned workers ---------------------------------------------------------------------------


def test_spawned_workers_have_copies():
    """What multiprocessing pickles itself it would share: the module's own memory."""
    net = Net()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with WorkerPool(loss, net, workers=1) as pool:
        assert torch.equal(pool.evaluate(members(6)), evaluate_one_by_one(loss, net, members(6)))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(p.is_shared() for p in net.parameters())


def test_what_does_not_pickle_is_refused_before_any_process_starts():
    net = Net()
    net.hook = lambda: 0
    with pytest.raises(TypeError, match="function must be picklable with start_method='spawn'"):
        WorkerPool(lambda model: 0.0, Net())
    with pytest.raises(TypeError, match="model must be picklable with start_method='forkserver'"):
        WorkerPool(loss, net, start_method="forkserver")


@pytest.mark.slow
def test_a_worker_that_cannot_load_its_function_says_so():
    program = """
import perturbed, torch
def loss(net):
    return 0.0
if __name__ == "__main__":
    with perturbed.WorkerPool(loss, torch.nn.Linear(2, 1), workers=1) as pool:
        pool.evaluate(torch.zeros(1, 3))
"""
    process = run(program)  # python -c: a spawned worker cannot import what stands here
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "RuntimeError: a worker could not load function and model" in err
    assert "Can't get attribute 'loss'" in err


@pytest.mark.slow
def test_a_program_without_a_guard_is_told_so(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import perturbed, torch\n"
        "def loss(net):\n    return 0.0\n"
        "pool = perturbed.WorkerPool(loss, torch.nn.Linear(2, 1), workers=1)\n"
        "pool.evaluate(torch.zeros(1, 3))\n"
    )
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=100,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(perturbed.__path__[0]).parent),
        },
    )
    assert done.returncode == 1
    assert "needs `if __name__ == '__main__':`" in done.stderr


@pytest.mark.cuda
def test_workers_on_cuda():
    net = Net()
    expected = evaluate_one_by_one(on_device, net, members(6))
    with WorkerPool(on_device, net, workers=2, device=["cuda:0"]) as pool:
        values = pool.evaluate(members(6).cuda())
    torch.testing.assert_close(values, expected)
