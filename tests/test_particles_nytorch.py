"""The names of Nytorch do what its programs expect, without what went wrong there."""

import copy
import operator
import pickle

import pytest
import torch
from torch import nn

from perturbed.particles import Product, product, randn
from perturbed.particles.nytorch import NytoModule, ParticleModule, ParticleProduct

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow]


class Net(NytoModule):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.layer(x))


def nyto():
    return Net()


def wrapped():
    return ParticleModule(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def pair(kind):
    torch.manual_seed(0)
    made = kind(), kind()
    with torch.no_grad():
        for p in (*made[0].parameters(), *made[1].parameters()):
            p.uniform_(0.5, 1.5)
    return made


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def assert_values(module, expected):
    torch.testing.assert_close(values(module), expected)


both = pytest.mark.parametrize("kind", [nyto, wrapped])


@both
@pytest.mark.parametrize("function", OPERATORS, ids=lambda f: f.__name__)
def test_operators_make_particles(kind, function):
    a, b = pair(kind)
    x, y = values(a), values(b)
    for left, right, u, v in [
        (a, b, x, y),
        (a, 2, x, [2] * 4),
        (2, a, [2] * 4, x),
        (a, b.product(), x, y),
        (a, torch.tensor(1.5), x, [1.5] * 4),
    ]:
        c = function(left, right)
        assert type(c) is type(a)
        assert_values(c, [function(s, t) for s, t in zip(u, v, strict=True)])
        assert c(torch.ones(4, 3)).shape == (4, 2)
    made = function(a.product(), b)
    assert type(made) is ParticleProduct
    assert_values(made.module(), [function(s, t) for s, t in zip(x, y, strict=True)])
    assert_values(made.particle(), [function(s, t) for s, t in zip(x, y, strict=True)])
    assert_values(a, x)
    assert_values(-a, [-v for v in x])
    assert_values(+a, x)
    with pytest.raises(TypeError):
        function(a, "b")


@both
@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_forms_keep_the_parameters(kind, function):
    plain = OPERATORS[IN_PLACE.index(function)]
    for operand in ("particle", 1.5):
        a, b = pair(kind)
        x, y = values(a), values(b) if operand == "particle" else [1.5] * 4
        parameters = list(a.parameters())
        c = function(a, b if operand == "particle" else operand)
        assert c is a
        assert all(p is q for p, q in zip(parameters, c.parameters(), strict=True))
        assert_values(a, [plain(s, t) for s, t in zip(x, y, strict=True)])
        with pytest.raises(TypeError):
            function(a, "b")


@both
def test_buffers_storage_and_hooks_are_each_particles_own(kind):
    a, b = pair(kind)
    for made in (a.clone(), a + b, a.clone_from(b), a.randn(0), copy.deepcopy(a),
                 pickle.loads(pickle.dumps(a)), +a):  # fmt: skip
        before = [t.clone() for t in a.buffers()]
        made(torch.randn(8, 3))
        assert all(torch.equal(s, t) for s, t in zip(before, a.buffers(), strict=True))
        assert type(made * 2 + a) is type(a)
    a.product_(b.product())
    assert_values(a, values(b))
    kept = values(b)
    a *= 2
    assert_values(b, kept)
    assert_values(a.product_(b), kept)


@both
def test_frozen_parameters_stay(kind):
    a, b = pair(kind)
    next(a.parameters()).requires_grad_(False)
    next(b.parameters()).requires_grad_(False)
    kept = values(a)
    c = a + b
    assert_values(c, kept[:1] + [s + t for s, t in zip(kept[1:], values(b)[1:], strict=True)])
    assert [p.requires_grad for p in c.parameters()] == [False, True, True, True]


@both
def test_the_rest(kind):
    a, b = pair(kind)
    x, y = values(a), values(b)
    assert_values(a.clone_from(b), y)
    assert_values(a.unary_operator(lambda w, name: w.square()), [v.square() for v in x])
    assert_values(a.binary_operator(b, lambda v, w, name: v.maximum(w)),
                  [s.maximum(t) for s, t in zip(x, y, strict=True)])  # fmt: skip
    assert_values(a.randn(3), list(randn(a.product(), 3).tensors()))
    assert all((v > 0).all() and (v < 1).all() for v in values(a.rand(3)))


def test_any_particle_module_is_an_operand_of_a_product():
    a, b = pair(wrapped)
    expected = [s + t for s, t in zip(values(a), values(b), strict=True)]
    assert_values((a.product() + b).module(), expected)
    assert type(product(a)) is Product  # of the wrapper itself: names begin with root_module
    assert product(a).names[0] == "root_module.0.weight"
    with pytest.raises(TypeError, match=r"root_module must be an nn\.Module, got int"):
        ParticleModule(3)


def test_momentum_as_particle_arithmetic():
    """net1, net0 = GD(net1) + b (net1 - net0), net1 is the heavy ball (Polyak, 1964)."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    net1 = ParticleModule(nn.Linear(3, 2))
    reference = copy.deepcopy(net1.root_module)
    sgd = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    net0 = net1.clone()
    for _ in range(10):
        sgd.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        sgd.step()
        moved = net1.clone()
        nn.functional.mse_loss(moved(x), y).backward()
        torch.optim.SGD(moved.parameters(), 0.1).step()
        step = (moved.product() + 0.9 * (net1.product() - net0.product())).particle()
        net1, net0 = step, net1
    assert_values(net1, values(reference))
