"""MujocoEnv gives gymnasium's own numbers, for all tasks, lanes, threads and ends."""

import threading

import numpy as np
import pytest
import torch

from perturbed.rl import MujocoEnv
from perturbed.rl.mujoco_tasks import TASKS

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `rl`")
pytest.importorskip("mujoco", reason="needs the extra `rl`")

SEEDS = torch.tensor([7, 8, 2**40])


def random_actions(env, steps, scale=1.0):
    """(steps, lanes, action_size) float64, now and then outside the actuators' bounds."""
    shape = (steps, env.lanes, env.action_size)
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0))


def trajectory(name, seed, actions):
    """Observations (T + 1, n), rewards, terminated, truncated of plain gymnasium, to its end."""
    env = gymnasium.make(name)
    observations, steps = [env.reset(seed=seed)[0]], []
    for action in actions:
        observation, *rest = env.step(action.numpy())
        observations.append(observation)
        steps.append(rest[:3])
        if rest[1] or rest[2]:
            break
    env.close()
    rewards, terminated, truncated = zip(*steps, strict=True)
    return np.array(observations), np.array(rewards), terminated[-1], truncated[-1]


@pytest.mark.parametrize("name", TASKS)
def test_trajectories_are_gymnasiums(name):
    """Exact: observations as their float32, rewards to 1e-12 (the order of a sum). 250 steps."""
    env = MujocoEnv(name, lanes=len(SEEDS), threads=2)
    actions = random_actions(env, 250, 0.2 if name == "Walker2d-v5" else 1.0)
    observations = [env.reset(SEEDS)]
    rewards, ends = [], []
    for action in actions:
        observation, reward, *flags = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        ends.append(flags)
    for lane, seed in enumerate(SEEDS.tolist()):
        want = trajectory(name, seed, actions[:, lane])
        length = len(want[1])
        got = torch.stack(observations)[:, lane].numpy()
        np.testing.assert_array_equal(got[: length + 1], want[0].astype(np.float32))
        got = torch.stack(rewards)[:, lane].numpy()
        np.testing.assert_allclose(got[:length], want[1], rtol=1e-12, atol=1e-12)
        assert not got[length:].any(), "a lane that has ended earns nothing"
        for flags, last in zip(zip(*ends, strict=True), want[2:], strict=True):
            flag = torch.stack(flags)[:, lane]
            assert not flag[: length - 1].any()
            assert flag[length - 1 :].all() == last
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_sizes_bounds_and_limits_are_gymnasiums(name):
    env, plain = MujocoEnv(name, lanes=1), gymnasium.make(name)
    assert (env.observation_size,) == plain.observation_space.shape
    assert (env.action_size,) == plain.action_space.shape
    np.testing.assert_array_equal(env.action_low, plain.action_space.low)
    np.testing.assert_array_equal(env.action_high, plain.action_space.high)
    assert env.max_steps == plain.spec.max_episode_steps
    assert not env.discrete
    plain.close()


def test_half_cheetah_stays_with_gymnasium_for_a_whole_episode():
    """Contacts make it chaotic: without the solver's warm start it is elsewhere after 200 steps."""
    env = MujocoEnv("HalfCheetah-v5", lanes=1, threads=1)
    actions = random_actions(env, 1000)
    seen = [env.reset(torch.tensor([3]))[0]]
    for action in actions:
        observation, _, terminated, truncated = env.step(action)
        seen.append(observation[0])
    assert truncated.all()
    assert not terminated.any()
    want = trajectory("HalfCheetah-v5", 3, actions[:, 0])
    assert want[3]
    np.testing.assert_array_equal(torch.stack(seen).numpy(), want[0].astype(np.float32))


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_a_bit(threads):
    results = []
    for count in (2, threads):
        env = MujocoEnv("Hopper-v5", lanes=5, threads=count)
        seen = [env.reset(torch.arange(5))]
        seen += [env.step(action)[0] for action in random_actions(env, 30)]
        results.append(torch.stack(seen))
        env.close()
    assert torch.equal(*results)


def test_a_masked_reset_leaves_the_other_lanes_alone():
    env, other = (MujocoEnv("Swimmer-v5", lanes=3) for _ in range(2))
    for e in (env, other):
        e.reset(SEEDS)
    actions = random_actions(env, 4)
    env.step(actions[0]), other.step(actions[0])
    before = other.step(actions[1])[0]
    env.step(actions[1])
    fresh = env.reset(SEEDS + 1, torch.tensor([False, True, False]))
    assert torch.equal(fresh[[0, 2]], before[[0, 2]])
    assert torch.equal(fresh[1], env.reset(SEEDS + 1)[1])  # a start depends on its seed alone
    assert torch.equal(env.reset(SEEDS, torch.zeros(3, dtype=torch.bool)), env.reset(SEEDS + 1))


@pytest.mark.parametrize(("name", "steps"), [("InvertedPendulum-v5", 40), ("Swimmer-v5", 8)])
def test_only_running_lanes_are_simulated(name, steps, monkeypatch):
    env = MujocoEnv(name, lanes=4, max_steps=50 if TASKS[name].ends else 5)
    simulated = []
    whole = env._simulate
    monkeypatch.setattr(env, "_simulate", lambda lanes: (simulated.append(lanes), whole(lanes)))
    env.reset(torch.arange(4))
    env.set_idle(torch.tensor([False, False, False, True]))
    running = torch.tensor([True, True, True, False])
    for action in random_actions(env, steps, 3.0):
        simulated.clear()
        *_, terminated, truncated = env.step(action)
        got = [lanes.tolist() for lanes in simulated]
        assert got == ([running.nonzero().flatten().tolist()] if running.any() else [])
        running &= ~(terminated | truncated)
    assert not running.any()
    env.reset(torch.arange(4))
    env.step(action)
    assert simulated[-1].tolist() == [0, 1, 2, 3]


def test_a_saved_state_continues_bit_for_bit():
    env = MujocoEnv("Ant-v5", lanes=3, max_steps=20)
    actions = random_actions(env, 20)
    env.reset(SEEDS)
    for action in actions[:8]:
        env.step(action)
    state = env.state_dict()
    after = [torch.cat([p.double().view(3, -1) for p in env.step(a)], 1) for a in actions[8:]]
    other = MujocoEnv("Ant-v5", lanes=3, threads=1, max_steps=20)
    other.load_state_dict(state)
    again = [torch.cat([p.double().view(3, -1) for p in other.step(a)], 1) for a in actions[8:]]
    assert torch.equal(torch.stack(after), torch.stack(again))
    with pytest.raises(ValueError, match=r"state must have the entries \['extra'"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match=r"state\['state'\] must have shape"):
        MujocoEnv("Swimmer-v5", lanes=3).load_state_dict(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_controls_that_are_no_numbers_do_not_spread(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo would log a warning
    env = MujocoEnv("Swimmer-v5", lanes=2)
    env.reset(torch.tensor([0, 0]))
    observations, rewards, *_ = env.step(torch.tensor([[bad, 0.5], [0.0, 0.0]]))
    assert torch.equal(observations[0], observations[1])
    assert not rewards[0] > -1e20
    assert rewards[1].isfinite()
    assert not list(tmp_path.iterdir())


def test_close_ends_the_threads_and_a_step_brings_them_back():
    env = MujocoEnv("Swimmer-v5", lanes=4, threads=3)
    env.reset(torch.arange(4))
    env.step(torch.zeros(4, 2))
    running = [t for t in threading.enumerate() if t.name.startswith("mujoco")]
    assert running
    env.close()
    assert not any(thread.is_alive() for thread in running)
    env.step(torch.zeros(4, 2))
    env.close()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"name": "Humanoid-v5"}, ValueError, "name must be one of .*got 'Humanoid-v5'; GymEnv"),
        ({"name": 3}, TypeError, "name must be a string, got int"),
        ({"lanes": 0}, ValueError, "lanes must be at least 1, got 0"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    with pytest.raises(error, match=match):
        MujocoEnv(**{"name": "Swimmer-v5", "lanes": 2, **change})


def test_bad_seeds_and_actions_are_named_and_change_nothing():
    env = MujocoEnv("Swimmer-v5", lanes=2)
    before = env.reset(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="seeds must be at least 0, got -5"):
        env.reset(torch.tensor([3, -5]))
    with pytest.raises(ValueError, match=r"actions must have shape \(lanes, action_size\)"):
        env.step(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="actions must be a floating-point tensor"):
        env.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(env.reset(torch.tensor([9, 9]), torch.tensor([False, False])), before)


def test_loading_warns_of_nothing_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MujocoEnv("HalfCheetah-v5", lanes=1)
    assert not list(tmp_path.iterdir())


def test_without_mujoco_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mujoco", None)
    with pytest.raises(ImportError, match=r'pip install "perturbed\[rl\]"'):
        MujocoEnv("Swimmer-v5", lanes=2)
