"""Other processes: fork after threads were started, spawn, shared tensors, loader workers."""

import copy
import multiprocessing
import pickle

import pytest
import torch
import trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset

import perturbed
from perturbed.description import digest
from perturbed.testing import assert_bitwise_equal

SECONDS = 120  # until a process counts as hung
METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def two_threads():
    """Kernels of this process run on two threads, whose pool exists: what a fork breaks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _, pm, x = wide()
    pm(x)
    yield
    torch.set_num_threads(before)


def wide(noise=None):
    """A layer that is worth two threads, its population and a batch."""
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.01)
    perturbed.convert(net, 32, noise)
    pm = perturbed.PerturbedModel(net, 32, sigma=0.1, seed=3)
    pm.set_noise()
    return net, pm, torch.linspace(-1, 1, 64 * 64).view(64, 64)


def in_process(method, function, *arguments):
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS), "the process hangs"
        result = ours.recv()
    finally:
        process.kill()
        process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _send(connection, function, arguments):
    # As DataLoader's workers and WorkerPool do: the threads of OpenMP do not survive a fork, and
    # the first operator that wants two, of torch or of ours, would wait for them for ever.
    torch.set_num_threads(1)
    try:
        connection.send(function(*arguments))
    except BaseException as error:
        connection.send(error)


def forward(pm, x):
    return pm(x).detach().numpy()


def train(half, steps):
    """Digest of a NES run that goes on from a pickled model and state."""
    pm, state = pickle.loads(half)
    nes = perturbed.NES(pm, torch.optim.Adam(pm.model.parameters(), 0.05))
    nes.load_state_dict(state)
    x = torch.linspace(-1, 1, 64 * 4).view(4, 64)
    for _ in range(steps):
        nes.step(lambda: pm(pm.replicate(x)).square().mean(1))
    return digest({"model": pm.model.state_dict(), "nes": nes.state_dict()})


@pytest.mark.usefixtures("two_threads")
@each_method
@pytest.mark.parametrize("noise", [perturbed.Dense(), perturbed.Permuted()], ids=str)
def test_a_forward_elsewhere_gives_the_same_bits(method, noise):
    _, pm, x = wide(noise)
    there = torch.from_numpy(in_process(method, forward, pm, x))
    torch.set_num_threads(1)
    assert_bitwise_equal(there, pm(x).detach())


@pytest.mark.usefixtures("two_threads")
def test_a_fork_in_the_middle_of_a_block():
    """The child is in the block, too; what it does there does not reach the parent."""
    _, pm, x = wide()
    torch.set_num_threads(1)
    expected = pm(x)

    def child():
        with pm.perturbed():
            here = pm.model(x)
        pm.set_noise()
        return here.detach().numpy(), pm(x).detach().numpy()

    with pm.perturbed():
        here, later = (torch.from_numpy(a) for a in in_process("fork", child))
        assert_bitwise_equal(here, expected)
        assert_bitwise_equal(pm.model(x), expected)
    assert pm.state.generation == 0
    pm.set_noise()
    assert_bitwise_equal(later, pm(x))


@pytest.mark.usefixtures("two_threads")
@each_method
def test_training_goes_on_elsewhere(method):
    """A model that pickles in the middle of a run, and the optimizer's state beside it."""
    _, pm, _ = wide()
    nes = perturbed.NES(pm, torch.optim.Adam(pm.model.parameters(), 0.05))
    x = torch.linspace(-1, 1, 64 * 4).view(4, 64)
    nes.step(lambda: pm(pm.replicate(x)).square().mean(1))
    half = pickle.dumps((pm, nes.state_dict()))
    assert in_process(method, train, half, 3) == train(half, 3)


def train_in_place(net, pm):
    pm.share_memory()  # what it is already; the noise is drawn again
    nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), 0.5))
    for _ in range(3):
        nes.step(lambda: pm(pm.replicate(torch.ones(2, 64))).square().mean(1))
    return nes.steps


@pytest.mark.usefixtures("two_threads")
@each_method
def test_parameters_in_shared_memory(method):
    """A child trains the parent's own parameters, as Hogwild does."""
    net, pm, _ = wide()
    expected = copy.deepcopy(pm)
    pm.share_memory()
    assert all(p.is_shared() for p in net.parameters())
    torch.set_num_threads(1)
    context = torch.multiprocessing.get_context(method)
    process = context.Process(target=_train_shared, args=(net, pm))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    train_in_place(expected.model, expected)
    for ours, theirs in zip(net.parameters(), expected.model.parameters(), strict=True):
        assert_bitwise_equal(ours.detach(), theirs.detach())


def _train_shared(net, pm):
    torch.set_num_threads(1)
    train_in_place(net, pm)


class Scored(Dataset):
    """Examples that a worker makes with a population: entry i is what its members say of i."""

    def __init__(self, pm):
        self.pm = pm

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.full((64, 64), float(i))
        return self.pm(x).detach().sum(1)


@pytest.mark.usefixtures("two_threads")
@each_method
def test_workers_of_a_loader(method):
    _, pm, _ = wide()
    data = Scored(pm)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    there = torch.cat(list(loader))
    torch.set_num_threads(1)
    assert_bitwise_equal(there, torch.stack([data[i] for i in range(6)]))


def score(net):
    _, pm, x = wide()
    return float(pm(x).mean()) + float(net(torch.ones(1, 3)).sum())


@pytest.mark.usefixtures("two_threads")
@each_method
def test_a_pool_whose_function_uses_the_package(method):
    net = trainers.network(0)
    members = torch.randn(5, sum(p.numel() for p in net.parameters()))
    with perturbed.WorkerPool(score, net, workers=2, start_method=method) as pool:
        there = pool.evaluate(members)
    torch.set_num_threads(1)
    from perturbed.candidate import evaluate_one_by_one

    assert_bitwise_equal(there, evaluate_one_by_one(score, net, members))
