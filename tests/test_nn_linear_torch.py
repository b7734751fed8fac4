"""Perturbed linear layers among torch's: autograd, modes, construction, stored noise."""

import pytest
import torch
from families import IN, LINEAR, OUT, SIGMA, D, population
from torch import nn
from zoo import same

from perturbed import Dense, PerturbedLinear, PerturbedModel, _ops
from perturbed.noise import dense
from perturbed.testing import assert_bitwise_equal

each_family = pytest.mark.parametrize("family", LINEAR)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
# Rows per direction with which the layer calls the kernels, and matrix products from scratch.
each_regime = pytest.mark.parametrize("repeats", [2, dense.GEMM_ROWS], ids=["kernel", "products"])


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
