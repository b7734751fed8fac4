"""Fitness shaping: the formulas of the papers, ties, and losses that are no numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbed.optim import SHAPINGS, centered_rank, identity, nes_utilities, zscore
from perturbed.optim.shaping import finite_losses, resolve_shaping
from perturbed.testing import devices

NAN, INF = math.nan, math.inf
CENTRED = ("centered_rank", "nes_utilities", "zscore")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def ranks_by_counting(losses: list[float]) -> list[float]:
    """Mean rank of every loss, by definition: the lower ones and half of the other equal ones."""
    clean = [x if math.isfinite(x) else INF for x in losses]
    return [sum(y < x for y in clean) + (sum(y == x for y in clean) - 1) / 2 for x in clean]


def utilities_by_formula(losses: list[float]) -> list[float]:
    """Wierstra et al. (2014), tied places averaged; with the sign of a loss."""
    n = len(losses)
    raw = [max(0.0, math.log(n / 2 + 1) - math.log(k)) for k in range(1, n + 1)]
    by_place = [u / sum(raw) - 1 / n for u in raw]
    clean = [x if math.isfinite(x) else INF for x in losses]
    order = sorted(clean)
    shared = {
        x: sum(u for u, y in zip(by_place, order, strict=True) if y == x) / order.count(x)
        for x in order
    }
    return [-shared[x] for x in clean]


some_losses = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, NAN, INF, -INF]),
        st.floats(-1e6, 1e6, allow_nan=False, width=32),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(some_losses)
def test_ranks_and_utilities_are_those_of_the_definition(losses):
    got = centered_rank(torch.tensor(losses, dtype=torch.float64))
    n = len(losses)
    want = [(r - (n - 1) / 2) / max(n - 1, 1) for r in ranks_by_counting(losses)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)
    got = nes_utilities(torch.tensor(losses, dtype=torch.float64))
    want = torch.tensor(utilities_by_formula(losses), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@settings(max_examples=150, deadline=None)
@given(some_losses, st.sampled_from(sorted(SHAPINGS)))
def test_every_shaping_is_finite_monotone_and_fair(losses, name):
    weights = SHAPINGS[name](torch.tensor(losses))
    assert weights.shape == (len(losses),)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    if not any(map(math.isfinite, losses)):
        assert (weights == 0).all()
    clean = [x if math.isfinite(x) else INF for x in torch.tensor(losses).tolist()]
    for (a, u), (b, v) in itertools.product(zip(clean, weights.tolist(), strict=True), repeat=2):
        assert u == v if a == b else (a < b and u <= v) or (a > b and u >= v)


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (2, 64)], ids=str)
def test_weights_sum_to_zero_in_any_shape(name, shape):
    weights = SHAPINGS[name](torch.randn(shape, dtype=torch.float64))
    assert weights.shape == shape
    assert abs(weights.sum().item()) < 1e-12
    if weights.numel() > 1:
        assert weights.min() < 0 < weights.max()


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("value", [0.1, 0.0, -3e38, NAN, INF, -INF])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_equal_losses_weigh_nothing(name, value, n):
    assert (SHAPINGS[name](torch.full((n,), value)) == 0).all()


def test_ranks_see_the_whole_population_and_average_ties():
    losses = torch.tensor([[5.0, 1.0, 1.0], [NAN, 9.0, -INF]])
    # Sorted: 1 1 5 9 and the two lost ones; mean ranks .5 .5 2 3 4.5 4.5 of 0..5.
    want = torch.tensor([[2.0, 0.5, 0.5], [4.5, 3.0, 4.5]]) / 5 - 0.5
    torch.testing.assert_close(centered_rank(losses), want)


def test_utilities_of_four_by_hand():
    raw = torch.tensor([math.log(3), math.log(3) - math.log(2), 0.0, 0.0], dtype=torch.float64)
    want = 1 / 4 - raw / raw.sum()
    got = nes_utilities(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(got, want)


@dtypes
def test_zscore_is_standardised_and_blind_to_scale(dtype):
    losses = torch.randn(100, dtype=dtype)
    weights = zscore(losses)
    torch.testing.assert_close(weights.mean(), torch.zeros((), dtype=dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights.std(unbiased=False), torch.ones((), dtype=dtype))
    # Powers of two scale exactly; a naive sum of squares would overflow or vanish.
    for scale in (2.0**100, 2.0**-100):
        torch.testing.assert_close(zscore(losses * scale), weights)


def test_identity_and_zscore_replace_what_is_lost_by_the_worst_finite_loss():
    losses = torch.tensor([1.0, NAN, -2.0, INF, -INF])
    want = torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0])
    assert torch.equal(identity(losses), want)
    assert torch.equal(finite_losses(losses), want)
    assert torch.equal(zscore(losses), zscore(want))


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_empty_population(name):
    assert SHAPINGS[name](torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("name", sorted(SHAPINGS))
@pytest.mark.parametrize("device", devices())
def test_nothing_waits_for_the_device(name, device):
    losses = torch.tensor([[3.0, NAN, 1.0], [1.0, 2.0, INF]])
    want = SHAPINGS[name](losses)
    there = losses.to(device)
    if torch.device(device).type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = SHAPINGS[name](there)
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), want)


def test_a_callable_gets_finite_losses_and_cannot_poison():
    seen = []

    def divide_by_spread(losses):
        seen.append(losses)
        return losses / (losses - losses)

    shaping = resolve_shaping(divide_by_spread)
    weights = shaping(torch.tensor([[1.0, NAN, 0.0]]))
    assert torch.equal(seen[0], torch.tensor([[1.0, 1.0, 0.0]]))
    assert torch.equal(weights, torch.zeros(1, 3))
    double = resolve_shaping(lambda losses: 2 * losses.double())
    assert torch.equal(double(torch.tensor([1.0, INF, 3.0])), torch.tensor([2.0, 6.0, 6.0]))
    one = resolve_shaping(torch.ones_like)
    assert torch.equal(one(torch.tensor([NAN, INF])), torch.zeros(2))


def test_names_callables_and_what_is_neither():
    assert resolve_shaping("zscore") is zscore
    assert resolve_shaping(zscore) is zscore
    with pytest.raises(ValueError, match=r"shaping must be one of .*'zscore'.* got 'rank'"):
        resolve_shaping("rank")
    with pytest.raises(TypeError, match="name or a callable, got 3"):
        resolve_shaping(3)
    with pytest.raises(ValueError, match=r"one weight per loss, \(2, 3\), got \(3,\)"):
        resolve_shaping(lambda losses: losses[0])(torch.ones(2, 3))
    with pytest.raises(TypeError, match="must return a tensor of weights, got float"):
        resolve_shaping(lambda losses: 1.0)(torch.ones(2, 3))
