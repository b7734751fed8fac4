"""Particle arithmetic against the same arithmetic on every parameter."""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perturbed.particles import Product, assign_, clone_from, product, rand, randn
from perturbed.testing import devices

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow]
NAMES = [f.__name__ for f in OPERATORS]


class Net(nn.Module):
    """A tied weight, batch statistics, a frozen parameter, a hook and Python attributes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.notes = {"seen": []}
        self.calls = 0
        self.register_forward_hook(Net.count)
        self.body[0].weight.group = ["matrices"]

    def count(self, *_):
        self.calls += 1

    def forward(self, x):
        return self.head(self.body(self.norm(self.embed(x)))) * self.scale


def net(seed=0, kind=Net):
    """Positive parameters: every operator is defined on them."""
    torch.manual_seed(seed)
    made = kind()
    with torch.no_grad():
        for p in made.parameters():
            p.uniform_(0.5, 1.5)
    return made


def values(module):
    """Copies of what takes part, by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def assert_values(module, expected, **tolerances):
    got = values(module)
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerances)


# ---- operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", OPERATORS, ids=NAMES)
def test_operators_and_their_reflections(function, dtype, device):
    a, b = net(0).to(device, dtype), net(1).to(device, dtype)
    before, other = values(a), values(b)
    p, q = product(a), product(b)
    numbers = [2, 0.75, np.float32(1.25), np.float64(1.5), torch.tensor(1.5), True]
    for number in numbers:
        n = float(number)
        assert_values(function(p, number).module(), {k: function(v, n) for k, v in before.items()})
        assert_values(function(number, p).module(), {k: function(n, v) for k, v in before.items()})
    expected = {k: function(v, other[k]) for k, v in before.items()}
    for pair in [(p, q), (p, b), (a, q), (p, q.clone()), (p.detach(), 1 * q)]:
        assert_values(function(*pair).module(), expected)
    assert_values(a, before, rtol=0, atol=0)
    assert_values(b, other, rtol=0, atol=0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("function", IN_PLACE, ids=NAMES)
def test_in_place_forms_keep_the_parameters(function, device):
    plain = OPERATORS[IN_PLACE.index(function)]
    b = net(1).to(device)
    other = values(b)
    for operand in (1.5, product(b), b, 2 * product(b) - 1, product(b).clone()):
        a = net(0).to(device)
        before = values(a)
        if isinstance(operand, float):
            expected = {k: plain(v, 1.5) for k, v in before.items()}
        else:
            twice = isinstance(operand, Product) and operand._combination is not None
            expected = {
                k: plain(v, 2 * other[k] - 1 if twice else other[k]) for k, v in before.items()
            }
        parameters, pointers = list(a.parameters()), [p.data_ptr() for p in a.parameters()]
        p = handle = product(a)
        p = function(p, operand)
        assert p is handle
        assert all(x is y for x, y in zip(parameters, a.parameters(), strict=True))
        assert [p.data_ptr() for p in a.parameters()] == pointers
        assert_values(a, expected)
        assert_values(b, other, rtol=0, atol=0)
        assert a.head.weight is a.embed.weight


def test_unary_minus_and_plus():
    a = net()
    assert_values((-product(a)).module(), {k: -v for k, v in values(a).items()})
    kept = +product(a)
    before = values(a)
    p = product(a)
    p *= 3
    assert_values(kept.module(), before)


def test_division_by_zero_is_torchs():
    a = net()
    assert all(t.isinf().all() for t in (product(a) / 0).tensors())
    p = product(a)
    p /= 0.0
    assert a.head.bias.isinf().all()


def test_an_optimizer_stays_valid():
    a, b = net(0), net(1)
    optimizer = torch.optim.SGD(a.parameters(), 0.1, momentum=0.9)
    x, y = torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1])

    def train():
        optimizer.zero_grad()
        nn.functional.cross_entropy(a(x), y).backward()
        optimizer.step()

    train()
    p = product(a)
    p += 0.5 * product(b)
    assign_(a, 0.5 * p + 0.5 * product(b))
    before = values(a)
    train()
    after = values(a)
    assert all(not torch.equal(before[k], after[k]) for k in before if "norm.bias" not in k)


def test_combinations_are_the_sum_whatever_its_form():
    nets = [net(seed) for seed in range(40)]
    every = [values(n) for n in nets]
    mean = {k: torch.stack([v[k] for v in every]).mean(0) for k in every[0]}
    assert_values((sum(map(product, nets)) / 40).module(), mean)
    a, b, c = (product(n) for n in nets[:3])
    x, y, z = every[:3]
    cases = {
        "cancelled": (a - a, lambda k: 0 * x[k]),
        "merged": (a + b + a - 0.5 * b, lambda k: 2 * x[k] + 0.5 * y[k]),
        "lerp": (0.7 * a + 0.3 * b, lambda k: 0.7 * x[k] + 0.3 * y[k]),
        "lerp beyond": (3 * a - 2 * b, lambda k: 3 * x[k] - 2 * y[k]),
        "no lerp": (0.7 * a + 0.4 * b, lambda k: 0.7 * x[k] + 0.4 * y[k]),
        "first is 1": (a - 0.4 * b + c, lambda k: x[k] - 0.4 * y[k] + z[k]),
        "shift": (2 * (a + 1 - b) / 4 - 3, lambda k: (x[k] + 1 - y[k]) / 2 - 3),
        "reflected": (1 - (2 - (a - b)), lambda k: x[k] - y[k] - 1),
        "number": (a * 0 + 3, lambda k: 0 * x[k] + 3),
    }
    for value, expected in cases.values():
        wanted = {k: expected(k) for k in x}
        assert_values(value.module(), wanted, rtol=1e-5, atol=1e-6)
        target = net(7)  # none of the particles
        assign_(target, value)
        assert_values(target, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    "weights", [(0.7, 0.3, 0.0), (0.7, 0.4, 0.0), (1.0, -2.0, 0.0), (0.5, 0.5, 1.0)]
)
def test_assign_into_any_of_the_terms(which, weights):
    nets = [net(seed) for seed in range(3)]
    x, y = values(nets[0]), values(nets[1])
    first, second, shift = weights
    assert (
        assign_(nets[which], first * product(nets[0]) + second * product(nets[1]) + shift)
        is (nets[which])
    )
    assert_values(nets[which], {k: first * x[k] + second * y[k] + shift for k in x})
    for other in {0, 1} - {which}:
        assert_values(nets[other], (x, y)[other], rtol=0, atol=0)


def test_particles_that_share_a_parameter():
    """A tensor of the target is also one of another particle: nothing is read after a write."""

    def pair():
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        c = nn.Sequential(a, b), nn.Sequential(b, a)
        return c

    torch.manual_seed(1)
    left, right = pair()
    x, y = values(left), values(right)
    assign_(left, 0.7 * product(left) + 0.3 * product(right))
    assert_values(left, {k: 0.7 * x[k] + 0.3 * y[k] for k in x})
    left, right = pair()
    x, y = values(left), values(right)
    p = product(left)
    p *= right
    assert_values(left, {k: x[k] * y[k] for k in x})


class Passes(TorchDispatchMode):
    """Which list kernels run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


ONE = [
    (lambda p, q, r: 0.7 * p + 0.3 * q, ["lerp"]),
    (lambda p, q, r: p + 0.1 * (q - p), ["lerp"]),
    (lambda p, q, r: 0.3 * q + 0.7 * p, ["lerp"]),
    (lambda p, q, r: p - 0.1 * q, ["add"]),
    (lambda p, q, r: 0.5 * p, ["mul"]),
    (lambda p, q, r: 0.5 * p + q + 2 * r - 1, ["mul", "add", "add", "add"]),
]


@pytest.mark.parametrize(("write", "kernels"), ONE)
def test_passes_over_memory(write, kernels):
    p, q, r = (product(net(seed)) for seed in range(3))
    value = write(p, q, r)
    with Passes() as passes:
        value.clone()
    first, *rest = kernels
    assert passes.seen == [f"_foreach_{first}", *(f"_foreach_{name}_" for name in rest)]
    with Passes() as passes:
        assign_(p, value)
    assert passes.seen == [f"_foreach_{name}_" for name in kernels]


# ---- when a value is computed ------------------------------------------------------------------


def test_a_combination_has_the_value_it_was_written_with_or_none():
    a, b = net(0), net(1)
    mixed, kept = 0.5 * product(a) + 0.5 * product(b), (product(a) + product(b)).clone()
    expected = {k: v + values(b)[k] for k, v in values(a).items()}
    torch.optim.SGD(b.parameters(), 0.1).step()  # no gradients: nothing changes
    mixed.module()
    with torch.no_grad():
        b.norm.weight.add_(1)
    for use in (mixed.module, mixed.clone, mixed.tensors, lambda: assign_(a, mixed),
                lambda: mixed * mixed, (mixed + 1).clone):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"norm\.weight has changed since"):
            use()
    assert_values(kept.module(), expected)
    handle = product(b)
    with torch.no_grad():
        b.norm.weight.add_(1)
    assert_values(handle.module(), values(b))  # it stands for b


def test_a_moving_average():
    a = net()
    ema, expected = product(a).clone(), values(a)
    for step in range(20):
        with torch.no_grad():
            for p in a.parameters():
                p.add_(0.1 * step)
        ema *= 0.9
        ema += 0.1 * product(a)
        expected = {k: 0.9 * v + 0.1 * values(a)[k] for k, v in expected.items()}
    assert_values(ema.module(), expected)


def test_values_are_nobody_elses():
    a = net()
    before = values(a)
    p = product(a)
    doubled, detached = 2 * p, p.detach()
    doubled += 1
    detached -= 5
    assert_values(a, before, rtol=0, atol=0)
    assert_values(doubled.module(), {k: 2 * v + 1 for k, v in before.items()})
    assert_values(detached.module(), {k: v - 5 for k, v in before.items()})
    p.tensors()[0].zero_()
    first, second = doubled.module(), doubled.module()
    with torch.no_grad():
        first.head.bias.zero_()
    assert second.head.bias.min() > 0
    assert_values(a, before, rtol=0, atol=0)


def test_a_value_in_place_does_not_change_what_was_made_of_it():
    held = product(net()).clone()
    twice = 2 * held
    held += 1
    with pytest.raises(RuntimeError, match="has changed since"):
        twice.module()


# ---- modules that come out ---------------------------------------------------------------------


def test_a_module_shares_nothing():
    a, b = net(0), net(1)
    a(torch.tensor([1, 2, 3]))
    c = (0.5 * product(a) + 0.5 * product(b)).module()
    assert type(c) is Net
    assert c.head.weight is c.embed.weight
    assert c.norm.running_mean is not a.norm.running_mean
    assert torch.equal(c.norm.running_mean, a.norm.running_mean)
    before = a.norm.running_mean.clone()
    c(torch.tensor([1, 5, 3]))
    assert torch.equal(a.norm.running_mean, before)
    assert not torch.equal(c.norm.running_mean, before)
    assert (a.calls, b.calls, c.calls) == (1, 0, 2)  # the copy's hook counts on the copy
    c.notes["seen"].append(1)
    c.body[0].weight.group.append("mine")
    assert a.notes == {"seen": []}
    assert a.body[0].weight.group == ["matrices"]
    assert not c.scale.requires_grad
    assert c.scale is not a.scale
    assert all(p.is_leaf for p in c.parameters())
    assert [p.requires_grad for p in c.parameters()] == [p.requires_grad for p in a.parameters()]


def test_replaced_and_retied_parameters_of_plain_layers_are_seen():
    a = net()
    a.body[0].weight = nn.Parameter(torch.full((4, 4), 2.0))
    a.head.weight = nn.Parameter(a.head.weight.detach().clone())
    c = (product(a) * 3).module()
    assert c.head.weight is not c.embed.weight
    assert torch.equal(c.body[0].weight, torch.full((4, 4), 6.0))
    p = product(a)
    a.body[0].weight = nn.Parameter(torch.zeros(4, 4))
    for use in (p.module, lambda: p + 1, lambda: operator.imul(p, 2), lambda: assign_(p, a)):
        with pytest.raises(RuntimeError, match=r"body\.0\.weight of the module was replaced"):
            use()
    assert not a.body[0].weight.any()


def test_parts_of_a_module():
    a = net()
    before = values(a)
    part = (product(a.body) + 10).module()
    assert type(part) is nn.Sequential
    assert_values(part, {k: v + 10 for k, v in values(a.body).items()})
    assert_values(a, before, rtol=0, atol=0)
    assign_(a.body, part)
    assert torch.equal(a.body[0].weight, before["body.0.weight"] + 10)
    assert torch.equal(a.head.bias, before["head.bias"])


def test_parameters_are_chosen_by_name_and_frozen_ones_stay():
    a, b = net(0), net(1)
    p = product(a, where=lambda name: name.startswith("body"))
    assert p.names == ("body.0.weight", "body.0.bias")
    moved = (0.0 * p + b).module()
    assert torch.equal(moved.body[0].weight, b.body[0].weight)
    assert torch.equal(moved.head.bias, a.head.bias)
    assign_(a, 2 * p)
    assert "scale" not in product(a).names
    every = product(a, frozen=True)
    assert "scale" in every.names
    scale = a.scale.item()
    every += 1
    assert a.scale.item() == pytest.approx(scale + 1)
    assert not a.scale.requires_grad


@pytest.mark.parametrize("kind", [
    lambda: nn.LSTM(3, 4, 2), lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), zoo.Tied, zoo.Twice,
    lambda: nn.MultiheadAttention(4, 2),
])  # fmt: skip
def test_modules_of_all_sorts(kind):
    a, b = net(0, kind), net(1, kind)
    x, y = values(a), values(b)
    assert list(x) == list(product(a).names)
    c = (0.25 * product(a) + 0.75 * product(b)).module()
    assert_values(c, {k: 0.25 * x[k] + 0.75 * y[k] for k in x})
    fresh = kind()
    fresh.load_state_dict(c.state_dict())
    inputs = torch.randn(2, 5, next(iter(a.parameters())).shape[-1])
    if isinstance(a, nn.MultiheadAttention):
        inputs = (inputs,) * 3
    elif isinstance(a, (zoo.Tied, zoo.Twice)):
        inputs = (torch.randn(2, 6),)
    else:
        inputs = (torch.randn(2, 5, 4 if isinstance(a, nn.TransformerEncoderLayer) else 3),)
    for module in (c, fresh):
        module.eval()
    got, expected = c(*inputs), fresh(*inputs)
    torch.testing.assert_close(got, expected)


def test_copies_and_pickles():
    a, b = net(0), net(1)
    mixed = 0.5 * product(a) + 0.5 * product(b)
    expected = values(mixed.module())

    def roundtrips(x):
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        return copy.deepcopy(x), pickle.loads(pickle.dumps(x)), torch.load(file, weights_only=False)

    for again in roundtrips(mixed):
        assert_values(again.module(), expected)
        assert_values((again + b).module(), {k: v + values(b)[k] for k, v in expected.items()})
    for again, module in roundtrips((product(a), a)):
        assert module is not a
        again += 1  # it stands for the copied module
        assert_values(module, {k: v + 1 for k, v in values(a).items()})
    for again in roundtrips((product(a) + 1).module()):
        again(torch.tensor([1, 2]))
        assert_values((2 * product(again)).module(), {k: 2 * v + 2 for k, v in values(a).items()})


def test_operations_of_ones_own():
    a, b = net(0), net(1)
    x, y = values(a), values(b)
    clipped = product(a).unary(lambda w, name: w.clamp(max=1) if name == "head.bias" else w)
    made = clipped.module()
    assert made.head.bias.max() <= 1
    assert torch.equal(made.embed.weight, a.embed.weight)
    assert made.embed.weight.data_ptr() != a.embed.weight.data_ptr()
    cross = product(a).binary(lambda v, w, name: torch.where(v > w, v, w), product(b) + 0)
    assert_values(cross.module(), {k: torch.maximum(x[k], y[k]) for k in x})
    with pytest.raises(TypeError, match=r"must return a tensor for embed\.weight, got int"):
        product(a).unary(lambda w, name: 1)
    with pytest.raises(ValueError, match=r"keep the shape of norm\.weight, .*\[4\].*, got .*\[1\]"):
        product(a).unary(lambda w, name: w[:1] if "norm.w" in name else w)
    with pytest.raises(ValueError, match=r"keep the dtype of embed\.weight"):
        product(a).unary(lambda w, name: w > 0)
    with pytest.raises(TypeError, match="other must be a product or a module, got int"):
        product(a).binary(lambda v, w, name: v, 3)


# ---- random particles --------------------------------------------------------------------------


def test_random_particles():
    a = nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 50))
    state = torch.get_rng_state()
    normal, uniform = randn(a, 3), rand(product(a), 3)
    assert torch.equal(state, torch.get_rng_state())
    z, u = normal.tensors().flatten(), uniform.tensors().flatten()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert randn(a, 3).tensors().equals(normal.tensors())
    for other in (randn(a, 4), randn(a, 3, draw=1)):
        w = other.tensors().flatten()
        assert abs((z * w).mean()) < 5 / n**0.5
    first, second = normal.tensors()[1], normal.tensors()[3]
    assert not torch.equal(first[:50], second)  # parameters draw apart from each other
    double = randn(copy.deepcopy(a).double(), 3).tensors().flatten()
    torch.testing.assert_close(double.float(), z, rtol=1e-6, atol=1e-6)
    assert randn(copy.deepcopy(a).half(), 3).tensors()[0].dtype == torch.float16
    only = randn(product(a, where=lambda name: name == "1.weight"), 3)
    assert only.names == ("1.weight",)
    with pytest.raises(TypeError, match="seed must be an int, got None"):
        randn(a, None)
    with pytest.raises(ValueError, match="draw must be between"):
        rand(a, 0, draw=-1)


def test_random_particles_are_the_contracts():
    from perturbed import _C, _ops
    from perturbed.noise.base import OPTIMIZER_ID

    a = nn.Linear(3, 2)
    key = torch.tensor([_C.splitmix64(5), 9, 0])
    word = OPTIMIZER_ID << 8 | 17
    w, b = randn(a, 5, draw=9).tensors()
    assert torch.equal(w, _ops.dense_materialise(key, word, 0, 1, 1, 6, False, w.dtype).view(2, 3))
    assert torch.equal(b, _ops.dense_materialise(key, word, 1, 1, 1, 2, False, w.dtype).view(2))


# ---- bad input ---------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, width=3, bias=True, order=False):
        super().__init__()
        if order:
            self.b = nn.Linear(width, 2, bias=bias)
        self.a = nn.Linear(2, width)
        if not order:
            self.b = nn.Linear(width, 2, bias=bias)


def test_particles_of_other_structure_name_the_first_parameter():
    a = Deep()
    before = values(a)
    frozen = Deep()
    frozen.a.bias.requires_grad_(False)
    cases = [
        (Deep(4), r"a\.weight has shape \(3, 2\) on the left and \(4, 2\) on the right"),
        (Deep(bias=False), r"b\.bias is one of the left particle only"),
        (Deep().double(), r"a\.weight has dtype torch.float32 .* torch.float64 on the right"),
        (Deep(order=True), r"parameter 0 is a\.weight on the left and b\.weight on the right"),
        (Deep().to("meta"), r"a\.weight has device cpu on the left and meta on the right"),
    ]
    for other, message in cases:
        for right in (other, product(other), 2 * product(other)):
            for function in OPERATORS + IN_PLACE:
                with pytest.raises(ValueError, match=message):
                    function(product(a), right)
    with pytest.raises(ValueError, match=r"a\.bias is one of the left particle only .*frozen"):
        product(a) + product(frozen)
    with pytest.raises(ValueError, match=r"b\.bias is one of the right"):
        product(Deep(bias=False)) + a
    with pytest.raises(ValueError, match=r"b\.bias is one of the"):
        assign_(a, product(Deep(bias=False)))
    with pytest.raises(ValueError, match=r"a\.weight has shape"):
        clone_from(a, Deep(4))
    assert_values(a, before, rtol=0, atol=0)
    # A frozen parameter of the other module takes part if it does on the left.
    assert_values((product(a) * 0 + frozen).module(), {
        k: v.detach() for k, v in frozen.named_parameters()
    })  # fmt: skip


def test_bad_arguments_are_named():
    a = Deep()
    p = product(a)
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got list"):
        product([1])
    with pytest.raises(TypeError, match="where must be a function of a name, got str"):
        product(a, where="a")
    with pytest.raises(ValueError, match="no parameter to compute with: of its 4 each is frozen"):
        product(copy.deepcopy(a).requires_grad_(False))
    with pytest.raises(ValueError, match=r"weight has no shape yet: run a forward"):
        product(nn.LazyLinear(3))
    whole = nn.Module()
    whole.w = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(TypeError, match=r"w must be floating-point or complex, got torch\.int64"):
        product(whole, frozen=True)
    for bad in ("x", None, 1j, torch.ones(3), [1, 2]):
        for function in OPERATORS + IN_PLACE:
            for pair in ((p, bad), (bad, p)):
                with pytest.raises(TypeError):
                    function(*pair)
    with pytest.raises(TypeError, match=r"target must be a module or .*, got a value"):
        assign_(2 * p, p)
    with pytest.raises(TypeError, match="value must be a product or a module, got float"):
        assign_(a, 0.5)
    assert repr(p) == "Product(Deep, 4 parameters of 17 numbers)"


def test_a_copy_may_change_dtype():
    a, b = Deep(), Deep().double()
    assign_(a, 2 * product(b))
    assert_values(a, {k: (2 * v).float() for k, v in values(b).items()})
    assert_values(clone_from(a, b), {k: v.float() for k, v in values(b).items()})


def test_clone_from_takes_buffers_too():
    a, b = net(0), net(1)
    b(torch.tensor([1, 2, 3]))
    c = clone_from(a, b)
    assert torch.equal(c.norm.running_mean, b.norm.running_mean)
    assert c.norm.running_mean is not b.norm.running_mean
    assert_values(c, values(b))
    assert c.scale.item() == b.scale.item()
    assert c.head.weight is c.embed.weight
    c(torch.tensor([1, 2, 3]))
    assert (a.calls, c.calls) == (0, 1)


def test_inference_mode_and_no_autograd():
    a, b = net(0), net(1)
    x, y = values(a), values(b)
    with torch.inference_mode():
        c = (0.5 * product(a) + 0.5 * product(b)).module()
        p = product(a)
        p += b
    assert_values(c, {k: 0.5 * x[k] + 0.5 * y[k] for k in x})
    c(torch.tensor([1, 2])).sum().backward()
    a(torch.tensor([1, 2])).sum().backward()
    assert c.head.bias.grad is not None


def test_complex_parameters():
    def made(seed):
        module = nn.Module()
        module.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        return module

    a, b = made(0), made(1)
    x, y = a.w.detach().clone(), b.w.detach().clone()
    torch.testing.assert_close(
        (0.3 * product(a) + 0.7 * product(b)).module().w.detach(), 0.3 * x + 0.7 * y
    )
    torch.testing.assert_close((product(a) * b - 1).module().w.detach(), x * y - 1)
    with pytest.raises(TypeError, match="w must be real for random numbers"):
        randn(a, 0)
