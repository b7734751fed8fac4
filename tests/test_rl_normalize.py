"""ObservationNorm: merging is one pass over all, freezing, bad numbers, saved states."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from perturbed.rl import ObservationNorm
from perturbed.rl.moments import exact_sum, moments


def synced(data, mask=None):
    norm = ObservationNorm(data.shape[-1])
    norm.update(data, mask)
    norm.sync()
    return norm


def same(norm, other, tolerance=1e-12):
    for name in ("count", "mean", "m2"):
        a, b = getattr(norm, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_moments_are_torch_s_and_normalised_data_is_standard():
    data = 3 + 2 * torch.randn(500, 4, dtype=torch.float64)
    norm = synced(data)
    torch.testing.assert_close(norm.mean, data.mean(0))
    torch.testing.assert_close(norm.m2 / 500, data.var(0, correction=0))
    out = norm(data)
    torch.testing.assert_close(out.mean(0), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(4).double())
    assert norm(data.float()).dtype == torch.float32
    assert norm(data.view(50, 10, 4)).shape == (50, 10, 4)


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (0, 12), (12, 0), (3, 0, 9)], ids=str)
def test_merging_is_one_pass_over_all(sizes):
    data = 1e4 + torch.randn(12, 3, dtype=torch.float64)  # a mean far above the deviation
    whole, merged, piecewise = synced(data), ObservationNorm(3), ObservationNorm(3)
    for part in data.split(sizes):
        merged.merge(synced(part))
        piecewise.update(part)
    piecewise.sync()
    same(merged, whole, 1e-9)
    same(piecewise, whole, 1e-9)


def test_deltas_of_two_processes_make_the_same_statistic():
    data = torch.randn(4, 20, 3)
    whole = synced(data)
    ranks = [ObservationNorm(3), ObservationNorm(3)]
    for generation in range(2):
        for rank, norm in enumerate(ranks):
            norm.update(data[2 * generation + rank])
        deltas = [norm.collect() for norm in ranks]
        for norm in ranks:
            for delta in deltas:
                norm.merge(delta)
            assert norm.collect()["count"] == 0
    same(ranks[0], whole)
    same(ranks[0], ranks[1], 0)


def test_parts_add_up_to_the_same_bits_in_any_order_and_grouping():
    """What makes statistics independent of how a population is split over processes."""
    rows = 1e3 * torch.randn(33, 24, 3, dtype=torch.float64)  # steps, lanes, size
    rows[:, 5] *= 1e-9
    rows[20:, 7] = torch.nan  # of a lane that has ended
    whole = ObservationNorm(3)
    whole.set_aside(*moments(rows))
    whole.sync()
    parts = ObservationNorm(3)
    for lanes in torch.randperm(24).split((5, 1, 11, 7)):
        # More steps than the lanes need: of no meaning, masked.
        more = torch.cat((rows[:, lanes], torch.randn(90, len(lanes), 3).double()))
        mask = torch.zeros(123, len(lanes)).bool()
        mask[:33] = True
        parts.set_aside(*moments(more, mask))
    parts.sync()
    same(parts, whole, 0)
    flat = rows[rows.isfinite()].view(-1, 3)
    assert whole.count == len(flat) == 33 * 24 - 13
    torch.testing.assert_close(whole.mean, flat.mean(0), rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(whole.m2 / len(flat), flat.var(0, correction=0), rtol=1e-13, atol=0)


def test_sums_are_exact():
    """To a double's last bit where nothing cancels; cancelled ones to 2^-76 of the largest."""
    values = torch.randn(1000, 40, dtype=torch.float64)
    values *= 10.0 ** torch.arange(
        -300.0, 300.0, 15.0, dtype=torch.float64
    )  # columns of every size
    want = [math.fsum(column) for column in values.t().tolist()]
    got = exact_sum(values)
    errors = (got - torch.tensor(want, dtype=torch.float64)).abs()
    # From 2^-900 = 1e-271 on downwards digits are those of 2^-900.
    assert (errors <= got.abs() * 2.0**-52 + values.abs().amax(0) * 2.0**-65 + 1e-290).all()
    assert torch.equal(got, exact_sum(values[torch.randperm(1000)]))
    assert not torch.equal(got, values.sum(0))  # what it is for
    assert torch.equal(exact_sum(torch.zeros(3, 2).double()), torch.zeros(2).double())


def test_a_held_norm_waits_for_its_release():
    norm, x = ObservationNorm(2), torch.randn(5, 2)
    norm.hold()
    norm.update(x)
    norm.sync()
    assert norm.count == 0
    norm.release()
    assert norm.count == 5
    norm.update(x)
    norm.sync()
    assert norm.count == 10


def test_nothing_counts_before_sync():
    norm = ObservationNorm(2)
    x = torch.randn(5, 2)
    norm.update(5 * torch.randn(30, 2))
    assert torch.equal(norm(x), x)
    norm.sync()
    assert norm.count == 30
    assert not torch.equal(norm(x), x)


def test_frozen_and_evaluation_mode_update_nothing():
    norm = ObservationNorm(2)
    with norm.frozen():
        norm.update(torch.randn(5, 2))
    norm.eval().update(torch.randn(5, 2))
    norm.sync()
    assert norm.count == 0
    with norm.frozen():
        assert not norm.training
    assert not norm.training  # as it was before the block
    norm.train().update(torch.randn(5, 2))
    norm.sync()
    assert norm.count == 5


def test_masked_and_broken_rows_do_not_count():
    data = torch.randn(6, 2)
    mask = torch.tensor([True, True, False, True, True, True])
    broken = data.clone()
    broken[3, 1], broken[4, 0], broken[2] = torch.nan, torch.inf, torch.nan
    same(synced(broken, mask), synced(data[[0, 1, 5]]))
    none = synced(data, torch.zeros(6).bool())
    assert none.count == 0
    assert torch.equal(none(data), data)


def test_an_element_that_does_not_vary_is_centred_only():
    data = torch.stack((torch.full((9,), 7.0), torch.randn(9)), 1)
    norm = synced(data)
    assert (norm(data)[:, 0] == 0).all()
    assert norm(torch.tensor([[8.0, 0.0]]))[0, 0] == 1
    one = synced(data[:1])
    assert torch.equal(one(data[:1]), torch.zeros(1, 2))


def test_moments_stay_in_double_whatever_the_module_is_cast_to():
    model = nn.Sequential(ObservationNorm(2), nn.Linear(2, 1))
    model[0].update(torch.randn(5, 2) + 1e6)
    model.half()
    assert model[1].weight.dtype == torch.float16
    assert model[0].pending_mean.dtype == torch.float64
    assert model[0].pending_mean.min() > 1e5  # beyond half precision


def test_state_dict_holds_pending_data_too():
    norm = synced(torch.randn(7, 3))
    norm.update(torch.randn(4, 3))
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other = ObservationNorm(3)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(norm)
    for each in (norm, other, twin):
        each.sync()
    same(other, norm, 0)
    same(twin, norm, 0)
    assert norm.count == 11


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n: ObservationNorm(0), ValueError, "size must be at least 1"),
        (lambda n: ObservationNorm(2, eps=-1.0), ValueError, "eps must be finite"),
        (lambda n: n(torch.ones(4, 3)), ValueError, r"\(\*, 2\), got \(4, 3\)"),
        (lambda n: n.update(torch.ones(4, 2).int()), TypeError, "floating-point tensor"),
        (lambda n: n.update(torch.ones(4, 2), torch.ones(3).bool()), ValueError, "mask must"),
        (lambda n: n.update(torch.ones(4, 2), torch.ones(4)), ValueError, "mask must be a bool"),
        (lambda n: n.merge([1.0]), TypeError, "an ObservationNorm or a dict"),
        (lambda n: n.merge({"count": 1}), ValueError, "must have the entries"),
        (lambda n: n.merge(ObservationNorm(3)), ValueError, r"\(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, error, message):
    norm = synced(torch.randn(5, 2))
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(error, match=message):
        call(norm)
    assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)


def test_broken_deltas_are_refused():
    norm = ObservationNorm(1)
    delta = synced(torch.randn(4, 1)).state_dict()
    delta = {name: delta[name] for name in ("count", "mean", "m2")} | {
        "mean": torch.tensor([torch.nan])
    }
    with pytest.raises(ValueError, match=r"other\['mean'\] must be finite"):
        norm.merge(delta)
    assert norm.count == 0
