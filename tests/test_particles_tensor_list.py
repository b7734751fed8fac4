"""TensorList: each operator against the same operator on each tensor."""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from perturbed.particles import TensorList, multi_copy
from perturbed.testing import devices

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3,), (2, 3), (), (0, 4), (5, 1, 2)]
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow]
NAMES = [f.__name__ for f in OPERATORS]


def make(dtype=torch.float32, device="cpu", seed=0):
    """Positive numbers: every operator is defined on them."""
    g = torch.Generator().manual_seed(seed)
    return TensorList((torch.rand(s, generator=g) + 0.5).to(device, dtype) for s in SHAPES)


def operands(dtype, device):
    n = len(SHAPES)
    return {
        "list": make(dtype, device, 1),
        "plain list": make(dtype, device, 2).tensors,
        "tuple of 0-dim": tuple(
            torch.tensor(1.5 + i, dtype=dtype, device=device) for i in range(n)
        ),
        "double tensors": make(torch.float64, device, 3),
        "int": 2,
        "float": 0.75,
        "numbers": [0.5 + i for i in range(n)],
        "array": np.linspace(0.5, 2, n),
        "numpy": np.float32(1.25),
        "0-dim": torch.tensor(1.5, dtype=dtype, device=device),
        "0-dim on the CPU": torch.tensor(1.5, dtype=torch.float64),
    }


def each(other):
    """The operand of each tensor."""
    if isinstance(other, np.generic):
        other = other.item()
    if isinstance(other, (list, tuple)):
        return list(other)
    return other.tolist() if isinstance(other, np.ndarray) else [other] * len(SHAPES)


def assert_same(got, expected):
    assert type(got) is TensorList
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        # List kernels may round fused steps of half precision once instead of twice.
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", OPERATORS, ids=NAMES)
def test_operators_and_their_reflections(function, dtype, device):
    x = make(dtype, device)
    before = x.clone()
    for name, other in operands(dtype, device).items():
        assert_same(
            function(x, other), [function(t, o) for t, o in zip(x, each(other), strict=True)]
        )
        if name not in ("list", "double tensors"):
            assert_same(
                function(other, x), [function(o, t) for t, o in zip(x, each(other), strict=True)]
            )
    assert x.equals(before)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", IN_PLACE, ids=NAMES)
def test_in_place_operators_write_into_the_tensors(function, dtype, device):
    for other in operands(dtype, device).values():
        x, expected = make(dtype, device), make(dtype, device)
        parts, pointers = x.tensors, [t.data_ptr() for t in x]
        result = function(x, other)
        assert result is x
        assert all(a is b for a, b in zip(x, parts, strict=True))
        assert [t.data_ptr() for t in x] == pointers
        assert_same(x, [function(t, o) for t, o in zip(expected, each(other), strict=True)])


def test_reflected_subtraction_and_division_are_not_the_forward_ones():
    x = TensorList([torch.tensor([1.0, 4.0])])
    assert_same(2 - x, [torch.tensor([1.0, -2.0])])
    assert_same(2 / x, [torch.tensor([2.0, 0.5])])
    assert_same(2**x, [torch.tensor([2.0, 16.0])])
    assert_same(-x, [torch.tensor([-1.0, -4.0])])
    assert (+x)[0] is not x[0]
    assert str(2 - TensorList([torch.zeros(1)])) == "TensorList([tensor([2.])])"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_integers_bools_and_complex_numbers_promote_as_torch_does(dtype):
    x = TensorList([torch.tensor([1, 0, 1]).to(dtype), torch.tensor([[1]]).to(dtype)])
    for other in (2, 0.5, 2j, [3, 0.5], torch.tensor(2.5)):
        for function in OPERATORS:
            for swap in (False, True):
                pairs = list(zip(x, other if isinstance(other, list) else [other] * 2, strict=True))

                def call(a, b, swap=swap, function=function):
                    return function(b, a) if swap else function(a, b)

                try:
                    expected = [call(a, b) for a, b in pairs]
                except (RuntimeError, TypeError):  # torch does not define it for bool
                    with pytest.raises((RuntimeError, TypeError)):
                        call(x, other)
                else:
                    assert_same(call(x, other), expected)


UNARY = "abs neg sqrt exp log sign reciprocal round tanh".split()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_list(name, dtype):
    x = make(dtype) * 3 - 4
    expected = [getattr(torch, name)(t) for t in x]
    assert_same(getattr(x, name)(), expected)
    parts = x.tensors
    assert getattr(x, f"{name}_")() is x
    assert all(a is b for a, b in zip(x, parts, strict=True))
    assert_same(x, expected)
    assert getattr(TensorList, f"{name}_").__doc__.endswith("in place.")


def test_abs_of_python():
    assert_same(abs(TensorList([torch.tensor([-1.0, 2.0])])), [torch.tensor([1.0, 2.0])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_of_two_lists(dtype):
    x, y = make(dtype), make(dtype, seed=1)
    pairs = list(zip(x, y, strict=True))
    assert_same(x.maximum(y), [torch.maximum(a, b) for a, b in pairs])
    assert_same(x.minimum(0.75), [a.clamp(max=0.75) for a in x])
    assert_same(x.lerp(y, 0.25), [a.lerp(b, 0.25) for a, b in pairs])
    weights = [0.1, 0.2, 0.3, 0.4, 0.5]
    lerped = [a.lerp(b, w) for (a, b), w in zip(pairs, weights, strict=True)]
    assert_same(x.lerp(y, weights), lerped)
    assert_same(x.lerp(y, y), [a.lerp(b, b) for a, b in pairs])
    assert_same(x.lerp(y, torch.tensor(0.25)), [a.lerp(b, 0.25) for a, b in pairs])
    assert_same(x.addcmul(y, y, 0.5), [a.addcmul(b, b, value=0.5) for a, b in pairs])
    assert_same(x.addcdiv(y, x, -2), [a.addcdiv(b, a, value=-2) for a, b in pairs])
    for name, args in {
        "maximum": (y,),
        "minimum": (y,),
        "lerp": (y, 0.3),
        "addcmul": (y, y, weights),
        "addcdiv": (y, y),
        "clip": (0.6, y),
    }.items():
        expected, z = getattr(x, name)(*args), x.clone()
        parts = z.tensors
        assert getattr(z, f"{name}_")(*args) is z
        assert all(a is b for a, b in zip(z, parts, strict=True))
        assert_same(z, expected)


def test_clip_keeps_nan_and_takes_either_bound():
    x = TensorList([torch.tensor([-2.0, float("nan"), 2.0]), torch.tensor([0.5])])
    assert_same(x.clip(-1, 1), [torch.tensor([-1.0, float("nan"), 1.0]), torch.tensor([0.5])])
    assert_same(x.clamp(min=[0, 0.75]), [x[0].clamp(min=0), torch.tensor([0.75])])
    assert_same(x.clip(max=0), [x[0].clamp(max=0), torch.tensor([0.0])])
    assert_same(x.clip(1, -1), [x[0].clamp(1, -1), x[1].clamp(1, -1)])
    with pytest.raises(ValueError, match="clip needs min or max"):
        x.clip()
    kept = x.clone()
    with pytest.raises(ValueError, match="max must have as many entries"):
        x.clip_(0, [1])
    assert x.allclose(kept, equal_nan=True)


def test_masks_and_where():
    x, y = make(), make(seed=1)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        function = getattr(operator, name)
        expected = [function(a, b) for a, b in zip(x, y, strict=True)]
        assert_same(getattr(x, name)(y), expected)
        if name not in ("eq", "ne"):
            assert_same(function(x, y), expected)
            assert_same(function(1, x), [function(1, a) for a in x])
    assert_same(x.where(x < y, y), x.minimum(y))
    assert x.where(True, 0).equals(x)
    assert x.where([True, False, True, True, True], 0)[1].count_nonzero() == 0
    with pytest.raises(
        TypeError, match=r"condition must hold bools, got torch\.float32 at index 0"
    ):
        x.where(y, 0)
    for function in (operator.eq, operator.ne):
        with pytest.raises(TypeError, match="is ambiguous"):
            function(x, y)


def test_the_truth_of_masks_is_refused_and_that_of_a_list_is_not():
    x = make()
    with pytest.raises(ValueError, match=r"truth of masks is ambiguous: flatten\(\).all\(\)"):
        bool(x > 0)
    with pytest.raises(ValueError, match="truth of masks"):
        assert not x.isfinite() or x.eq(0)
    assert not (x > torch.inf).flatten().any()
    assert x
    assert not x[:0]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_reductions_are_those_of_the_vector(dtype, device):
    x = (make(device=device) * 8 - 8).to(dtype)
    vector = x.flatten()
    assert vector.dtype == dtype
    wide = vector.to(torch.promote_types(dtype, torch.float32))
    for name in ("sum", "mean", "min", "max"):
        torch.testing.assert_close(getattr(x, name)().to(wide), getattr(wide, name)())
    torch.testing.assert_close(x.dot(x), wide @ wide)
    for order in (0, 1, 2, 3, float("inf")):
        torch.testing.assert_close(x.norm(order), torch.linalg.vector_norm(wide, order))
    assert x.numel() == vector.numel() == 20
    assert x.isfinite()


def test_half_precision_is_summed_in_single():
    x = TensorList([torch.full((100,), 6e4, dtype=torch.float16)] * 2)
    assert x.sum().dtype == torch.float32
    torch.testing.assert_close(x.norm(), torch.tensor(6e4 * 200**0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(x.dot(x), torch.tensor(200 * 3.6e9), rtol=1e-2, atol=0)
    assert not (x * 2).isfinite()


def test_lists_without_elements():
    empty = TensorList()
    assert len(empty) == 0
    assert_same(2 - empty / 3 * [] + (), [])
    empty += 1
    assert empty.clip_(0, 1).lerp_([], 0.5).addcmul_([], []).abs_() is empty
    assert empty.sum() == 0
    assert empty.norm() == 0
    assert empty.mean().isnan()
    assert empty.flatten().shape == (0,)
    assert empty.from_vector(torch.empty(0)).equals([])
    with pytest.raises(ValueError, match="need at least one element"):
        empty.max()


def test_vectors_and_back():
    x = TensorList([torch.rand(2, 3), torch.rand(4, dtype=torch.float64), torch.rand(())])
    vector = x.flatten()
    assert vector.dtype == torch.float64
    back = x.from_vector(vector)
    assert_same(back, x)
    assert back[1].data_ptr() == vector[6:].data_ptr()
    for bad in (vector[1:], vector[None], [1.0]):
        with pytest.raises(ValueError, match=r"vector must have shape \(numel,\) = \(11,\), got"):
            x.from_vector(bad)


# ---- as a list ---------------------------------------------------------------------------------


def test_it_is_a_list_and_slices_are_lists_of_the_same_tensors():
    x = make()
    assert isinstance(x, list)
    assert x[0].shape == (3,)
    tail = x[1:3]
    assert type(tail) is TensorList
    assert tail[0] is x[1]
    tail *= 0
    assert x[1].count_nonzero() == 0
    assert x.shapes == x.shape == [torch.Size(s) for s in SHAPES]
    assert type(x.tensors) is list
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), copy.copy(x)):
        assert type(other) is TensorList
        assert other.equals(x)
    torch.optim.SGD(x.requires_grad_(), 0.1)
    with pytest.raises(TypeError, match="tensors must hold tensors, got int at index 1"):
        TensorList([torch.ones(1), 2])


def test_checkpoints_of_a_plain_list_load_with_weights_only():
    x, file = make(), io.BytesIO()
    torch.save(x.tensors, file)
    file.seek(0)
    assert x.equals(torch.load(file, weights_only=True))


def test_map_takes_operands():
    x = make()
    assert_same(x.map(torch.relu), [torch.relu(t) for t in x])
    assert_same(x.map(torch.mul, [1, 2, 3, 4, 5]), x * [1, 2, 3, 4, 5])


def test_parameters_of_a_module_and_their_gradients():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[1].bias.requires_grad_(False)
    x = TensorList.from_module(net)
    assert [id(t) for t in x] == [id(p) for p in net.parameters()][:3]
    assert x.grad.equals(x.zeros_like())
    x.grad = [torch.full_like(t, 2.0) for t in x]
    assert net[0].weight.grad.eq(2).all()
    with pytest.raises(ValueError, match="grad must have as many entries as the list, 3, got 1"):
        x.grad = [torch.ones(1)]
    with pytest.raises(RuntimeError, match="tensor 0 is a leaf that requires grad"):
        x += 1
    with torch.no_grad():
        x += x.grad
    assert all(isinstance(t, nn.Parameter) for t in x)


def test_gradients_flow():
    x = TensorList([torch.tensor([1.0, 2.0]), torch.tensor([3.0])]).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    (2 / x + (1 - x) * scale).sum().backward()
    for t in x:
        torch.testing.assert_close(t.grad, -2 / t.detach() ** 2 - 2)
    assert scale.grad == -3
    assert not x.detach()[0].requires_grad


# ---- copies and new lists ----------------------------------------------------------------------


def test_copies_do_not_share_memory():
    x, y = make(), make(seed=1)
    kept = x.clone()
    x.copy_(y)
    assert x.equals(y)
    y *= 0
    assert not x.equals(y)
    assert x.multi_copy_(kept) is x
    multi_copy(y.tensors, kept.to(torch.float64))
    assert y.equals(kept)
    assert y[0].dtype == torch.float32
    y.zero_()
    assert y.equals(x.zeros_like())
    assert x.fill_(1).equals(x.ones_like())


def test_the_static_calls_of_pytorch_pso_still_work():
    parts = make().tensors
    for name in ("zeros_like", "empty_like", "clone", "abs"):
        made = getattr(TensorList, name)(parts)
        assert type(made) is TensorList
        assert made.shapes == SHAPES
    assert_same(TensorList.clip(parts, 0.6, 0.9), [t.clamp(0.6, 0.9) for t in parts])
    assert TensorList.uniform_like(parts, generator=0).shapes == SHAPES


@pytest.mark.parametrize("device", devices())
def test_random_lists_come_from_their_generator_alone(device):
    x = TensorList([torch.empty(400, 50, device=device), torch.empty(7, device=device)])
    state = torch.get_rng_state()
    normal = x.normal_like(1.0, 2.0, generator=torch.Generator(device).manual_seed(5))
    uniform = x.uniform_like(-1, 3, generator=5)
    assert torch.equal(state, torch.get_rng_state())
    assert normal.equals(x.normal_like(1.0, 2.0, generator=5))
    assert not uniform.equals(x.uniform_like(-1, 3, generator=6))
    n = 20007
    assert abs(normal.mean() - 1) < 5 * 2 / n**0.5
    assert abs(normal.flatten().std() - 2) < 5 * 2 / (2 * n) ** 0.5
    assert abs(uniform.mean() - 1) < 5 * (16 / 12 / n) ** 0.5
    assert -1 <= uniform.min() < uniform.max() <= 3
    with pytest.raises(TypeError):
        x.normal_like()
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or a seed, got str"):
        x.normal_like(generator="0")
    with pytest.raises(ValueError, match="low and high must be finite and in order, got 1 and 0"):
        x.uniform_like(1, 0, generator=0)
    with pytest.raises(ValueError, match="std at least 0"):
        x.normal_like(std=-1, generator=0)
    with pytest.raises(TypeError, match=r"got torch\.int64 at 1"):
        TensorList([torch.ones(1), torch.arange(2)]).normal_like(generator=0)


def test_comparisons_as_a_whole():
    x = make()
    assert x.equals(x.clone())
    assert not x.equals(x[:4])
    assert not x.equals(x[::-1])
    assert (x + 1e-7).allclose(x)
    assert not (x + 1e-2).allclose(x)
    assert not x.allclose(x[:4])
    assert not x.allclose(x[::-1])


# ---- what does not fit -------------------------------------------------------------------------


def test_errors_name_the_first_index_and_change_nothing():
    x = TensorList([torch.ones(2), torch.ones(3), torch.ones(4)])
    kept = x.clone()
    shape = r"at index 1 expected \(3,\), got \(5,\)"
    cases = [
        ([1, 2], ValueError, "as many entries as the list, 3, got 2; .* has index 2"),
        ([1, 2, 3, 4], ValueError, "3, got 4; .* has index 3"),
        ([torch.ones(2), torch.ones(5), torch.ones(1)], ValueError, shape),
        ([1, torch.ones(3), 1], TypeError, "only tensors or only numbers, got Tensor at index 1"),
        (torch.ones(3), ValueError, r"got a tensor of shape \(3,\)"),
        ("abc", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (
            [torch.ones(2), torch.ones(3, device="meta"), torch.ones(4)],
            ValueError,
            "index 1 .* meta",
        ),
    ]
    for other, error, message in cases:
        for function in (*OPERATORS, *IN_PLACE, TensorList.maximum, TensorList.lt):
            with pytest.raises(error, match=message):
                function(x, other)
    for function in (
        lambda other: x.copy_(other),
        lambda other: multi_copy(x, other),
        lambda other: x.lerp_(other, 0.5),
        lambda other: x.addcmul_(other, other),
        lambda other: x.dot(other),
    ):
        with pytest.raises(ValueError, match=r"at index 1 expected \(3,\), got \(5,\)"):
            function([torch.zeros(2), torch.zeros(5), torch.zeros(4)])
        with pytest.raises(ValueError, match="3, got 2"):
            function(x[:2])
        with pytest.raises(TypeError):
            function(2)
    assert x.equals(kept)


def test_what_a_dtype_cannot_hold_is_refused_before_anything_changes():
    x = TensorList([torch.ones(2), torch.arange(3)])
    kept = x.clone()
    for change in (
        lambda: operator.iadd(x, 0.5),
        lambda: operator.itruediv(x, 2),
        lambda: operator.imul(x, 2j),
        x.sqrt_,
        lambda: x.clip_(0.5, 1.5),
    ):
        with pytest.raises(TypeError, match=r"in place: tensor [01] holds torch\.\w+, the result"):
            change()
    with pytest.raises(TypeError, match=r"end must have the dtypes of the list; at index 1"):
        x.lerp_([torch.ones(2), torch.ones(3)], 0.5)
    with pytest.raises(TypeError, match="value must be a number or a sequence of numbers"):
        x.addcmul_(x, x, torch.tensor(1.0))
    assert x.equals(kept)
    x += 2
    assert x[1].tolist() == [2, 3, 4]
