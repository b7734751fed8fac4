"""BatchEnv's checks, and the seeds of episodes against their unsigned definition."""

import math

import pytest
import torch

from perturbed import _C
from perturbed.rl import BatchEnv
from perturbed.rl.seeds import hash_words, splitmix64, uniforms


class Counter(BatchEnv):
    """Observation: steps so far. Discrete or continuous."""

    def __init__(self, lanes=3, discrete=True, **options):
        super().__init__(lanes, 1, 2, discrete, max_steps=5, **options)
        self.time = torch.zeros(lanes, 1)

    def reset(self, seeds, mask=None):
        seeds, mask = self.check_reset(seeds, mask)
        self.time[mask] = 0
        return self.time.clone()

    def step(self, actions):
        self.check_actions(actions)
        self.time = self.time + 1
        never = torch.zeros(self.lanes, dtype=torch.bool)
        return self.time, torch.ones(self.lanes), never, self.time[:, 0] >= self.max_steps


# ---- seeds -------------------------------------------------------------------------------------


def test_splitmix64_has_the_bits_of_the_unsigned_one():
    words = [0, 1, 2, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    want = [_C.splitmix64(word % 2**64) for word in words]  # as int64
    assert splitmix64(torch.tensor(words)).tolist() == want


def test_hashes_differ_in_every_word_and_in_their_order():
    seeds = hash_words(torch.arange(20)[:, None, None], torch.arange(20)[:, None], torch.arange(20))
    assert seeds.unique().numel() == 8000
    assert seeds.min() >= 0
    assert hash_words(1, 2) != hash_words(2, 1)
    assert torch.equal(hash_words(2**64 - 1), hash_words(-1))  # the same 64 bits


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    n = 40_000
    numbers = uniforms(hash_words(torch.arange(n)), 3, -2.0, 4.0)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= -2
    assert numbers.max() < 4
    # 5 standard deviations of means and of correlations.
    assert ((numbers.mean(0) - 1).abs() < 5 * math.sqrt(3 / n)).all()
    assert ((numbers.var(0) / 3 - 1).abs() < 5 * math.sqrt(0.8 / n)).all()
    shifted = torch.cat((numbers, numbers.roll(1, 0)), 1)  # elements of a seed, and its neighbour's
    off = torch.corrcoef(shifted.T).fill_diagonal_(0)
    assert off.abs().max() < 5 / math.sqrt(n)
    assert torch.equal(uniforms(torch.tensor([5]), 2)[0], uniforms(torch.tensor([4, 5]), 7)[1, :2])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    uniforms(hash_words(3, torch.arange(4)), 2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        ({"lanes": 2.0}, TypeError, "lanes must be an int"),
        ({"discrete": 1}, TypeError, "discrete must be True or False"),
        ({"action_low": 0.0}, ValueError, "for continuous actions"),
        ({"discrete": False, "action_low": 1, "action_high": 0}, ValueError, "must not exceed"),
        ({"discrete": False, "action_low": torch.zeros(3)}, ValueError, r"shape \(2,\)"),
        ({"discrete": False, "action_high": math.nan}, ValueError, "without NaN"),
    ],
    ids=str,
)
def test_bad_sizes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Counter(**options)


def test_bounds_are_one_per_number():
    env = Counter(discrete=False, action_low=-1.0, action_high=torch.tensor([1.0, 2.0]))
    assert env.action_low.tolist() == [-1, -1]
    assert env.action_high.tolist() == [1, 2]
    free = Counter(discrete=False)
    assert free.action_low.tolist() == [-math.inf] * 2
    assert Counter().action_low is None


@pytest.mark.parametrize(
    ("seeds", "mask", "error", "message"),
    [
        ([1, 2, 3], None, TypeError, "seeds must be an int64 tensor"),
        (torch.ones(3), None, TypeError, "got a tensor of torch.float32"),
        (torch.ones(4).long(), None, ValueError, r"\(lanes,\) = \(3,\), got \(4,\)"),
        (torch.ones(3).long(), torch.ones(3), TypeError, "mask must be a bool tensor"),
        (torch.ones(3).long(), torch.ones(2).bool(), ValueError, "mask must have shape"),
    ],
    ids=str,
)
def test_bad_resets_are_named(seeds, mask, error, message):
    with pytest.raises(error, match=message):
        Counter().reset(seeds, mask)


@pytest.mark.parametrize(
    ("discrete", "actions", "error", "message"),
    [
        (True, torch.ones(3), TypeError, r"an int64 tensor of shape \(3,\)"),
        (True, torch.ones(3, 2).long(), ValueError, r"\(lanes,\) = \(3,\), got \(3, 2\)"),
        (False, torch.ones(3, 2).long(), TypeError, "a floating-point tensor"),
        (False, torch.ones(3), ValueError, r"\(lanes, action_size\) = \(3, 2\), got \(3,\)"),
        (False, None, TypeError, "got NoneType"),
    ],
    ids=str,
)
def test_bad_actions_are_named(discrete, actions, error, message):
    with pytest.raises(error, match=message):
        Counter(discrete=discrete).step(actions)


def test_saving_is_refused_where_nobody_wrote_it():
    with pytest.raises(NotImplementedError, match="Counter cannot save"):
        Counter().state_dict()
