"""Convolutions of float32 rows on a CPU: our kernel and torch's grouped convolution agree."""

import pytest
import torch
from geometries import GEOMETRIES, D
from torch import nn

import perturbed
from perturbed import Dense, Explicit, LowRank, PerturbedConv2d, PerturbedModel
from perturbed.noise import conv_kernel, convolution
from perturbed.noise.convolution import Convolution, PopulationBatch
from perturbed.testing import assert_bitwise_equal

CHANNELS = 6, 20
SIZE = 9, 8
OPTIONS = {
    "plain": {},
    "padded": {"padding": (2, 1)},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same": {"padding": "same", "dilation": (1, 2)},
    "strided": {"stride": (2, 3), "padding": 1},
    "no-bias": {"bias": False},
}
NOISES = {
    "dense": Dense(),
    "low-rank": LowRank(1),
}
PAYS = conv_kernel.pays
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def population(noise, **options):
    return drawn(PerturbedConv2d(*CHANNELS, 3, D, noise=noise, **options), noise)


def drawn(layer, noise):
    pm = PerturbedModel(layer, D, sigma=0.3, seed=5)
    if isinstance(noise, Explicit):
        pm.set_members({n: torch.randn(D, *p.shape) for n, p in layer.named_parameters()})
    else:
        pm.set_noise()
    return layer, pm


def images(rows, channels_last=False):
    x = torch.randn(rows, CHANNELS[0], *SIZE)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The kernel runs wherever it can, not only where it is the faster way."""
    monkeypatch.setattr(conv_kernel, "pays", lambda *_: True)


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the kernel, which serves all families whatever their number of pixels."""
    monkeypatch.setattr(convolution, "SUM_POSITIONS", 0)
    made = []
    plain = conv_kernel.convolve_

    def spy(*arguments):
        made.append(arguments)
        plain(*arguments)

    monkeypatch.setattr(convolution, "convolve_", spy)
    return made


@each_option
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels-last"])
@torch.no_grad()
def test_rows_are_members(noise, options, channels_last, calls):
    _, pm = population(noise, **options)
    x = images(4 * D, channels_last)
    y = pm(x)
    assert calls
    for d in range(D):
        for sign, rows in ((1, slice(d, 2 * D, D)), (-1, slice(2 * D + d, 4 * D, D))):
            torch.testing.assert_close(y[rows], pm.member(d, sign)(x[rows]), rtol=1e-4, atol=1e-4)


@each_option
@pytest.mark.parametrize("short", [False, True], ids=["rows", "replicated"])
@torch.no_grad()
def test_explicit_rows_are_members(options, short, calls):
    _, pm = population(Explicit(), **options)
    x = pm.replicate(images(4)) if short else images(4 * D)
    y, rows = pm(x), x.full() if short else x
    assert calls
    for d in range(D):
        expected = pm.member(d)(rows[d::D])
        torch.testing.assert_close(y[d::D], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [Dense(), Explicit()], ids=["dense", "explicit"])
def test_gradients_take_the_other_way(noise, calls):
    """Its result is the same, and the kernel's comes back without gradients."""
    _, pm = population(noise)
    x = images(4 * D)
    y = pm(x.clone().requires_grad_())
    assert not calls
    assert y.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(pm(x), y, rtol=1e-4, atol=1e-4)
    assert calls


@pytest.mark.parametrize("rows_last", [False, True])
@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("noise", [*NOISES.values(), Explicit()], ids=[*NOISES, "explicit"])
def test_layout_of_the_output_is_that_of_torch(noise, rows_last, weights_last, monkeypatch):
    x = images(4 * D, rows_last)
    plain = nn.Conv2d(*CHANNELS, 3)
    layer, pm = population(noise)
    if weights_last:
        plain.to(memory_format=torch.channels_last)
        layer.to(memory_format=torch.channels_last)
    for rows in (x, x.clone().requires_grad_()):  # the kernel, and torch
        assert pm(rows).stride() == plain(rows).stride()
    with torch.no_grad():
        ours = pm(x)
        monkeypatch.setattr(conv_kernel, "pays", lambda *_: False)
        other = pm(x)
    assert other.stride() == ours.stride()
    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "size", "padding", "rows", "planes", "last"),
    [
        ((16, 8), 32, 0, 32, False, False),  # too few outputs
        ((3, 16), 8, 1, 1, True, True),  # inputs that oneDNN has no blocks for
        ((12, 16), 32, 1, 32, True, True),
        ((16, 16), 32, 0, 32, True, True),
        ((64, 64), 10, 0, 1, False, False),  # a large kernel for 64 positions
        ((64, 64), 10, 0, 8, True, True),
        ((32, 32), 32, 1, 8, False, True),  # some padding, and much
        ((32, 32), 8, 1, 8, False, False),
    ],
)
def test_where_it_is_the_faster_way(channels, size, padding, rows, planes, last):
    shape = torch.Size((channels[1], channels[0], 3, 3))
    for channels_last, expected in ((False, planes), (True, last)):
        conv = Convolution((1, 1), (padding, padding), (1, 1), channels_last=channels_last)
        x = torch.empty(rows * D, channels[0], size, size)
        assert PAYS(x, shape, conv, PopulationBatch(D, rows, False, 0)) is expected
        twice = torch.empty(2 * rows * D, channels[0], size, size)  # two kernels, as many rows each
        assert PAYS(twice, shape, conv, PopulationBatch(D, 2 * rows, True, 0)) is expected


@pytest.mark.parametrize("inputs", [1, 3, 16])
def test_where_it_is_the_faster_way_for_shared_rows(inputs):
    x = torch.empty(8, inputs, 28, 28)
    for channels_last in (False, True):
        conv = Convolution((1, 1), (0, 0), (1, 1), channels_last=channels_last)
        shape = torch.Size((16, inputs, 3, 3))
        assert PAYS(x, shape, conv, PopulationBatch(D, 8, False, 1)) is (
            channels_last or inputs == 1
        )


@torch.no_grad()
def test_bits_do_not_depend_on_other_rows_or_layout():
    _, pm = population(Explicit())
    x = images(6 * D)
    y = pm(x)
    assert_bitwise_equal(pm(x[: 2 * D]), y[: 2 * D])
    assert_bitwise_equal(pm(x.to(memory_format=torch.channels_last)), y)
    short = pm.replicate(images(5))
    assert_bitwise_equal(pm(short), pm(short.full()))


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    layer, pm = population(Dense(), padding=1)
    x = images(4 * D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pm.perturbed():
        assert_bitwise_equal(compiled(x), layer(x))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_every_geometry_in_float32(geometry):
    """Those without a kernel, too; the other tests of all geometries are in float64."""
    kind = GEOMETRIES[geometry]
    _, pm = drawn(kind.make(Explicit(), dtype=torch.float32), Explicit())
    x = kind.inputs(2 * D).float()
    y = pm(x)
    for d in range(D):
        torch.testing.assert_close(y[d::D], pm.member(d)(x[d::D]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_in_channels_last():
    """torch's own idiom; pooling then is several times as fast."""
    net = nn.Sequential(nn.Conv2d(1, 16, 4), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 8, 3))
    perturbed.convert(net, D, Explicit())
    pm = PerturbedModel(net, D)
    pm.set_members({n: torch.randn(D, *p.shape) for n, p in net.named_parameters()})
    x = pm.replicate(torch.randn(3, 1, 14, 14))
    expected = pm(x)
    assert expected.is_contiguous()
    net.to(memory_format=torch.channels_last)
    got = pm(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_bitwise_equal(got, expected)
