"""Perturbed convolutions among torch's: dtypes, autograd, modes, compilation, construction."""

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, signs
from geometries import GEOMETRIES, SIGMA, D
from test_nn_conv import SOME, WAYS
from test_nn_conv import way as way
from torch import nn
from zoo import same

import perturbed
from perturbed import Dense, PerturbedConv2d, PerturbedConvTranspose2d, PerturbedModel
from perturbed.noise import convolution
from perturbed.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_close_to_reference,
    dtype_id,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_way = pytest.mark.parametrize("way", WAYS, indirect=True)
each_of_some = pytest.mark.parametrize("family", sorted(SOME))


# ---- dtypes ------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@torch.no_grad()
def test_every_dtype_is_as_accurate_as_plain_torch(family, dtype):
    for geometry in ("groups", "pointwise", "whole", "transposed"):
        kind = GEOMETRIES[geometry]
        layer, pm = kind.population(FAMILIES[family], dtype=dtype)
        apply = F.conv_transpose2d if layer.weight.shape[0] != layer.out_channels else F.conv2d
        keys = ("stride", "padding", "groups", "dilation")
        options = {key: getattr(layer, key) for key in keys}
        if apply is F.conv_transpose2d:
            options["output_padding"] = layer.output_padding
        x = kind.inputs(4 * D).to(dtype)
        s = signs(len(x), D, True)
        weight, bias = (layer.parameter_noise(name, 0, D) for name in ("weight", "bias"))
        plain, expected = [], []
        for b, row in enumerate(x):
            noise = SIGMA * weight[b % D], SIGMA * bias[b % D]
            base = apply(row[None], layer.weight, layer.bias, **options)
            plain.append(base + s[b].to(dtype) * apply(row[None], *noise, **options))
            sums = (
                p.double() + s[b] * SIGMA * e[b % D].double()
                for p, e in ((layer.weight, weight), (layer.bias, bias))
            )
            expected.append(apply(row[None].double(), *sums, **options))
        y = pm(x)
        assert y.dtype == dtype
        if dtype == torch.float64:
            same(y, torch.cat(expected))
        else:
            assert_close_to_reference(y, torch.cat(plain), torch.cat(expected), factor=4.0)


@each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_estimate_in_every_dtype(family, dtype):
    layer, pm = GEOMETRIES["groups"].population(FAMILIES[family], dtype=dtype, directions=40)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@each_of_some
@torch.no_grad()
def test_noise_below_the_resolution_of_the_weights_is_not_lost(family, dtype):
    """W + s E_d would round to W."""
    kind = GEOMETRIES["strided"]
    layer = kind.make(FAMILIES[family], dtype=dtype)
    layer.weight.fill_(1)
    pm = PerturbedModel(layer, D, sigma=1e-4)
    pm.set_noise()
    # Inputs that cancel under constant weights, so that the noise alone is left.
    x = torch.zeros(2 * D, 6, 6, 5, dtype=dtype)
    x[:, 0], x[:, 1] = 1, -1
    layer.bias.zero_()
    noise = 1e-4 * layer.parameter_noise("weight", 0, D).double()
    shift = 1e-4 * layer.parameter_noise("bias", 0, D).double()
    s = signs(len(x), D, True)
    for b, row in enumerate(x.double()):
        d = b % D
        expected = F.conv2d(row[None], s[b] * noise[d], s[b] * shift[d], (2, 1), 1)[0]
        torch.testing.assert_close(pm(x)[b].double(), expected, rtol=0.05, atol=1e-5)


# ---- autograd and modes ------------------------------------------------------------------------


@each_way
@each_of_some
def test_gradients(family, way):
    """With respect to input and parameters: those of the member that each row sees."""
    for geometry in ("groups", "pointwise_strided", "transposed", "reflect", "pixel"):
        kind = GEOMETRIES[geometry]
        layer, pm = kind.population(FAMILIES[family])
        x = kind.inputs(2 * D).requires_grad_()
        names = [name for name, _ in layer.named_parameters()]

        def forward(x, *parameters, pm=pm, layer=layer, names=names):
            with pm.perturbed():
                values = dict(zip(names, parameters, strict=True))
                return torch.func.functional_call(layer, values, (x,))

        assert torch.autograd.gradcheck(forward, (x, *layer.parameters()), fast_mode=True)
        (grad,) = torch.autograd.grad(pm(x)[-1].square().sum(), x)
        row = x[-1:].detach().requires_grad_()
        (expected,) = torch.autograd.grad(pm.member(D - 1, -1)(row).square().sum(), row)
        same(grad[-1:], expected)
        assert not grad[:-1].any()


@each_way
@each_of_some
def test_a_backward_keeps_the_noise_of_its_forward(family, way):
    kind = GEOMETRIES["3x3"]
    _, pm = kind.population(FAMILIES[family])
    x = kind.inputs(2 * D).requires_grad_()
    y = pm(x)
    member, row = pm.member(0), x[:1].detach().requires_grad_()
    pm.set_noise(2 * SIGMA)
    (grad,) = torch.autograd.grad(y[0].sum(), x)
    (expected,) = torch.autograd.grad(member(row).sum(), row)
    same(grad[:1], expected)


@each_way
@each_of_some
def test_inference_mode(family, way):
    kind = GEOMETRIES["strided"]
    layer, pm = kind.population(FAMILIES[family])
    x = kind.inputs(2 * D)
    with torch.inference_mode():
        pm.set_noise()
        inside = pm(x)
        pm.set_grad(inside.flatten(1).mean(1)[:D])
    first = layer.weight.grad.clone()
    outside = pm(x.requires_grad_())
    same(outside.detach(), inside.clone())
    outside.sum().backward()
    pm.set_grad(inside.flatten(1).mean(1)[:D])
    same(layer.weight.grad, first)


@each_of_some
@pytest.mark.parametrize("geometry", ["strided", "pointwise", "whole", "transposed"])
@pytest.mark.parametrize("short", [False, True], ids=["rows", "replicated"])
def test_autocast(family, geometry, short):
    """As the torch layer: bfloat16 out of float32 weights and inputs."""
    kind = GEOMETRIES[geometry]
    layer, pm = kind.population(FAMILIES[family], dtype=torch.float32)
    x = pm.replicate(kind.inputs(3).float())
    x = x if short else x.full()
    exact = pm(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, unperturbed = pm(x), layer(x)
    assert y.dtype == unperturbed.dtype == torch.bfloat16
    bound = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (y.float() - exact).abs().max() < bound
    assert (unperturbed.float() - exact).abs().max() > 4 * bound


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_sums_are_not_formed_where_products_round(precision):
    """TF32, the default of cuDNN's convolutions, would round the noise away with the weights."""
    settings = torch.backends.mkldnn.conv
    before = settings.fp32_precision
    assert convolution.holds_sums(torch.ones(1))
    try:
        settings.fp32_precision = precision
        assert not convolution.holds_sums(torch.ones(1))
        assert convolution.holds_sums(torch.ones(1, dtype=torch.float64))
    finally:
        settings.fp32_precision = before


@each_of_some
@pytest.mark.parametrize("repeats", [1, 2, 4])
@torch.no_grad()
def test_a_convolution_compiles_once(family, repeats):
    torch._dynamo.reset()
    kind = GEOMETRIES["groups"]
    layer, pm = kind.population(FAMILIES[family])
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x = kind.inputs(repeats * D)
    for generation in range(3):
        pm.set_noise(SIGMA / (1 + generation))
        with pm.perturbed():
            same(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("geometry", ["strided", "pointwise", "whole"])
@torch.no_grad()
def test_replicated_rows_cost_one_convolution_of_them(geometry, monkeypatch):
    """N rows enter torch's convolutions, not S * N * D."""
    kind = GEOMETRIES[geometry]
    _, pm = kind.population(Dense())
    rows = []
    for name in ("conv2d", "linear"):
        plain = getattr(F, name)

        def spy(x, *arguments, plain=plain):
            rows.append(x.shape[0])
            return plain(x, *arguments)

        monkeypatch.setattr(F, name, spy)
    monkeypatch.setattr(convolution, "_PLAIN", (F.conv1d, F.conv2d, F.conv3d))
    pm(pm.replicate(kind.inputs(40)))
    assert set(rows) == {40}


@pytest.mark.cuda
@pytest.mark.parametrize("short", [False, True], ids=["rows", "replicated"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@each_of_some
@torch.no_grad()
def test_a_gpu_computes_what_the_cpu_does(family, geometry, short):
    kind = GEOMETRIES[geometry]
    if (family, geometry) == ("permuted-both-few", "depthwise"):
        return  # refused, see test_nn_conv.py
    layer, pm = kind.population(FAMILIES[family], dtype=torch.float32)
    x = kind.inputs(4 if short else 4 * D).float()
    expected = pm(pm.replicate(x) if short else x)
    weights = torch.randn(D)
    pm.set_grad(weights)
    grads = [p.grad.clone() for p in layer.parameters()]
    pm.cuda()
    x = x.cuda()
    # TF32 is the default of cuDNN's convolutions: products are rounded, the noise is not lost.
    y = pm(pm.replicate(x) if short else x).cpu()
    assert (y - expected).norm() < 5e-3 * expected.norm()
    pm.set_grad(weights.cuda())
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), grad, rtol=1e-3, atol=1e-3)


def test_the_global_random_state_is_untouched():
    _, pm = GEOMETRIES["groups"].population(FAMILIES["permuted-both"])
    before = torch.get_rng_state()
    pm.set_noise()
    pm(torch.ones(2 * D, 12, 4, 5, dtype=torch.float64))
    pm.set_grad(torch.ones(D))
    assert torch.equal(torch.get_rng_state(), before)


# ---- the layer as a torch layer ----------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_parameters_and_outputs_are_those_of_the_torch_layer(geometry):
    kind = GEOMETRIES[geometry]
    torch.manual_seed(3)
    arguments = {"dtype": torch.float64, **kind.options}
    plain = kind.layer.torch_class(*kind.channels, kind.kernel, **arguments)
    torch.manual_seed(3)
    layer = kind.make(Dense())
    assert isinstance(layer, type(plain))
    assert list(layer.state_dict()) == list(plain.state_dict())
    for name, parameter in plain.named_parameters():
        assert_bitwise_equal(getattr(layer, name), parameter)
    x = kind.inputs(7)  # any number of rows: no noise outside of a model
    assert_bitwise_equal(layer(x), plain(x))
    assert_bitwise_equal(layer(x[0]), plain(x[0]))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_converted_and_reverted(geometry):
    kind = GEOMETRIES[geometry]
    arguments = {"dtype": torch.float64, **kind.options}
    plain = kind.layer.torch_class(*kind.channels, kind.kernel, **arguments)
    cls, weight, x = type(plain), plain.weight, kind.inputs(2 * D)
    expected = plain(x)
    perturbed.convert(plain, D)
    assert type(plain) is kind.layer
    pm = PerturbedModel(plain, D, sigma=SIGMA)
    pm.set_noise()
    same(pm(x)[-1], pm.member(D - 1, -1)(x[-1:])[0])
    assert perturbed.revert(plain) is plain
    assert type(plain) is cls
    assert plain.weight is weight
    assert_bitwise_equal(plain(x), expected)


@torch.no_grad()
def test_output_size_of_transposed_convolutions():
    layer = PerturbedConvTranspose2d(5, 6, 3, D, stride=2, dtype=torch.float64)
    pm = PerturbedModel(layer, D, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(2 * D, 5, 3, 4, dtype=torch.float64)
    for size in ([7, 9], [8, 10], [8, 9]):
        y = pm(x, output_size=size)
        assert list(y.shape[2:]) == size
        same(y[-1:], pm.member(D - 1, -1)(x[-1:], output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        pm(x, output_size=[9, 9])


@torch.no_grad()
def test_a_convnet_with_replicated_images():
    """Short form through layers that keep it, full rows from the first perturbed layer on."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(), nn.Linear(32, 4),
    ).double()  # fmt: skip
    perturbed.convert(net, D)
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    y = pm(pm.replicate(images)).view(2, 5, D, 4)
    for d in range(D):
        same(y[0, :, d], pm.member(d, 1)(images))
        same(y[1, :, d], pm.member(d, -1)(images))


def test_repr_names_the_noise():
    text = repr(PerturbedConv2d(6, 5, 3, D, stride=2, noise=Dense("rademacher")))
    assert text == (
        "PerturbedConv2d(6, 5, kernel_size=(3, 3), stride=(2, 2), directions=3, "
        "noise=Dense('rademacher'))"
    )


def test_device_and_dtype_arguments():
    layer = PerturbedConv2d(6, 5, 3, D, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.endswith("stored")])
@torch.no_grad()
def test_stored_noise_is_the_regenerated_noise(family):
    kind = GEOMETRIES["groups"]
    stored = FAMILIES[family]
    outputs = []
    for noise in (stored, Dense(stored.distribution)):
        torch.manual_seed(0)
        layer, pm = kind.population(noise)
        outputs.append(pm(kind.inputs(4 * D)))
        assert (layer.held_bytes() > 0) == (noise is stored)
        pm(kind.inputs(4 * D))  # the held noise is read, not written
        outputs.append(pm.member(1).weight)
    assert_bitwise_equal(outputs[0], outputs[2])
    assert_bitwise_equal(outputs[1], outputs[3])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@torch.no_grad()
def test_one_size_in_a_tuple_serves_all_axes_as_in_torch(kind):
    plain = kind(6, 5, 3, stride=(2,), padding=(1,), dilation=(2,)).double()
    net = perturbed.convert(nn.Sequential(plain), D)
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(2 * D, 6, 7, 6, dtype=torch.float64)
    y = pm(x)
    for b in range(len(x)):
        same(y[b], pm.member(b % D, 1 if b < D else -1)(x[b : b + 1])[0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("family", ["dense-normal", "permuted-both", "sign-flip-both"])
def test_kernels_without_taps_are_left_to_torch(family):
    layer = PerturbedConv2d(6, 5, 0, D, noise=FAMILIES[family])
    assert layer.weight.shape == nn.Conv2d(6, 5, 0).weight.shape == (5, 6, 0, 0)


def test_a_transposed_convolution_of_no_output_is_refused():
    layer = PerturbedConvTranspose2d(6, 5, 2, D, padding=2)
    pm = PerturbedModel(layer, D)
    pm.set_noise()
    with pytest.raises(ValueError, match=r"larger than its padding takes away, got spatial size"):
        pm(torch.ones(2 * D, 6, 3, 3))
