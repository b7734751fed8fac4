"""Perturbed linear layers, alone: one E_d however it is asked for, and what a layer accepts."""

import pytest
import torch
import torch.nn.functional as F
from families import LINEAR, REPEATS, signs
from torch import nn

from perturbed import Dense, PerturbedLinear, PerturbedModel, _ops
from perturbed.noise import dense
from perturbed.testing import DTYPES, assert_bitwise_equal, assert_close_to_reference, dtype_id

SIGMA = 0.3
IN, OUT, D = 6, 5, 3

each_family = pytest.mark.parametrize("family", LINEAR)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
# Rows per direction with which the layer calls the kernels, and matrix products from scratch.
each_regime = pytest.mark.parametrize("repeats", [2, dense.GEMM_ROWS], ids=["kernel", "products"])
each_repeats = pytest.mark.parametrize(("repeats", "antithetic", "negated"), REPEATS)


def population(family="dense-normal", antithetic=None, directions=D, **arguments):
    arguments = {"dtype": torch.float64, **arguments}
    layer = LINEAR[family](IN, OUT, directions, **arguments)
    pm = PerturbedModel(layer, directions, antithetic=antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return layer, pm


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


def same(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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


# ---- autograd and modes ------------------------------------------------------------------------


@each_family
@each_regime
@pytest.mark.parametrize("tokens", [None, 2], ids=["rows", "tokens"])
def test_gradients(family, repeats, tokens):
    """With respect to input and parameters: those of the member that each row sees."""
    layer, pm = population(family)
    shape = (repeats * D, IN) if tokens is None else (repeats * D, tokens, IN)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if tokens == 2 and repeats > 2:
        x = x.detach()[: 12 * D].requires_grad_()  # products all the same, in half the time

    def forward(x, weight, bias):
        with pm.perturbed():
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias), fast_mode=True)
    (grad,) = torch.autograd.grad(pm(x)[-1].sum(), x)
    member = pm.member((len(x) - 1) % D, -1)
    same(grad[-1], member.weight.sum(0).expand_as(grad[-1]))
    assert not grad[:-1].any()


@each_regime
def test_a_backward_keeps_the_noise_of_its_forward(repeats):
    _, pm = population()
    x = torch.randn(repeats * D, IN, dtype=torch.float64, requires_grad=True)
    y = pm(x)
    member = pm.member(0)
    pm.set_noise(2 * SIGMA)
    (grad,) = torch.autograd.grad(y[0].sum(), x)
    same(grad[0], member.weight.sum(0))


@each_regime
def test_a_frozen_bias_or_weight_still_lets_gradients_through(repeats):
    for frozen in ("weight", "bias"):
        layer, pm = population()
        getattr(layer, frozen).requires_grad_(False)
        pm.set_noise()
        x = torch.randn(repeats * D, IN, dtype=torch.float64, requires_grad=True)
        y = pm(x)
        member = pm.member(1)
        same(y[1], member(x[1]))
        (grad,) = torch.autograd.grad(y[1].sum(), x)
        same(grad[1], member.weight.sum(0))


def test_the_operators_that_write_in_place_refuse_gradients():
    layer, pm = population()
    key, sigma = pm.state.tensors(torch.device("cpu"))
    site = layer.site
    x = torch.randn(D, 1, IN, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(D, 1, OUT, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not differentiable; use dense_linear"):
        _ops.dense_linear_(y, x, key, sigma, site.weight, site.bias, D, False, False)
    assert not y.any()
    _ops.dense_linear_(y, x.detach(), key, sigma, site.weight, site.bias, D, False, False)
    assert y.all()


@each_family
@each_regime
def test_inference_mode(family, repeats):
    """Drawing, evaluating and estimating inside leaves nothing behind that fails outside."""
    layer, pm = population(family)
    x = torch.randn(repeats * D, IN, dtype=torch.float64)
    pm.free_memory()
    with torch.inference_mode():
        pm.set_noise()
        inside = pm(x)
        pm.set_grad(inside.square().mean(1)[:D])
        member = pm.member(0)
    assert inside.is_inference()
    assert not any(p.is_inference() for p in member.parameters())
    first = layer.weight.grad.clone()
    outside = pm(x.requires_grad_())
    same(outside.detach(), inside.clone())
    outside.sum().backward()  # adds to the gradient made in inference mode
    pm.set_grad(inside.square().mean(1)[:D])
    same(layer.weight.grad, first)
    pm.set_noise()
    assert (pm(x) - inside).abs().max() > 0.01


@each_family
@each_regime
@pytest.mark.parametrize("short", [False, True], ids=["rows", "replicated"])
def test_autocast(family, repeats, short):
    """As F.linear: bfloat16 out of float32 weights and inputs; the noise is that of float32."""
    layer, pm = population(family, dtype=torch.float32)
    x = torch.randn(repeats // 2, IN)
    x = pm.replicate(x) if short else pm.replicate(x).full()
    exact = pm(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, unperturbed = pm(x), layer(x)
    assert y.dtype == unperturbed.dtype == torch.bfloat16
    bound = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (y.float() - exact).abs().max() < bound
    assert (unperturbed.float() - exact).abs().max() > 4 * bound


@each_regime
@torch.no_grad()
def test_threads_do_not_matter(repeats):
    _, pm = population()
    x = torch.randn(repeats * D, 40, IN, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(pm(x))
    finally:
        torch.set_num_threads(before)
    same(results[1], results[0])
    same(results[2], results[0])


# ---- the layer as a torch layer ----------------------------------------------------------------


@each_bias
def test_parameters_are_those_of_the_torch_layer(bias):
    torch.manual_seed(3)
    plain = nn.Linear(IN, OUT, bias=bias)
    torch.manual_seed(3)
    layer = PerturbedLinear(IN, OUT, D, bias=bias)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for name, parameter in plain.named_parameters():
        assert_bitwise_equal(getattr(layer, name), parameter)
    x = torch.randn(7, IN)  # any number of rows: no noise outside of a model
    assert_bitwise_equal(layer(x), plain(x))
    assert_bitwise_equal(layer(x[0]), plain(x[0]))
    plain.load_state_dict(layer.state_dict(), strict=True)


def test_device_and_dtype_arguments():
    layer = PerturbedLinear(IN, OUT, D, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)


def test_repr_names_the_noise():
    text = repr(PerturbedLinear(IN, OUT, D, noise=Dense("rademacher", storage="stored")))
    assert text == (
        "PerturbedLinear(in_features=6, out_features=5, bias=True, directions=3, "
        "noise=Dense('rademacher', storage='stored'))"
    )


@pytest.mark.parametrize(
    ("directions", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)],
)
def test_bad_directions_are_refused(directions, error):
    with pytest.raises(error, match=f"directions must be .*{directions}"):
        PerturbedLinear(IN, OUT, directions)


def test_a_noise_that_is_no_family_is_refused():
    with pytest.raises(TypeError, match=r"noise must be a noise family .* got 'dense'"):
        PerturbedLinear(IN, OUT, D, noise="dense")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"distribution": "uniform"}, ValueError, "distribution .* got 'uniform'"),
        ({"storage": "disk"}, ValueError, "storage .* got 'disk'"),
        ({"dtype": torch.int8}, TypeError, "dtype .* got torch.int8"),
        ({"dtype": "float32"}, TypeError, "dtype .* got 'float32'"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Dense(**options)


def test_families_with_the_same_options_are_equal():
    assert Dense("normal") == Dense() != Dense("rademacher")
    assert len({Dense(), Dense("normal"), Dense(storage="stored")}) == 2


# ---- stored noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", dense.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_stored_noise_is_the_regenerated_noise(distribution, dtype):
    kept = LINEAR["dense-normal"](IN, OUT, D)
    results = []
    for noise in (Dense(distribution), Dense(distribution, storage="stored", dtype=dtype)):
        layer = PerturbedLinear(IN, OUT, D, noise=noise)
        layer.load_state_dict(kept.state_dict())
        pm = PerturbedModel(layer, D, sigma=SIGMA, seed=5)
        pm.set_noise()
        torch.manual_seed(0)
        y = pm(torch.randn(4 * D, IN))
        pm.set_grad(torch.randn(D))
        results.append((y, layer.weight.grad, pm.member(1).weight))
    exact = distribution == "rademacher" or dtype != torch.bfloat16
    tolerance = 1e-5 if exact else 0.02
    for regenerated, stored in zip(*results, strict=True):
        same(stored, regenerated, tolerance)
