"""Classic control in torch against gymnasium, whole trajectories; starts, clocks and states."""

import math

import pytest
import torch

from perturbed.rl import Acrobot, CartPole, MountainCarContinuous, Pendulum

ENVS = {
    "CartPole-v1": CartPole,
    "Acrobot-v1": Acrobot,
    "Pendulum-v1": Pendulum,
    "MountainCarContinuous-v0": MountainCarContinuous,
}
SEEDS = torch.arange(100, 104)


@pytest.fixture(params=ENVS)
def pair(request):
    """The environment under test in float64, and a gymnasium one."""
    gymnasium = pytest.importorskip("gymnasium", reason="compares with gymnasium")
    with gymnasium.make(request.param, disable_env_checker=True) as theirs:
        yield ENVS[request.param](len(SEEDS), dtype=torch.float64), theirs


def actions_of(env, step):
    """Actions that lead far: lane 0 as energetic as can be, the others at random."""
    generator = torch.Generator().manual_seed(step)
    if env.discrete:
        actions = torch.randint(env.action_size, (env.lanes,), generator=generator)
        if isinstance(env, Acrobot):  # pump: torque along the second joint's velocity
            actions[0] = 2 if env.state[0, 3] > 0 else 0
        elif isinstance(env, CartPole):  # balance for a while
            actions[0] = int(env.state[0, 2] + 0.5 * env.state[0, 3] > 0)
        return actions
    actions = 6 * torch.rand(env.lanes, env.action_size, generator=generator) - 3
    actions[0] = 1.0 if env.state[0, 1] >= 0 else -1.0
    return actions.double()


@pytest.mark.parametrize("lane", range(len(SEEDS)))
def test_trajectories_are_gymnasium_s(pair, lane):
    """Every step starts where ours is: rounding grows exponentially in a chaotic system."""
    env, theirs = pair
    observations = env.reset(SEEDS)
    theirs.reset()
    # Its state is float32 there; everything else is double.
    tolerance = 1e-6 if isinstance(env, MountainCarContinuous) else 1e-9
    for step in range(env.max_steps):
        actions = actions_of(env, step)
        theirs.unwrapped.state = env.state[lane].numpy().copy()
        action = actions[lane].item() if env.discrete else actions[lane].numpy()
        want = theirs.step(action)
        observations, rewards, terminated, truncated = env.step(actions)
        state = torch.as_tensor(theirs.unwrapped.state, dtype=torch.float64)
        torch.testing.assert_close(env.state[lane], state, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            observations[lane], torch.as_tensor(want[0], dtype=torch.float32), rtol=0, atol=2e-6
        )
        assert rewards[lane].item() == pytest.approx(float(want[1]), abs=1e-9)
        assert (terminated[lane].item(), truncated[lane].item()) == (want[2], want[3])
        if want[2] or want[3]:
            break
    assert want[2] or want[3]
    if lane == 0:  # both ways of ending are covered
        ends = {CartPole: (False, True), Pendulum: (False, True)}.get(type(env), (True, False))
        assert want[2:4] == ends


@pytest.mark.parametrize(("name", "steps"), [("CartPole-v1", 30), ("Acrobot-v1", 60)])
def test_free_trajectories_stay_together(name, steps):
    """Without setting back, for as long as rounding allows."""
    gymnasium = pytest.importorskip("gymnasium", reason="compares with gymnasium")
    env = ENVS[name](len(SEEDS), dtype=torch.float64)
    env.reset(SEEDS)
    with gymnasium.make(name, disable_env_checker=True) as theirs:
        theirs.reset()
        theirs.unwrapped.state = env.state[0].numpy().copy()
        for step in range(steps):
            actions = actions_of(env, step)
            theirs.step(actions[0].item())
            env.step(actions)
        state = torch.as_tensor(theirs.unwrapped.state, dtype=torch.float64)
    torch.testing.assert_close(env.state[0], state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ENVS.values(), ids=ENVS)
def test_starts_are_functions_of_the_seed(kind):
    env = kind(4)
    first = env.reset(torch.tensor([5, 6, 5, 7]))
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(kind(1).reset(torch.tensor([7])), first[3:])
    low, high = torch.tensor(kind.start_low), torch.tensor(kind.start_high)
    env = kind(2000)
    env.reset(torch.arange(2000))
    assert (env.state >= low).all()
    assert (env.state <= high).all()
    assert ((env.state.mean(0) - (low + high) / 2).abs() <= 0.1 * (high - low)).all()
    assert (env.state.amax(0) - env.state.amin(0) >= 0.98 * (high - low)).all()


@pytest.mark.parametrize("kind", ENVS.values(), ids=ENVS)
def test_a_masked_reset_leaves_the_others_alone(kind):
    env = kind(3)
    env.reset(torch.arange(3))
    for step in range(3):
        observations, *_ = env.step(actions_of(env, step))
    after = env.reset(torch.arange(10, 13), torch.tensor([False, True, False]))
    assert torch.equal(after[[0, 2]], observations[[0, 2]])
    assert torch.equal(after[1:2], kind(1).reset(torch.tensor([11])))
    assert env.time.tolist() == [3, 0, 3]


def test_time_ends_an_episode_per_lane():
    env = Pendulum(2, max_steps=3)
    env.reset(torch.arange(2))
    still = torch.zeros(2, 1)
    assert not env.step(still)[3].any()
    env.reset(torch.arange(2), torch.tensor([False, True]))
    ends = [env.step(still)[3].tolist() for _ in range(3)]
    assert ends == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize("kind", ENVS.values(), ids=ENVS)
def test_a_restored_state_goes_on_bit_for_bit(kind):
    env, other = kind(4), kind(4)
    env.reset(SEEDS)
    env.step(actions_of(env, 0))
    other.load_state_dict(env.state_dict())
    for step in range(5):
        actions = actions_of(env, step)
        for ours, restored in zip(env.step(actions), other.step(actions), strict=True):
            assert torch.equal(ours, restored)
    with pytest.raises(ValueError, match=r"\(lanes, n\) = \(3, "):
        kind(3).load_state_dict(env.state_dict())


def test_observations_are_float32_and_states_what_was_asked():
    env = Pendulum(2, dtype=torch.float64)
    assert env.reset(torch.arange(2)).dtype == torch.float32
    assert env.state.dtype == torch.float64
    assert math.isclose(float(env.action_high), 2.0)


def test_bad_use_is_named():
    with pytest.raises(RuntimeError, match="call reset"):
        CartPole(2).step(torch.zeros(2).long())
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        CartPole(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="lanes must be at least 1"):
        CartPole(0)
    env = CartPole(2)
    env.reset(torch.arange(2))
    with pytest.raises(TypeError, match="an int64 tensor"):
        env.step(torch.zeros(2))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ENVS.values(), ids=ENVS)
def test_starts_are_the_same_on_a_gpu(kind):
    cpu, gpu = kind(64), kind(64, device="cuda")
    seeds = torch.arange(64)
    cpu.reset(seeds)
    gpu.reset(seeds.cuda())
    torch.testing.assert_close(gpu.state.cpu(), cpu.state, rtol=1e-6, atol=1e-7)
