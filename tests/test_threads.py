"""Several Python threads: each with a model of its own, and two that want the same one."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.backends import mha
from trainers import TRAINERS
from zoo import KINDS, inputs, population

import perturbed
from perturbed.testing import assert_bitwise_equal

SECONDS = 60  # until a thread that waits for another gives up


@pytest.fixture
def often_switched():
    """Threads take turns every 0.1 ms instead of every 5 ms: races that there are, show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def side_by_side(*functions):
    """Run functions in a thread each, all begun at once; return results, or raise what one did."""
    start = threading.Barrier(len(functions), timeout=SECONDS)
    results: list = [None] * len(functions)

    def run(i):
        torch.set_num_threads(1)
        try:
            start.wait()
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Visit:
    """Another thread that is in a block of ours until told to leave."""

    def __init__(self, block):
        self.entered, self.told = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(block,))
        self.thread.start()
        assert self.entered.wait(SECONDS)

    def _run(self, block):
        with block:
            self.entered.set()
            assert self.told.wait(SECONDS)

    def leave(self):
        self.told.set()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


# ---- a model each --------------------------------------------------------------------------------


@pytest.mark.usefixtures("often_switched")
def test_all_trainers_at_once_give_the_bits_of_one_after_the_other():
    runs = [lambda make=make: make(0).steps(4).state() for make in TRAINERS.values()]
    alone = [run() for run in runs]
    together = side_by_side(*runs, *runs)  # each twice: what is shared by accident shows
    assert dict(zip(TRAINERS, together[: len(runs)], strict=True)) == dict(
        zip(TRAINERS, alone, strict=True)
    )
    assert together[len(runs) :] == alone


@pytest.mark.usefixtures("often_switched")
@pytest.mark.filterwarnings("ignore:convert left")
def test_families_and_layers_at_once():
    # torch's own generator, which makes the inputs, is one for all threads.
    prepared = []
    for kind in KINDS.values():
        torch.manual_seed(0)
        _, pm = kind.convert()
        args, kwargs = kind.arguments(8)
        prepared.append((kind, pm, args, kwargs))

    def forwards(kind, pm, args, kwargs):
        with torch.no_grad():
            outputs = [kind.call(pm, args, kwargs) for _ in range(3)]
        return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(outputs)])

    runs = [lambda case=case: forwards(*case) for case in prepared]
    alone = [run() for run in runs]
    for together, expected in zip(side_by_side(*runs), alone, strict=True):
        assert_bitwise_equal(together, expected)


def test_the_switch_of_fused_layers_outlasts_the_block_of_another_thread():
    """torch's switch is one for the process; the first to leave must not put it back."""
    net, pm = KINDS["transformer"].convert()
    _, other = KINDS["transformer"].convert()
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    assert mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = pm(x)
        visit = Visit(other.perturbed())
        with pm.perturbed():
            visit.leave()
            assert_bitwise_equal(net(x), expected)
        assert mha.get_fastpath_enabled()
        visit = Visit(pm.perturbed())
        with other.perturbed():
            pass
        assert not mha.get_fastpath_enabled()
        visit.leave()
    assert mha.get_fastpath_enabled()


# ---- one model, two threads ----------------------------------------------------------------------

ENTRIES = {
    "forward": lambda pm: pm(inputs()),
    "block": lambda pm: pm.perturbed().__enter__(),
    "window": lambda pm: pm.window(0, 2).__enter__(),
    "set_noise": lambda pm: pm.set_noise(),
    "set_seed": lambda pm: pm.set_seed(3),
    "set_noise_scale": lambda pm: pm.set_noise_scale(0.1),
    "free_memory": lambda pm: pm.free_memory(),
    "load_state_dict": lambda pm: pm.load_state_dict(pm.state_dict()),
    "step": lambda pm: make_nes(pm).step(lambda: pm(inputs()).square().mean(1)),
}


def make_nes(pm):
    return perturbed.NES(pm, torch.optim.SGD(pm.model.parameters(), 0.1))


@pytest.mark.parametrize("block", ["perturbed", "window"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_second_thread_is_refused(entry, block):
    _, pm = population()
    x, draw = inputs(), pm.get_extra_state()
    expected = pm(x)
    visit = Visit(pm.perturbed() if block == "perturbed" else pm.window(0, pm.population))
    try:
        with pytest.raises(RuntimeError, match="in use by another thread"):
            ENTRIES[entry](pm)
    finally:
        visit.leave()
    assert pm.get_extra_state() == draw
    assert not pm.state.active
    assert_bitwise_equal(pm(x), expected)


@pytest.mark.parametrize("stepper", ["nes", "pso", "snes", "rdsa", "pso of a function"])
def test_two_steps_at_once_are_refused_and_one_goes_on(stepper):
    """A second step in the middle of the first raises; the first ends as if it had been alone."""

    def make():
        torch.manual_seed(1)
        net = nn.Linear(3, 1)
        if stepper == "pso of a function":
            return None, perturbed.PSO(net, particles=4, seed=0)
        noise = None if stepper in ("nes", "rdsa") else perturbed.Explicit()
        perturbed.convert(net, 4, noise)
        pm = perturbed.PerturbedModel(net, 4, antithetic=stepper == "rdsa" or None)
        if stepper == "nes":
            return pm, make_nes(pm)
        kinds = {"pso": perturbed.PSO, "snes": perturbed.SNES, "rdsa": perturbed.optim.RDSA}
        return pm, kinds[stepper](pm)

    def losses(pm, net=None):
        if pm is None:
            return float(net(torch.ones(2, 3)).square().mean())
        return pm(pm.replicate(torch.ones(2, 3))).square().mean(1)

    pm, alone = make()
    for _ in range(2):
        alone.step(lambda *net: losses(pm, *net))
    pm, optimizer = make()
    errors = []

    def interrupted(*net):
        def step():
            try:
                optimizer.step(lambda *net: losses(pm, *net))
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=step)
        thread.start()
        thread.join(SECONDS)
        return losses(pm, *net)

    optimizer.step(interrupted)
    optimizer.step(lambda *net: losses(pm, *net))
    assert errors
    assert all("in use by another thread" in error for error in errors)
    model = alone.pm.model if stepper in ("nes", "rdsa") else alone._module()
    other = optimizer.pm.model if stepper in ("nes", "rdsa") else optimizer._module()
    for expected, actual in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise_equal(actual.detach(), expected.detach())


def test_ask_and_tell_may_be_in_different_threads():
    _, pm = population()
    nes = make_nes(pm)
    side_by_side(nes.ask)
    (values,) = side_by_side(lambda: pm(inputs()).square().mean(1))
    side_by_side(lambda: nes.tell(values))
    assert nes.steps == 1


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_is_free(through):
    _, pm = population()
    with pm.perturbed():
        twin = copy.deepcopy(pm) if through == "deepcopy" else pickle.loads(pickle.dumps(pm))
        (there,) = side_by_side(lambda: twin(torch.ones(8, 6, dtype=torch.float64)))
    assert_bitwise_equal(there, pm(torch.ones(8, 6, dtype=torch.float64)))


def test_a_thread_may_enter_again():
    _, pm = population()
    x = inputs()
    expected = pm(x)
    with pm.perturbed(), pm.window(0, pm.population), pm.perturbed():
        assert_bitwise_equal(pm(x), expected)
