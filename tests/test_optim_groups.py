"""Baselines of groups: the definition, members that saw different groups, and lost values."""

import math

import pytest
import torch

import perturbed
from perturbed.optim import group_baseline, group_zscore
from perturbed.testing import devices

NAN, INF = math.nan, math.inf
both = pytest.mark.parametrize("function", [group_baseline, group_zscore])


def by_definition(values, groups, scale):
    """Each value against its group's mean (and deviation), averaged per member."""
    out = torch.zeros_like(values)
    for g in groups.unique():
        mine = groups == g
        relative = values[mine] - values[mine].mean()
        std = values[mine].std(unbiased=False)
        if scale:
            relative = relative / std if std > 0 else torch.zeros_like(relative)
        out[mine] = relative
    return out.flatten(2).mean(2)


@both
@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize("trailing", [(5,), (5, 3)], ids=str)
def test_the_third_dimension_counts_groups(function, signs, trailing):
    values = 10 * torch.randn(signs, 6, *trailing, dtype=torch.float64) + 3
    third = torch.arange(5).view(5, *(1,) * (len(trailing) - 1)).expand(values.shape)
    want = by_definition(values, third, function is group_zscore)
    torch.testing.assert_close(function(values), want)
    if len(trailing) == 1:
        torch.testing.assert_close(function(values, torch.arange(5)), want)


@both
def test_members_may_have_seen_different_groups(function):
    values = torch.randn(2, 8, 4, dtype=torch.float64)
    groups = torch.randint(-3, 3, (1, 8, 4)) * 10**12  # pairs alike; any numbers
    torch.testing.assert_close(
        function(values, groups),
        by_definition(values, groups.expand(2, 8, 4), function is group_zscore),
    )


@both
def test_what_a_prompt_adds_to_all_is_taken_out(function):
    skill = torch.randn(2, 8, 1, dtype=torch.float64)
    prompts = torch.randint(0, 4, (1, 8, 1))
    hardness = torch.tensor([0.0, 1e3, -50.0, 7.0], dtype=torch.float64)[prompts]
    torch.testing.assert_close(function(skill + hardness, prompts), function(skill, prompts))
    torch.testing.assert_close(function(-skill, prompts), -function(skill, prompts))


def test_every_group_has_the_same_say_in_a_zscore():
    values = torch.randn(2, 8, 3, dtype=torch.float64)
    scaled = values * torch.tensor([1e-6, 1.0, 1e9])
    torch.testing.assert_close(group_zscore(scaled), group_zscore(values))
    torch.testing.assert_close(group_zscore(values[..., :1]).std(unbiased=False).item(), 1.0)


@both
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_lost_value_loses_its_member_and_touches_nobody_else(function, bad):
    values = torch.randn(2, 5, 3)
    values[1, 2, 0] = bad
    values[:, :, 2] = torch.randn(2, 5)
    got = function(values)
    assert got[1, 2].isnan()
    assert got.isfinite().sum() == 9
    # Group 0 without the lost value.
    rest = torch.cat((values[0, :, 0], values[1, [0, 1, 3, 4], 0]))
    zero = rest - rest.mean()
    if function is group_zscore:
        zero = zero / rest.std(unbiased=False)
    alone = function(values[:, :, :1])
    torch.testing.assert_close(alone[alone.isfinite()], zero)


@both
@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
def test_equal_values_are_zeros(function, value):
    values = torch.full((2, 3, 4), value, dtype=torch.float64)
    got = function(values)
    assert got.abs().max() <= 1e-15 * value if function is group_baseline else (got == 0).all()


@both
def test_a_group_of_one_or_without_finite_values(function):
    assert (function(torch.tensor([[[5.0], [7.0]]]), torch.tensor([[[0], [1]]])) == 0).all()
    assert function(torch.full((2, 3, 4), NAN)).isnan().all()


def test_no_square_or_difference_leaves_the_range():
    values = torch.tensor([[[1.7e308], [-1.7e308], [0.0]]], dtype=torch.float64)
    want = torch.tensor([[1.5**0.5, -(1.5**0.5), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_zscore(values), want)
    small = values * 2.0**-2
    torch.testing.assert_close(group_baseline(small), small[..., 0], rtol=1e-15, atol=1e293)


@both
def test_counts_and_half_precision(function):
    hits = torch.rand(2, 4, 3) < 0.5
    torch.testing.assert_close(function(hits), function(hits.double()))
    assert function(torch.randn(2, 4, 3).half()).dtype == torch.float32


@both
@pytest.mark.parametrize("device", devices())
def test_nothing_waits_for_the_device(function, device):
    values, groups = torch.randn(2, 4, 3), torch.randint(0, 3, (1, 4, 3))
    there = values.to(device), groups.to(device)
    if torch.device(device).type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = function(*there)
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), function(values, groups))


@both
def test_arguments_are_checked(function):
    for shape in ((2, 4), (8,), (), (2, 0, 3)):
        with pytest.raises(ValueError, match=r"values must have shape \(S, D, G\)"):
            function(torch.zeros(shape))
    with pytest.raises(TypeError, match="values must be real numbers"):
        function(torch.zeros(2, 4, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"groups must be a tensor of integers, got torch\.float32"):
        function(torch.zeros(2, 4, 3), torch.zeros(3))
    with pytest.raises(TypeError, match="groups must be a tensor of integers, got list"):
        function(torch.zeros(2, 4, 3), [0, 1, 2])
    with pytest.raises(ValueError, match=r"groups must broadcast to the values' shape \(2, 4, 3\)"):
        function(torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int64))


# ---- with a model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("antithetic", "repeats", "signs"), [(None, 6, 2), (True, 2, 2), (False, 3, 1), (None, 1, 1)]
)
def test_member_rows_sort_the_batch(antithetic, repeats, signs):
    net = perturbed.convert(torch.nn.Linear(3, 1), directions=4)
    pm = perturbed.PerturbedModel(net, 4, antithetic)
    rows = torch.arange(repeats * 4 * 2.0).view(repeats * 4, 2)
    sorted_rows = pm.member_rows(rows)
    n = repeats // signs
    assert sorted_rows.shape == (signs, 4, n, 2)
    for s in range(signs):
        for d in range(4):
            for i in range(n):
                assert torch.equal(sorted_rows[s, d, i], rows[(s * n + i) * 4 + d])
    torch.testing.assert_close(sorted_rows.mean((2, 3)), pm.member_mean(rows))


def test_member_rows_count_what_replicate_shows():
    net = perturbed.convert(torch.nn.Linear(3, 1), directions=4)
    pm = perturbed.PerturbedModel(net, 4)
    x = torch.randn(5, 3)
    assert torch.equal(pm.member_rows(pm.replicate(x).full()), x.expand(2, 4, 5, 3))
    with pytest.raises(ValueError, match="D = 4 directions, got 7 rows"):
        pm.member_rows(torch.zeros(7))
    with pytest.raises(TypeError, match="got list"):
        pm.member_rows([0.0] * 8)


def test_prompts_of_different_hardness_do_not_mislead():
    """Members that see prompts of their own learn as if all had seen the same."""
    torch.manual_seed(0)
    hardness = 100.0 * torch.randn(8)

    def train(relative):
        net = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.zeros_(net.weight)
        pm = perturbed.PerturbedModel(perturbed.convert(net, directions=32), 32, False, sigma=0.1)
        nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), 0.02), "zscore")
        for step in range(40):
            generator = torch.Generator().manual_seed(step)
            prompts = torch.randint(0, 8, (1, 32, 1), generator=generator)

            def closure(prompts=prompts):
                error = (pm(torch.eye(4).repeat_interleave(32, 0)) - 1).square()
                values = pm.member_rows(error[:, 0]).mean(2, keepdim=True) + hardness[prompts]
                return group_baseline(values, prompts) if relative else values.mean(2)

            nes.step(closure)
        return (net.weight - 1).square().mean()

    assert train(True) < 0.3 * train(False)
