"""Peak memory against tensors counted by hand, sizes, and the advice in errors of allocators."""

import pytest
import torch
from torch import nn
from zoo import D, population

import perturbed
from perturbed import NES, Dense, Explicit, PerturbedModel
from perturbed.memory import PeakMemory, is_out_of_memory, to_bytes, with_advice

CPU = torch.device("cpu")
KB = 1000  # bytes of 250 float32


def peak(function) -> int:
    with PeakMemory(CPU) as memory:
        function()
    return memory.peak


# ---- counted by hand -----------------------------------------------------------------------------


def test_what_lives_at_a_time_counts():
    def function():
        a = torch.empty(250)  # 1
        b = a + 1  # 2
        del a  # 1
        c = torch.empty(500)  # 3
        del b, c  # 0
        return torch.empty(250)  # 1

    assert peak(function) == 3 * KB


def test_views_and_writes_in_place_take_nothing():
    before = torch.zeros(250)

    def function():
        before.view(10, 25).t().unsqueeze(0).expand(4, 25, 10)
        before.add_(1).mul_(2)
        torch.add(before, 1, out=before)
        torch.ops.aten._unsafe_view(before, [25, 10])
        before.numpy()
        a = torch.empty(250)  # 1
        a.view(5, 50)[2:4].fill_(3)
        torch._foreach_add_([a, before], 1)
        a.copy_(before)

    assert peak(function) == KB


def test_results_of_several_tensors():
    x = torch.randn(250)
    assert peak(lambda: x.sort()) == KB + 250 * 8
    assert peak(lambda: x.split(50)) == 0
    assert peak(lambda: torch._foreach_add([x, x], 1)) == 2 * KB


def test_what_outlives_the_block_is_forgotten_in_silence():
    kept = []
    with PeakMemory(CPU) as memory:
        kept.append(torch.empty(250))
    kept.clear()
    assert memory.peak == KB
    with memory:
        torch.empty(250)
    assert memory.peak == KB


def test_freed_addresses_are_counted_again():
    def function():
        for _ in range(100):
            torch.empty(250)
        held = [torch.empty(250) for _ in range(7)]
        return len(held)

    assert peak(function) == 7 * KB


def test_other_devices_and_layouts_do_not_count():
    assert peak(lambda: torch.empty(10**12, device="meta") + 1) == 0
    assert peak(lambda: torch.eye(3).to_sparse()) < KB


def test_graphs_of_autograd_hold_what_they_saved():
    x = torch.randn(250, requires_grad=True)

    def function():
        y = (x.exp() * 2).sin()  # exp's result, its double, and the sine
        y.sum().backward()

    with_graph = peak(function)
    with torch.no_grad():
        without = peak(lambda: (x.exp() * 2).sin())
    assert without == 2 * KB
    assert with_graph >= 3 * KB


def test_transforms_of_functions():
    x = torch.randn(10, 25)
    assert peak(lambda: torch.func.vmap(lambda row: (row * 2).sin())(x)) == 2 * KB
    assert peak(lambda: torch.func.grad(lambda x: x.sin().sum())(x)) >= KB


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_functions_are_seen(fullgraph):
    torch._dynamo.reset()
    x = torch.randn(250)
    compiled = torch.compile(lambda x: (x.sin() + 1).cos(), backend="eager", fullgraph=fullgraph)
    assert peak(lambda: compiled(x)) == 2 * KB
    expected = compiled(x)
    assert peak(lambda: compiled(x)) == 2 * KB
    assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()


# ---- forwards of a population --------------------------------------------------------------------


@pytest.mark.parametrize("short", [True, False])
def test_replicated_rows(short):
    """The short form holds no rows; what is made of its source counts."""
    pm = PerturbedModel(perturbed.convert(nn.Linear(25, 50), 10), 10)
    pm.set_noise()
    x = torch.randn(10, 25)  # 1 KB; 200 rows of it are 20

    def function():
        rows = pm.replicate(x)
        rows = rows * 2 if short else rows.full()
        pm(rows)

    with torch.no_grad():
        taken = peak(function)
    out = 200 * 50 * 4
    base = 10 * 50 * 4
    assert taken == (KB + base + out if short else 20 * KB + out)


def test_stored_noise_counts():
    layer = nn.Linear(50, 50)
    pm = PerturbedModel(perturbed.convert(layer, 10, Dense(storage="stored")), 10)
    pm.set_noise()
    with torch.no_grad():
        assert peak(lambda: pm(torch.randn(20, 50))) >= 10 * layer.weight.nbytes


def test_convolutions():
    pm = PerturbedModel(perturbed.convert(nn.Conv2d(3, 8, 3, padding=1), 4), 4)
    pm.set_noise()
    x = torch.randn(8, 3, 16, 16)
    out = 8 * 8 * 16 * 16 * 4
    with torch.no_grad():
        assert out <= peak(lambda: pm(x)) < 4 * out


def test_members_that_are_given():
    pm = PerturbedModel(perturbed.convert(nn.Linear(25, 10), 10, Explicit()), 10)
    pm.set_members({"weight": torch.randn(10, 10, 25), "bias": torch.randn(10, 10)})
    with torch.no_grad():
        assert peak(lambda: pm(pm.replicate(torch.randn(5, 25)))) >= 50 * 10 * 4


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (1e9, 10**9),
        ("17", 17),
        ("4 GB", 4 * 10**9),
        ("4GiB", 2**32),
        (" 0.5 MB ", 500_000),
        ("1e3 KiB", 1024_000),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes(value, size):
    assert to_bytes("max_memory", value) == size


@pytest.mark.parametrize(
    "value",
    [
        "",
        "GB",
        "4 gb",
        "4 XB",
        "four GB",
        "4 GB GB",
        "nan",
        "-1 GB",
        "inf",
        0,
        -3,
        0.5,
        float("nan"),
        float("inf"),
    ],
)
def test_sizes_that_are_none(value):
    with pytest.raises(ValueError, match=r"max_memory must be .* got"):
        to_bytes("max_memory", value)


@pytest.mark.parametrize("value", [True, None, [4], torch.tensor(4)])
def test_sizes_of_another_type(value):
    with pytest.raises(TypeError, match="max_memory must be a number of bytes"):
        to_bytes("max_memory", value)


# ---- when there is not enough --------------------------------------------------------------------


def absurd() -> None:
    torch.empty(1 << 60)


def test_what_an_allocator_raises_is_known():
    with pytest.raises(RuntimeError) as caught:
        absurd()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_advice_keeps_the_kind_of_error():
    error = with_advice(torch.OutOfMemoryError("no"), "do this")
    assert type(error) is torch.OutOfMemoryError
    assert type(with_advice(MemoryError("no"), "do this")) is RuntimeError
    assert str(error) == "no\ndo this"


class Greedy(nn.Module):
    """A layer, and an activation that no machine holds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        absurd()
        return self.layer(x)


@pytest.mark.parametrize(("storage", "says"), [("stored", True), ("regenerate", False)])
def test_forwards_outside_of_an_optimizer_advise(storage, says):
    pm = PerturbedModel(perturbed.convert(Greedy(), D, Dense(storage=storage)), D)
    pm.set_noise()
    with pytest.raises(
        RuntimeError, match=rf"(?s)allocate.*{D} directions; .*pm\.window"
    ) as caught:
        pm(torch.zeros(2 * D, 6))
    assert ("storage='regenerate' holds none" in str(caught.value)) == says
    assert not pm.state.active
    assert caught.value.__cause__ is not None


def test_noise_that_cannot_be_held():
    """2^20 directions of 2^20 x 2^10 weights, which nobody holds; none of them is drawn."""
    with torch.device("meta"):
        layer = nn.Linear(1 << 10, 1 << 20, bias=False)
    layer = perturbed.convert(layer, 1 << 20, Dense(storage="stored"))
    layer.weight = nn.Parameter(torch.zeros(()).expand(1 << 20, 1 << 10))
    pm = PerturbedModel(layer, 1 << 20)
    pm.set_noise()
    with pytest.raises(RuntimeError, match="storage='regenerate' holds none"):
        pm.allocate_memory()
    with pytest.raises(RuntimeError, match="storage='regenerate' holds none"):
        pm(torch.zeros(1, 1 << 10).expand(1 << 20, -1))


def nes(**options):
    net, pm = population(noise=None)
    return pm, NES(pm, torch.optim.SGD(net.parameters(), 0.1), **options)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, rf"{D} directions in a forward.*chunk= .*max_memory=.*pm\.replicate inside"),
        ({"chunk": 2}, r"2 directions in a forward.*smaller chunk="),
        ({"chunk": 1}, r"1 directions? in a forward.*fewer or shorter rows"),
    ],
)
@pytest.mark.parametrize("kind", ["cpu", "cuda", "numpy"])
def test_closures_that_run_out_of_memory(options, advice, kind):
    pm, optimizer = nes(**options)
    optimizer.step(lambda: pm(torch.randn(2 * pm.directions, 6).double()).mean(1))
    draw = pm.get_extra_state()
    before = [p.clone() for p in pm.model.parameters()]

    def closure():
        pm(torch.randn(2 * pm.directions, 6).double())
        if kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if kind == "numpy":
            raise MemoryError("Unable to allocate 8.00 EiB")
        absurd()

    error = torch.OutOfMemoryError if kind == "cuda" else RuntimeError
    with pytest.raises(error, match=f"(?s){advice}") as caught:
        optimizer.step(closure)
    assert type(caught.value) is error
    assert pm.get_extra_state() == draw
    assert all(torch.equal(p, q) for p, q in zip(pm.model.parameters(), before, strict=True))
    assert pm.directions == D


def test_other_errors_are_left_alone():
    pm, optimizer = nes(max_memory="1 GB")
    for error in (RuntimeError("size mismatch"), KeyError("x")):

        def closure(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            optimizer.step(closure)
        assert caught.value is error
        assert pm.directions == D
