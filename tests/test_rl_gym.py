"""GymEnv: lanes are gymnasium's own episodes, ends last until a reset, errors name the lane."""

import numpy as np
import pytest
import torch

from perturbed.rl import GymEnv

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `rl`")

SEEDS = torch.tensor([3, 4, 5])


class Countdown(gymnasium.Env):
    """Observe how many steps are left, from the seed; end at 0. An action of 7 raises."""

    observation_space = gymnasium.spaces.Box(0, 100, (2, 1), np.float64)
    action_space = gymnasium.spaces.Box(-1, 9, (1, 2), np.float32)
    stepped = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = seed
        return self.observation(), {}

    def step(self, action):
        assert action.shape == (1, 2)
        assert action.dtype == np.float32
        if action[0, 0] == 7:
            raise ArithmeticError("seven")
        type(self).stepped += 1
        self.left -= 1
        return self.observation(), float(action[0, 1]), self.left <= 0, False, {}

    def observation(self):
        return np.full((2, 1), float(self.left))


class Letters(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(3, start=10)
    action_space = gymnasium.spaces.Discrete(4, start=-1)

    def reset(self, *, seed=None, options=None):
        return 10 + seed % 3, {}

    def step(self, action):
        return 10 + (int(action) + 1) % 3, float(action), False, False, {}


class Shifting(Countdown):
    """Its observations change their shape."""

    def observation(self):
        return np.zeros(2 + (self.left < 2))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_lanes_are_gymnasiums_episodes(name, mode):
    env = GymEnv(name, lanes=3, vectorization_mode=mode, max_steps=60)
    seen, rewards, ends = [env.reset(SEEDS)], [], []
    shape = (70, 3) if env.discrete else (70, 3, 1)
    actions = torch.randint(2, shape) if env.discrete else torch.randn(shape)
    for action in actions:
        observation, reward, terminated, truncated = env.step(action)
        seen.append(observation)
        rewards.append(reward)
        ends.append(terminated | truncated)
    env.close()
    for lane, seed in enumerate(SEEDS.tolist()):
        plain = gymnasium.make(name, max_episode_steps=60)
        want = [plain.reset(seed=seed)[0]]
        for t, action in enumerate(actions[:, lane]):
            observation, reward, terminated, truncated, _ = plain.step(action.numpy())
            want.append(observation)
            assert rewards[t][lane] == float(reward)
            assert ends[t][lane] == (terminated or truncated)
            if terminated or truncated:
                break
        got = torch.stack(seen)[:, lane]
        np.testing.assert_array_equal(got[: len(want)], np.array(want, dtype=np.float32))
        assert (got[len(want) :] == got[-1]).all()
        assert all(end[lane] for end in ends[t:]), "an end lasts"
        assert not any(reward[lane] for reward in rewards[t + 1 :])


def test_box_shapes_dtypes_and_bounds():
    env = GymEnv(Countdown, lanes=3, max_steps=50)
    assert (env.observation_size, env.action_size, env.discrete) == (2, 2, False)
    assert env.action_low.tolist() == [-1, -1]
    assert env.action_high.tolist() == [9, 9]
    assert env.reset(SEEDS).tolist() == [[3, 3], [4, 4], [5, 5]]
    actions = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    observations, rewards, terminated, truncated = env.step(actions)
    assert observations.dtype == torch.float32
    assert observations.tolist() == [[2, 2], [3, 3], [4, 4]]
    assert rewards.tolist() == [1, 2, 3]
    assert not (terminated | truncated).any()


def test_discrete_spaces_and_their_starts():
    env = GymEnv(Letters, lanes=3, max_steps=5)
    assert (env.observation_size, env.action_size, env.discrete) == (3, 4, True)
    assert env.reset(torch.tensor([0, 1, 5])).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    observations, rewards, *_ = env.step(torch.tensor([0, 1, 3]))
    assert rewards.tolist() == [-1, 0, 2]  # index 0 is the action -1
    assert observations.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_ended_lanes_rest_until_a_masked_reset():
    env = GymEnv(Countdown, lanes=3, max_steps=50)
    env.reset(SEEDS)
    Countdown.stepped = 0
    for _ in range(10):
        observations, _, terminated, _ = env.step(torch.ones(3, 2))
    assert Countdown.stepped == 3 + 4 + 5
    assert terminated.all()
    assert not observations.any()
    restarted = env.reset(torch.tensor([9, 8, 7]), torch.tensor([False, True, False]))
    assert restarted.tolist() == [[0, 0], [8, 8], [0, 0]]
    observations, rewards, terminated, _ = env.step(torch.ones(3, 2))
    assert observations.tolist() == [[0, 0], [7, 7], [0, 0]]
    assert rewards.tolist() == [0, 1, 0]
    assert terminated.tolist() == [True, False, True]


def test_episodes_without_an_end_are_cut():
    env = GymEnv(Letters, lanes=2, max_steps=3)
    env.reset(torch.tensor([0, 0]))
    cuts = [env.step(torch.tensor([0, 0]))[3].tolist() for _ in range(4)]
    assert cuts == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    with pytest.raises(ValueError, match="max_steps must be given"):
        GymEnv(Letters, lanes=2)


def test_a_vector_environment_of_the_callers():
    mode = gymnasium.vector.AutoresetMode
    make = [lambda: gymnasium.wrappers.TimeLimit(Countdown(), 4)] * 3
    vector = gymnasium.vector.SyncVectorEnv(make, autoreset_mode=mode.DISABLED)
    env = GymEnv(vector, max_steps=6)
    assert env.lanes == 3
    env.reset(torch.tensor([2, 5, 20]))
    for _ in range(9):  # the first is restarted unseen several times
        observations, rewards, terminated, truncated = env.step(torch.ones(3, 2))
    assert observations[:, 0].tolist() == [0, 1, 16]
    assert terminated.tolist() == [True, False, False]
    assert truncated.tolist() == [False, True, True]
    assert not rewards.any()
    env.close()
    assert not vector.closed
    with pytest.raises(ValueError, match=r"autoreset_mode=AutoresetMode.DISABLED, got .*NEXT_STEP"):
        GymEnv(gymnasium.vector.SyncVectorEnv(make), max_steps=6)
    with pytest.raises(ValueError, match="lanes must be the VectorEnv's 3 or None, got 4"):
        GymEnv(vector, lanes=4, max_steps=6)


def test_a_first_reset_of_some_lanes_starts_all():
    env = GymEnv("CartPole-v1", lanes=3)
    first = env.reset(SEEDS, torch.tensor([True, False, True]))
    assert first.abs().sum(1).gt(0).all()
    assert torch.equal(env.reset(SEEDS)[[0, 2]], first[[0, 2]])
    assert torch.equal(env.reset(SEEDS + 1, torch.zeros(3, dtype=torch.bool)), env.reset(SEEDS))


@pytest.mark.filterwarnings("ignore:.*ERROR")  # gymnasium repeats what it raises
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_environment_that_raises_is_named(mode):
    env = GymEnv(Countdown, lanes=3, vectorization_mode=mode, max_steps=50)
    env.reset(SEEDS)
    actions = torch.tensor([[0.0, 0.0], [7.0, 0.0], [0.0, 0.0]])
    with pytest.raises(RuntimeError, match="lane 1 failed in step: ArithmeticError: seven"):
        env.step(actions)


def test_an_environment_that_leaves_its_space_is_named():
    env = GymEnv(lambda: gymnasium.wrappers.TimeLimit(Shifting(), 9), 1, max_steps=9)
    with pytest.raises(RuntimeError, match=r"lane 0 failed in reset: ValueError: .*shape \(2,\)"):
        env.reset(torch.tensor([5]))


@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_other_spaces_are_named(which):
    other = gymnasium.spaces.MultiBinary(3)
    odd = type("Odd", (Countdown,), {which: other})
    with pytest.raises(ValueError, match=r"space must be Box or Discrete, got MultiBinary\(3\)"):
        GymEnv(odd, lanes=2, max_steps=3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        ({"lanes": None}, ValueError, "lanes must be given"),
        ({"vectorization_mode": "threads"}, ValueError, "vectorization_mode must be one of"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"source": 3}, TypeError, "source must be a name, a function .* got int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        GymEnv(**{"source": "CartPole-v1", "lanes": 2, **arguments})


def test_bad_calls_are_named():
    env = GymEnv("CartPole-v1", lanes=2)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="seeds must be at least 0, got -1"):
        env.reset(torch.tensor([0, -1]))
    env.reset(torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="actions must be an int64 tensor"):
        env.step(torch.zeros(2))


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r'pip install "perturbed\[rl\]"'):
        GymEnv("CartPole-v1", lanes=2)
