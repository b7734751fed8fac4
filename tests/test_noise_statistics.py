"""Statistics of the noise: 10^7 draws a test, fixed seeds, limits of 5 standard errors.

The seeds are fixed, so a test either always passes or always fails; a limit of 5 sigma leaves room
for a change of seed. Draws come from `dense_materialise`, which test_noise.py and
test_noise_layout.py tie to the contract.
"""

import math

import numpy as np
import pytest
import torch

from perturbed import _C, _ops
from perturbed.testing import assert_bitwise_equal, devices

SIDE = 512
COUNT = 40  # directions of SIDE x SIDE elements: 1.05e7
LIMIT = 5.0
STREAM = 0
# P(|Z| > 5) = 5.7e-7 for a normal Z. The Kolmogorov statistic sqrt(N) sup |F_N - F| exceeds K with
# probability 2 exp(-2 K^2): the same odds at K = 2.74.
KOLMOGOROV_LIMIT = 2.74

each_device = pytest.mark.parametrize("device", devices())
each_distribution = pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "signs"])


def draw(device, rademacher, *, seed=2024, generation=1, stream=STREAM, first=0, shape=None):
    """(directions, rows, cols) float32; about 10^7 elements unless `shape` says otherwise."""
    key = torch.tensor([_C.splitmix64(seed), generation, 0], device=device)
    count, rows, cols = shape or (COUNT, SIDE, SIDE)
    return _ops.dense_materialise(key, stream, first, count, rows, cols, rademacher, torch.float32)


def z_score(sample_mean, mean, variance, count):
    return (float(sample_mean) - mean) / math.sqrt(variance / count)


def mean(values):
    """Sum in float64 without a float64 copy of 10^7 elements."""
    return values.sum(dtype=torch.float64) / values.numel()


# ---- one element -------------------------------------------------------------------------------


@each_device
def test_moments_of_normals(device):
    z = draw(device, rademacher=False)
    assert z.numel() >= 10**7
    moment = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]  # E z^k
    power = torch.ones_like(z)
    for k in range(1, 7):
        power *= z
        variance = moment[2 * k] - moment[k] ** 2
        assert abs(z_score(mean(power), moment[k], variance, z.numel())) <= LIMIT, f"moment {k}"


@each_device
def test_moments_of_signs(device):
    s = draw(device, rademacher=True)
    assert_bitwise_equal(s.abs(), torch.ones_like(s))
    assert abs(z_score(mean(s), 0, 1, s.numel())) <= LIMIT


@each_device
def test_distribution_of_normals(device):
    """Kolmogorov-Smirnov at 1000 quantiles, and chi-square of the cells between them."""
    z = draw(device, rademacher=False).flatten().cpu()
    cells = 1000
    edges = torch.special.ndtri(torch.arange(1, cells, dtype=torch.float64) / cells).float()
    counts = torch.bucketize(z, edges).bincount(minlength=cells).double()
    expected = z.numel() / cells
    deviation = (counts.cumsum(0) - expected * torch.arange(1, cells + 1)).abs().max()
    assert deviation / math.sqrt(z.numel()) <= KOLMOGOROV_LIMIT
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = cells - 1
    assert abs(chi_square - degrees) <= LIMIT * math.sqrt(2 * degrees)


@each_device
def test_tails_of_normals(device):
    """Counts beyond 3, 4 and 5 on both sides, and the largest value that the grid allows."""
    z = draw(device, rademacher=False)
    for level in (3.0, 4.0, 5.0):
        expected = z.numel() * math.erfc(level / math.sqrt(2)) / 2
        for side in (z, -z):
            count = int((side > level).sum())
            # Poisson; 5 deviations plus 5 because expected is only 3 beyond 5 sigma.
            assert abs(count - expected) <= LIMIT * math.sqrt(expected) + LIMIT
    assert z.abs().max() <= 5.77


@each_device
def test_angle_and_radius_of_pairs(device):
    """The two normals of a Box-Muller pair: uniform angle, exponential half square radius."""
    pairs = draw(device, rademacher=False).cpu().view(-1, 2)
    pairs = torch.cat([pairs, draw(device, False, generation=2).cpu().view(-1, 2)])
    cells = 256
    angle = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    survival = torch.exp(-0.5 * pairs.square().sum(1))
    for uniform in (angle, survival):
        index = (uniform.double() * cells).long().clamp(0, cells - 1)
        counts = index.bincount(minlength=cells).double()
        expected = pairs.shape[0] / cells
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - (cells - 1)) <= LIMIT * math.sqrt(2 * (cells - 1))


def test_bits_of_words():
    """Every bit is fair, neighbouring bits are independent, and bytes are uniform."""
    blocks = 2_500_000
    words = _C.words(_C.splitmix64(2024), 1, STREAM, 0, 0, blocks)
    assert words.size == 10**7
    z_square = 0.0
    for j in range(4):
        word = np.ascontiguousarray(words[:, j])
        for values in (word, word ^ (word >> 1 | word << 31)):
            bits = np.unpackbits(values.view(np.uint8)).reshape(blocks, 32)
            ones = bits.sum(0, dtype=np.int64)
            z = (ones - blocks / 2) / math.sqrt(blocks / 4)
            assert np.abs(z).max() <= LIMIT
            z_square += float((z**2).sum())
    # Each word gives 32 fair bits and 32 fair differences, of which all but one are independent.
    assert abs(z_square - 256) <= LIMIT * math.sqrt(2 * 256)
    counts = np.bincount(words.view(np.uint8).ravel(), minlength=256)
    expected = counts.sum() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) <= LIMIT * math.sqrt(2 * 255)


# ---- two elements ------------------------------------------------------------------------------


def assert_independent(a, b, rademacher):
    """Products, and for normals products of squares, average to zero within 5 standard errors."""
    a, b = a.reshape(-1), b.reshape(-1)
    count = a.numel()
    assert count >= 10**7
    assert abs(z_score(mean(a * b), 0, 1, count)) <= LIMIT
    if not rademacher:
        squares = mean((a * a - 1) * (b * b - 1))
        assert abs(z_score(squares, 0, 4, count)) <= LIMIT
        mixed = mean((a * a - 1) * b)
        assert abs(z_score(mixed, 0, 2, count)) <= LIMIT


@each_distribution
@each_device
@pytest.mark.parametrize(
    ("axis", "step"),
    [(0, 1), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (2, 32), (2, 128)],
    ids=lambda value: str(value),
)
def test_neighbours_are_independent(device, rademacher, axis, step):
    """Directions (axis 0), rows (1) and columns (2) that are `step` apart."""
    noise = draw(device, rademacher, shape=(COUNT + 14, SIDE, SIDE))
    size = noise.shape[axis] - step
    assert_independent(noise.narrow(axis, 0, size), noise.narrow(axis, step, size), rademacher)


@each_distribution
@each_device
@pytest.mark.parametrize(
    "other",
    [
        {"stream": STREAM + 1},
        {"stream": STREAM + (1 << 8)},
        {"stream": STREAM + (1 << 31)},
        {"generation": 2},
        {"generation": 1 + (1 << 31)},
        {"seed": 2025},
        {"seed": 2024 + (1 << 32)},
        {"first": 1 << 31},
    ],
    ids=str,
)
def test_other_addresses_are_independent(device, rademacher, other):
    """Another stream, layer, generation, seed or far direction, one bit of the counter away."""
    assert_independent(draw(device, rademacher), draw(device, rademacher, **other), rademacher)


@each_distribution
@each_device
def test_antithetic_partners_correlate_by_exactly_minus_one(device, rademacher):
    """One-hot inputs read back E_d from the forward pass: the partners' noise is E_d and -E_d."""
    tokens = torch.eye(SIDE, device=device)[None]
    key = torch.tensor([_C.splitmix64(2024), 1, 0], device=device)
    sigma = torch.tensor(1.0, dtype=torch.float64, device=device)
    y = torch.zeros(2 * COUNT, SIDE, SIDE, device=device)
    _ops.dense_linear_(y, tokens, key, sigma, STREAM, -1, COUNT, True, rademacher)
    plus, minus = y.chunk(2)
    assert plus.numel() >= 10**7
    assert_bitwise_equal(minus, -plus)
    noise = draw(device, rademacher).mT
    if device == "cpu":
        assert_bitwise_equal(plus, noise)
    else:  # products on tensor cores may round the noise to tf32, 11 bits
        torch.testing.assert_close(plus, noise, rtol=2**-10, atol=1e-6)


# ---- over directions ---------------------------------------------------------------------------


@each_distribution
@each_device
def test_every_element_has_unit_variance_and_no_covariance(device, rademacher):
    """E_d over d as D samples of a vector of p = 32 x 32 elements: covariance I."""
    count, rows, cols = 10_240, 32, 32
    p = rows * cols
    noise = draw(device, rademacher, shape=(count, rows, cols)).flatten(1).double()
    assert (noise.mean(0).abs() * math.sqrt(count)).max() <= LIMIT
    covariance = noise.mT @ noise / count
    if rademacher:
        assert (covariance.diagonal() == 1).all()
    else:
        assert ((covariance.diagonal() - 1).abs() * math.sqrt(count / 2)).max() <= LIMIT
    lower = covariance[tuple(torch.tril_indices(p, p, -1))] * math.sqrt(count)
    # The largest of p (p - 1) / 2 = 5e5 normals passes 7 with the odds of one passing 5.
    assert lower.abs().max() <= 7
    assert abs(z_score(lower.square().mean(), 1, 2, lower.numel())) <= LIMIT
    # Marchenko and Pastur (1967): the spectrum ends at (1 +- sqrt(p / D))^2, plus fluctuations.
    edges = torch.linalg.eigvalsh(covariance)[[0, -1]]
    expected = torch.tensor([(1 - math.sqrt(p / count)) ** 2, (1 + math.sqrt(p / count)) ** 2])
    torch.testing.assert_close(edges.cpu(), expected.double(), rtol=0.03, atol=0)
