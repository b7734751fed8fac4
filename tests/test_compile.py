"""torch.compile: one graph for all draws, with the results of eager mode."""

import copy

import pytest
import torch
from torch import nn
from zoo import KINDS, D, inputs, population, same

import perturbed
from perturbed import Dense, LowRank, Permuted, PerturbedModel, SignFlip, Sparse
from perturbed.noise import dense

each_noise = pytest.mark.parametrize("noise", [Dense(), Dense("rademacher")], ids=str)
each_repeats = pytest.mark.parametrize("repeats", [2, dense.GEMM_ROWS], ids=["kernel", "products"])

# Where tracing ends is decided by us; a surprise may have put a draw's numbers into the graph.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "error:Dynamo does not know how to trace"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that runs the graph through AOTAutograd and counts how many it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def compile(self, function, **options):
        return torch.compile(function, backend=self, **{"fullgraph": True, **options})


def draws(pm):
    """Eight draws that differ in everything that may change between steps."""
    for step in range(8):
        if step == 4:
            pm.set_seed(step)
        pm.set_noise(0.1 * (1 + step))
        if step == 6:
            pm.set_noise_scale(0.25)
        yield step


def assert_compiles_once(pm, compiled, eager, counter):
    """Ahead of time the compiler may trace a graph twice; a draw must never make it start again."""
    seen = []
    for step in draws(pm):
        got, expected = compiled(), eager()
        same(got, expected)
        assert not any(torch.allclose(got, before) for before in seen)
        seen.append(got)
        if step == 0:
            graphs = counter.graphs
    assert counter.graphs == graphs > 0


@each_noise
@each_repeats
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_base_model_in_the_block(noise, repeats, grad):
    net, pm = population(noise=noise)
    counter = Counter()
    fast = counter.compile(net)
    x = inputs(repeats)

    def run(function):
        with torch.set_grad_enabled(grad), pm.perturbed():
            return function(x)

    assert_compiles_once(pm, lambda: run(fast), lambda: run(net), counter)
    graphs = counter.graphs
    same(fast(x), net(x))  # without noise it is another graph, and the first is not lost
    same(run(fast), run(net))
    assert counter.graphs > graphs


@each_noise
@each_repeats
@torch.no_grad()
def test_the_perturbed_model_itself(noise, repeats):
    _, pm = population(noise=noise)
    counter = Counter()
    fast = counter.compile(pm)
    x = inputs(repeats)
    assert_compiles_once(pm, lambda: fast(x), lambda: pm(x), counter)


OTHERS = [LowRank(2), Sparse(2), Permuted("in"), Permuted("both"), SignFlip("both", bases=2)]


@pytest.mark.parametrize("noise", OTHERS, ids=str)
@torch.no_grad()
def test_the_other_families(noise):
    test_the_perturbed_model_itself(noise, 2)


@each_noise
@pytest.mark.parametrize("rows", [3, 30])
@torch.no_grad()
def test_replicated_rows(noise, rows):
    _, pm = population(noise=noise)
    counter = Counter()
    fast = counter.compile(lambda x: pm(x).square().mean(1))
    x = pm.replicate(inputs(8)[:rows])
    assert_compiles_once(pm, lambda: fast(x), lambda: pm(x).square().mean(1), counter)


@torch.no_grad()
def test_a_fused_layer_calls_its_parts_when_compiled_too():
    kind = KINDS["transformer"]
    _, pm = kind.convert()
    counter = Counter()
    fast = counter.compile(pm)
    (x,), _ = kind.arguments(2 * D)
    assert_compiles_once(pm, lambda: fast(x), lambda: pm(x), counter)
    same(fast(x)[1], pm.member(1)(x[1:2])[0])


@pytest.mark.parametrize("repeats", [2, 24])
@torch.no_grad()
def test_stored_noise_that_was_allocated(repeats):
    _, pm = population(noise=Dense(storage="stored"))
    counter = Counter()
    fast = counter.compile(pm)
    x = inputs(repeats)
    graphs = []
    for _ in draws(pm):
        pm.allocate_memory()
        same(fast(x), pm(x))
        graphs.append(counter.graphs)
    assert len(set(graphs)) == 1


@torch.no_grad()
def test_stored_noise_that_was_not_allocated():
    _, pm = population(noise=Dense(storage="stored"))
    fast = Counter().compile(pm, fullgraph=False)
    x = inputs()
    for _ in draws(pm):
        got = fast(x)
        same(got, pm(x))


@each_repeats
def test_gradients(repeats):
    net, pm = population()
    x = inputs(repeats).requires_grad_()
    direction = torch.randn(len(x), 3)
    grads = []
    for function in (pm, Counter().compile(pm)):
        loss = (function(x) * direction).sum()
        grads.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    for eager, fast in zip(*grads, strict=True):
        same(fast, eager)


@pytest.mark.parametrize(
    "sizes", [(2, 4, 8), pytest.param((24, 6, 26), marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_batches_of_other_sizes(sizes):
    _, pm = population()
    fast = Counter().compile(pm, dynamic=True)
    for repeats in sizes:
        x = inputs(repeats)
        same(fast(x), pm(x))
    with pytest.raises(ValueError, match="R"):
        torch.compile(pm, backend="eager")(inputs()[:3])


BEFORE = {
    "free_memory": lambda pm: (pm.free_memory(), pm)[1],
    "deepcopy": copy.deepcopy,
    "move": lambda pm: pm.float().double(),
    "move_of_the_base": lambda pm: (pm.model.float().double(), pm)[1],
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("what", ["pm", "net"])
@torch.no_grad()
def test_the_numbers_of_a_draw_are_never_part_of_the_graph(before, what):
    """Where the draw's tensors have to be made anew, they are made outside of it."""
    _, pm = population()
    pm = BEFORE[before](pm)
    x = inputs()
    function = Counter().compile(pm if what == "pm" else pm.model, fullgraph=False)
    for _ in range(3):
        if what == "pm":
            got = function(x)
        else:
            with pm.perturbed():
                got = function(x)
        same(got, pm(x))
        pm.set_noise()
        if before == "free_memory":
            pm.free_memory()


@torch.no_grad()
def test_an_exception_in_compiled_code_switches_the_noise_off():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x, fail: bool):
            y = self.fc(x)
            if fail:
                raise KeyError("on purpose")
            return y

    net = perturbed.convert(Net(), D)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    fast = torch.compile(pm, backend="eager")
    x = torch.randn(2 * D, 6)
    with pytest.raises(KeyError, match="on purpose"):
        fast(x, True)
    assert not pm.state.active
    torch.testing.assert_close(fast(x, False), pm(x, False))
    assert not pm.state.active


@pytest.mark.slow
@torch.no_grad()
def test_the_default_backend():
    _, pm = population()
    fast = torch.compile(pm, fullgraph=True)
    x = inputs()
    for _ in draws(pm):
        same(fast(x), pm(x))
        same(fast(pm.replicate(x[:3])), pm(pm.replicate(x[:3])))
