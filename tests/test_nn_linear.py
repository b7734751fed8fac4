"""Perturbed linear layers: one E_d however it is asked for, in every dtype, shape and layout.

Autograd, modes of torch, and the layer as a torch layer: test_nn_linear_torch.py.
"""

import pytest
import torch
import torch.nn.functional as F
from families import IN, LINEAR, OUT, REPEATS, SIGMA, D, population, signs
from zoo import same

from perturbed import PerturbedLinear, PerturbedModel
from perturbed.noise import dense
from perturbed.testing import DTYPES, assert_bitwise_equal, assert_close_to_reference, dtype_id

each_family = pytest.mark.parametrize("family", LINEAR)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
# Rows per direction with which the layer calls the kernels, and matrix products from scratch.
each_regime = pytest.mark.parametrize("repeats", [2, dense.GEMM_ROWS], ids=["kernel", "products"])
each_repeats = pytest.mark.parametrize(("repeats", "antithetic", "negated"), REPEATS)


def noise_of(layer, directions=D):
    """s E_d and s e_d of every direction, float64."""
    weight = SIGMA * layer.parameter_noise("weight", 0, directions).double()
    if layer.bias is None:
        return weight, torch.zeros(directions, OUT, dtype=torch.float64)
    return weight, SIGMA * layer.parameter_noise("bias", 0, directions).double()


def expected_output(layer, x, negated):
    """The definition, row by row, in float64. x: (B, in)."""
    weight, bias = noise_of(layer, layer.directions)
    s = signs(len(x), layer.directions, negated)
    base_bias = 0 if layer.bias is None else layer.bias.detach().double()
    rows = []
    for b, row in enumerate(x.double()):
        d = b % layer.directions
        rows.append(
            (layer.weight.detach().double() + s[b] * weight[d]) @ row + base_bias + s[b] * bias[d]
        )
    return torch.stack(rows) if rows else x.new_zeros(0, OUT, dtype=torch.float64)


# ---- one noise ---------------------------------------------------------------------------------


@each_family
@each_bias
@each_repeats
@pytest.mark.parametrize("tokens", [False, True], ids=["rows", "tokens"])
@torch.no_grad()
def test_noise_probed_with_unit_inputs(family, bias, repeats, antithetic, negated, tokens):
    """Columns of W + s E_d show up for unit inputs, the bias for zeros."""
    layer, pm = population(family, antithetic, bias=bias)
    rows = repeats * D
    probes = torch.cat([torch.eye(IN), torch.zeros(1, IN)]).double()  # (in + 1, in)
    if tokens:
        probed = pm(probes.expand(rows, -1, -1)) - layer(probes)
    else:
        columns = [pm(p.expand(rows, -1)) - layer(p) for p in probes]
        probed = torch.stack(columns, 1)  # (B, in + 1, out)
    weight, e = noise_of(layer)
    s = signs(rows, D, negated)[:, None, None]
    same((probed[:, :-1] - probed[:, -1:]).mT, s * weight.repeat(repeats, 1, 1))
    same(probed[:, -1], s[..., 0] * e.repeat(repeats, 1))


@each_family
@each_bias
def test_members_and_estimates_hold_the_same_noise(family, bias):
    layer, pm = population(family, bias=bias)
    weight, e = noise_of(layer)
    assert weight.std() == pytest.approx(SIGMA, rel=0.3)
    for d in range(D):
        pm.set_grad(F.one_hot(torch.tensor(d), D).double())
        same(layer.weight.grad, weight[d])
        for sign in (1, -1):
            same(pm.member(d, sign).weight - layer.weight, sign * weight[d])
        if bias:
            same(layer.bias.grad, e[d])
            same(pm.member(d, -1).bias - layer.bias, -e[d])


@each_family
@each_repeats
@torch.no_grad()
def test_rows_are_their_members(family, repeats, antithetic, negated):
    _, pm = population(family, antithetic)
    x = torch.randn(repeats * D, IN, dtype=torch.float64)
    y = pm(x)
    s = signs(len(x), D, negated)
    for b in range(len(x)):
        same(pm.member(b % D, int(s[b]))(x[b]), y[b])


@each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("repeats", [1, 2, 4, dense.GEMM_ROWS])
@torch.no_grad()
def test_every_dtype_is_as_accurate_as_plain_torch(family, dtype, repeats):
    layer, pm = population(family, dtype=dtype)
    x = torch.randn(repeats * D, IN).to(dtype)
    y = pm(x)
    negated = repeats > 1
    weight, bias = (SIGMA * layer.parameter_noise(name, 0, D) for name in ("weight", "bias"))
    delta = torch.einsum("rdi,doi->rdo", x.unflatten(0, (repeats, D)), weight) + bias
    s = signs(len(x), D, negated).to(dtype)[:, None]
    plain = F.linear(x, layer.weight, layer.bias) + s * delta.flatten(0, 1)
    expected = expected_output(layer, x, negated)
    if dtype == torch.float64:
        same(y, expected)
    else:
        # Signs are summed as two sums whose difference counts, as in test_ops_dense.py.
        assert_close_to_reference(y, plain, expected, factor=4.0)


@each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_estimate_is_the_weighted_sum(family, dtype):
    layer, pm = population(family, dtype=dtype, directions=40)
    weights = torch.randn(40)
    pm.set_grad(weights)
    for name, parameter in layer.named_parameters():
        noise = layer.parameter_noise(name, 0, 40)
        plain = torch.tensordot(SIGMA * weights.to(dtype), noise, 1)
        expected = torch.tensordot(SIGMA * weights.double(), noise.double(), 1)
        assert parameter.grad.dtype == dtype
        if dtype == torch.float64:
            same(parameter.grad, expected)
        else:
            assert_close_to_reference(parameter.grad, plain, expected, factor=4.0)


@each_family
@torch.no_grad()
def test_partners_cancel(family):
    layer, pm = population(family)
    x = torch.randn(D, IN, dtype=torch.float64)
    plus, minus = pm(torch.cat([x, x])).chunk(2)
    assert (plus - minus).abs().max() > 0.1
    same((plus + minus) / 2, layer(x))


# ---- shapes and layouts ------------------------------------------------------------------------


@each_family
@each_regime
@pytest.mark.parametrize("extra", [(4,), (2, 3)], ids=["T", "T1xT2"])
@torch.no_grad()
def test_every_position_sees_the_weights_of_its_row(family, repeats, extra):
    _, pm = population(family)
    x = torch.randn(repeats * D, *extra, IN, dtype=torch.float64)
    y = pm(x)
    assert y.shape == (*x.shape[:-1], OUT)
    flat_x, flat_y = x.flatten(1, -2), y.flatten(1, -2)
    for t in range(flat_x.shape[1]):
        same(flat_y[:, t], pm(flat_x[:, t]))


LAYOUTS = {
    "features_first": lambda x: x.mT.contiguous().mT,
    "rows_last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "strided": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 2)[::2, :, ::3],
    "offset": lambda x: F.pad(x, (3, 1))[..., 3:-1],
    "expanded_rows": lambda x: x[:1].expand_as(x),
    "expanded_tokens": lambda x: x[:, :1].expand_as(x),
    "expanded_features": lambda x: x[..., :1].expand_as(x),
}


@each_family
@each_regime
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_of_the_input_does_not_matter(family, repeats, layout):
    _, pm = population(family)
    x = LAYOUTS[layout](torch.randn(repeats * D, 4, IN, dtype=torch.float64))
    assert not x.is_contiguous()
    before = x.clone()
    same(pm(x), pm(x.contiguous()))
    assert_bitwise_equal(x, before)


@each_family
@pytest.mark.parametrize("shape", [(0, IN), (0, 4, IN), (2 * D, 0, IN), (0, 0, IN)])
def test_empty_batches(family, shape):
    _, pm = population(family)
    y = pm(torch.empty(shape, dtype=torch.float64))
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@torch.no_grad()
def test_layers_without_inputs_or_outputs(inputs, outputs):
    layer = PerturbedLinear(inputs, outputs, D)
    pm = PerturbedModel(layer, D, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(2 * D, inputs)
    y = pm(x)
    pm.set_grad(torch.ones(D))
    assert y.shape == (2 * D, outputs)
    for b in range(len(x) if outputs else 0):
        torch.testing.assert_close(pm.member(b % D, 1 if b < D else -1)(x[b]), y[b])


@pytest.mark.parametrize(
    ("rows", "antithetic", "words"),
    [
        (7, None, r"R \* D rows, D = 3 .* got 7 .*flatten\(0, 1\)"),
        (9, None, r"even number of repeats R, got R = 3 \(9 rows, D = 3 .*flatten\(0, 1\)"),
        (3, True, "even number of repeats R, got R = 1"),
        (2, False, r"R \* D rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, antithetic, words):
    _, pm = population(antithetic=antithetic)
    with pytest.raises(ValueError, match=words):
        pm(torch.randn(rows, IN, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(2 * D, IN, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        (torch.ones(2 * D, IN, dtype=torch.bool), TypeError, "floating point, got torch.bool"),
        (torch.ones(2 * D, IN, dtype=torch.complex64), TypeError, "floating point"),
        (torch.ones(IN, dtype=torch.float64), ValueError, r"input must be \(B, \*, 6\)"),
        (torch.ones(2 * D, IN + 1, dtype=torch.float64), RuntimeError, "shapes"),
        (torch.ones(2 * D, IN, dtype=torch.float32), RuntimeError, "dtype"),
    ],
    ids=["int", "bool", "complex", "1d", "features", "other_float"],
)
def test_inputs_that_do_not_fit_are_refused(x, error, words):
    _, pm = population()
    with pytest.raises(error, match=words):
        pm(x)
    assert not pm.state.active
