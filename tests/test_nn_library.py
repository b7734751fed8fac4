"""Layers of libraries, known by name: transformers' Conv1D, and RMSNorms of any formula."""

import pickle
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, SIGMA, D, signs
from torch import nn
from zoo import same

import perturbed
from perturbed import Dense, LowRank, PerturbedModel, convert, revert
from perturbed.nn.library import PerturbedLibraryNorm, PerturbedTransposedLinear
from perturbed.testing import DTYPES, assert_bitwise_equal, assert_close_to_reference, dtype_id

IN, OUT = 6, 5

each_family = pytest.mark.parametrize("noise", FAMILIES.values(), ids=FAMILIES)


class RoundedRMSNorm(nn.Module):
    """The formula of Llama: normalise in float32, round, scale."""

    def __init__(self, size=IN):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x):
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normal.to(x.dtype)


class OffsetRMSNorm(RoundedRMSNorm):
    """The formula of Gemma: scale by one more than the weight, round; in methods of its own."""

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def _scaled(self, x):
        return x * (1.0 + self.weight.float())

    def forward(self, x):
        return self._scaled(self._norm(x.float())).type_as(x)


NORMS = {"rounded": RoundedRMSNorm, "offset": OffsetRMSNorm}
each_norm = pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)


def population(layer, noise=None, antithetic=None, dtype=torch.float64):
    net = nn.Sequential(layer.to(dtype))
    convert(net, D, noise)
    pm = PerturbedModel(net, D, antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return net, pm


def check_members(pm, x, negated, tolerance=1e-11):
    with torch.no_grad():
        y = pm(x)
        for b, s in enumerate(signs(len(x), D, negated)):
            same(pm.member(b % D, int(s))(x[b : b + 1])[0], y[b], tolerance)


def check_estimates(net, pm):
    weights = torch.randn(D).double()
    for accumulate in (False, True):
        pm.set_grad(weights, accumulate)
    for name, parameter in net.named_parameters():
        parts = [dict(pm.member(d).named_parameters())[name] - parameter for d in range(D)]
        assert all(part.any() for part in parts)
        same(parameter.grad, 2 * torch.tensordot(weights, torch.stack(parts), 1))


# ---- Conv1D ------------------------------------------------------------------------------------


def conv1d():
    """A layer of GPT-2: y = x @ weight + bias, weight (in, out)."""
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = kind(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


@each_family
@pytest.mark.parametrize(
    ("repeats", "antithetic", "negated"), [(1, None, False), (4, None, True), (3, False, False)]
)
def test_conv1d_gives_every_row_its_weights(noise, repeats, antithetic, negated):
    net, pm = population(conv1d(), noise, antithetic)
    assert type(net[0]) is PerturbedTransposedLinear
    check_members(pm, torch.randn(repeats * D, 4, IN).double(), negated)
    short = pm.replicate(torch.randn(4, IN).double())
    with torch.no_grad():
        same(pm(short), pm(short.full()))


@each_family
def test_conv1d_estimates_its_own_noise(noise):
    check_estimates(*population(conv1d(), noise))


@each_family
def test_conv1d_has_the_noise_of_a_linear_layer_transposed(noise):
    net, pm = population(conv1d(), noise)
    linear = perturbed.PerturbedLinear(IN, OUT, D, noise=noise, dtype=torch.float64)
    PerturbedModel(linear, D, sigma=SIGMA, seed=5).set_noise()
    expected = linear.parameter_noise("weight", 0, D)
    assert_bitwise_equal(net[0].parameter_noise("weight", 0, D), expected.mT.contiguous())
    pm.allocate_memory()
    assert net[0].held_bytes() == (linear.allocate(), linear.held_bytes())[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@torch.no_grad()
def test_conv1d_in_every_dtype(dtype):
    net, pm = population(conv1d(), dtype=dtype)
    x = torch.randn(2 * D, IN).to(dtype)
    y = pm(x)
    assert y.dtype == dtype
    exact = []
    for b in range(2 * D):
        noise = {
            n: p
            for n, p in (
                (n, net[0].parameter_noise(n, b % D, 1)[0].double()) for n in ("weight", "bias")
            )
        }
        s = SIGMA if b < D else -SIGMA
        weight, bias = (getattr(net[0], n).double() + s * e for n, e in noise.items())
        exact.append(x[b].double() @ weight + bias)
    plain = torch.cat([pm.member(b % D, 1 if b < D else -1)(x[b : b + 1]) for b in range(2 * D)])
    if dtype == torch.float64:
        same(y, torch.stack(exact))
    else:
        assert_close_to_reference(y, plain, torch.stack(exact), factor=4.0)


def test_conv1d_passes_gradients_on():
    _, pm = population(conv1d())
    x = torch.randn(2 * D, IN).double().requires_grad_()
    weights = torch.randn(2 * D, OUT).double()
    got = torch.autograd.grad((pm(x) * weights).sum(), x)[0]
    for b in range(2 * D):
        member = pm.member(b % D, 1 if b < D else -1)
        same(got[b], torch.autograd.grad((member(x[b : b + 1]) * weights[b]).sum(), x)[0][b])


def test_conv1d_comes_back_as_it_was():
    layer = conv1d()
    kind, weight = type(layer), layer.weight
    x = torch.randn(3, IN)
    expected = layer(x)
    net = nn.Sequential(layer)
    convert(net, D, LowRank(2))
    assert_bitwise_equal(net(x), expected)
    assert f"in_features={IN}, out_features={OUT}, directions={D}, noise=LowRank(2)" in repr(net)
    assert type(revert(net)[0]) is kind
    assert net[0].weight is weight


def test_conv1d_checks_sizes_and_inputs():
    with pytest.raises(ValueError, match=r"rank must be at most min\(in, out\) = 5 of a \(5, 6\)"):
        convert(nn.Sequential(conv1d()), D, LowRank(6))
    _, pm = population(conv1d())
    with pytest.raises(
        ValueError, match=r"x must be \(B, \*, 6\) with B = R \* D rows, got \(6,\)"
    ):
        pm(torch.randn(IN).double())
    with pytest.raises(TypeError, match="floating point"):
        pm(torch.ones(D, IN).int())


def test_nothing_imports_the_library():
    code = "import sys, perturbed; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- RMSNorms ----------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize(
    ("repeats", "antithetic", "negated"), [(1, None, False), (4, None, True), (3, False, False)]
)
def test_norms_keep_their_formula_in_every_row(kind, repeats, antithetic, negated):
    net, pm = population(kind(), LowRank(2, "rademacher"), antithetic)
    assert type(net[0]) is PerturbedLibraryNorm
    assert net[0].noise == Dense("rademacher")
    check_members(pm, torch.randn(repeats * D, 4, IN).double(), negated)
    short = pm.replicate(torch.randn(4, IN).double())
    with torch.no_grad():
        same(pm(short), pm(short.full()))
        assert pm(torch.ones(0, IN).double()).shape == (0, IN)


@each_norm
def test_norms_estimate_their_own_noise(kind):
    check_estimates(*population(kind()))


@each_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@torch.no_grad()
def test_norms_in_every_dtype(kind, dtype):
    net, pm = population(kind(), dtype=dtype)
    x = torch.randn(2 * D, 4, IN).to(dtype)
    y = pm(x)
    plain = torch.cat([pm.member(b % D, 1 if b < D else -1)(x[b : b + 1]) for b in range(2 * D)])
    s = signs(2 * D, D, True).view(2, D, 1, 1)
    e = net[0].parameter_noise("weight", 0, D).double()[:, None]
    weight = net[0].weight.double() + (kind is OffsetRMSNorm) + SIGMA * s * e
    wide = x.double()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = (normal.view(2, D, 4, IN) * weight).flatten(0, 1)
    assert y.dtype == plain.dtype
    if dtype == torch.float64:
        same(y, plain)
        same(y, exact, 1e-6)  # both formulas compute in float32
    else:
        assert_close_to_reference(y, plain, exact)


@each_norm
def test_norms_pass_gradients_on(kind):
    _, pm = population(kind())
    x = torch.randn(2 * D, IN).double().requires_grad_()
    weights = torch.randn(2 * D, IN).double()
    got = torch.autograd.grad((pm(x) * weights).sum(), x)[0]
    for b in range(2 * D):
        member = pm.member(b % D, 1 if b < D else -1)
        expected = torch.autograd.grad((member(x[b : b + 1]) * weights[b]).sum(), x)[0]
        same(got[b], expected[b], 1e-6)


@each_norm
@torch.no_grad()
def test_frozen_norms_have_no_noise(kind):
    net = convert(nn.Sequential(kind(), nn.Linear(IN, 3)).double(), D)
    net[0].requires_grad_(False)
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    check_members(pm, torch.randn(2 * D, IN).double(), True)
    short = pm.replicate(torch.randn(4, IN).double())
    same(pm(short), pm(short.full()))


@each_norm
def test_norms_come_back_as_they_were(kind):
    layer = kind()
    x = torch.randn(3, IN)
    expected = layer(x)
    net = nn.Sequential(layer)
    convert(net, D)
    assert_bitwise_equal(net(x), expected)
    pm = PerturbedModel(net, D)
    pm.set_noise()
    again = pickle.loads(pickle.dumps(pm))
    x = torch.randn(2 * D, IN)
    assert_bitwise_equal(again(x), pm(x))
    assert type(revert(net)[0]) is kind


@each_norm
@torch.no_grad()
def test_norms_compile(kind):
    _, pm = population(kind())
    torch._dynamo.reset()
    compiled = torch.compile(pm.model, backend="eager", fullgraph=True)
    x = torch.randn(2 * D, 4, IN).double()
    for _ in range(2):
        with pm.perturbed():
            assert_bitwise_equal(compiled(x), pm(x))
        pm.set_noise()


class GatedRMSNorm(RoundedRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class ParentRMSNorm(RoundedRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class FlatRMSNorm(RoundedRMSNorm):
    """Rows and tokens become one dimension: a weight per row no longer fits."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return (self.weight * flat / flat.norm(dim=-1, keepdim=True)).view(x.shape)


class WeightlessRMSNorm(RoundedRMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class BiasedRMSNorm(RoundedRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(IN))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (GatedRMSNorm, "takes no weight per row (TypeError"),
        (ParentRMSNorm, "takes no weight per row (TypeError"),
        (FlatRMSNorm, "takes no weight per row (RuntimeError"),
        (WeightlessRMSNorm, "takes no weight per row"),
        (BiasedRMSNorm, "its state is not just a vector of weights"),
    ],
)
def test_norms_that_do_something_else_are_reported(kind, why):
    net = nn.Sequential(kind(), nn.Linear(IN, 3))
    with pytest.warns(UserWarning, match="without noise"):
        convert(net, D)
    assert type(net[0]) is kind
    assert why in str(perturbed.conversion_report(net))
