"""Rollouts against a loop over members and episodes; lanes, seeds, norm, and what goes wrong."""

import itertools
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed import Dense, PerturbedLinear, PerturbedModel
from perturbed.rl import BatchEnv, CartPole, ObservationNorm, Pendulum, Rollout, evaluate, rollout
from perturbed.rl.seeds import hash_words

D = 3
NAN = math.nan


def population(env_kind=CartPole, sigma=1.0, antithetic=None, seed=0):
    torch.manual_seed(3)
    sizes = env_kind.sizes
    net = nn.Sequential(PerturbedLinear(*sizes, D, noise=Dense()))
    pm = PerturbedModel(net, D, antithetic, sigma, seed)
    pm.set_noise()
    return pm


def play(policy, env, seed, norm=None, limit=10**9):
    """One episode of one policy, by hand: return, length, observations acted on."""
    observation = env.reset(torch.tensor([seed]))
    total, length, seen = 0.0, 0, []
    while True:
        seen.append(observation)
        with torch.no_grad():
            output = policy(observation if norm is None else norm(observation))
        action = output.argmax(1) if env.discrete else output.clamp(env.action_low, env.action_high)
        observation, reward, terminated, truncated = env.step(action)
        total, length = total + reward.double().item(), length + 1
        if terminated or truncated or length >= limit:
            return total, length, torch.cat(seen)


def looped(pm, env_kind, seeds, signs=2, **options):
    """All episodes of all members: returns and lengths (S, D, E); seeds (S, D, E)."""
    tables = torch.zeros(2, *seeds.shape, dtype=torch.float64)
    for s, d, e in torch.cartesian_prod(*(torch.arange(n) for n in seeds.shape)).tolist():
        member = pm.member(d, 1 - 2 * s)
        total, length, _ = play(member, env_kind(1), int(seeds[s, d, e]), **options)
        tables[:, s, d, e] = torch.tensor([total, length])
    return tables


class Script(BatchEnv):
    """Ends after ``lengths[seed]`` steps; reward is the action; observation: seed and time."""

    def __init__(self, lanes, lengths=(2, 3, 5, 1), max_steps=100, rewards=None):
        super().__init__(lanes, 2, 1, discrete=False, max_steps=max_steps)
        self.lengths = torch.tensor(lengths)
        self.seed = torch.zeros(lanes, dtype=torch.int64)
        self.time = torch.zeros(lanes, dtype=torch.int64)
        self.rewards, self.resets, self.idle = rewards, [], None

    def observe(self):
        return torch.stack((self.seed.float(), self.time.float()), 1)

    def reset(self, seeds, mask=None):
        seeds, mask = self.check_reset(seeds, mask)
        self.seed = torch.where(mask, seeds, self.seed)
        self.time = torch.where(mask, 0, self.time)
        self.resets.append((mask.clone(), seeds.clone()))
        return self.observe()

    def step(self, actions):
        actions = self.check_actions(actions)
        self.time = self.time + 1
        over = self.time >= self.lengths[self.seed % len(self.lengths)]
        reward = actions[:, 0] if self.rewards is None else self.rewards(self)
        return self.observe(), reward, over, self.time >= self.max_steps

    def set_idle(self, mask):
        self.idle = mask

    def state_dict(self):
        return {"seed": self.seed, "time": self.time}

    def load_state_dict(self, state):
        self.seed, self.time = state["seed"], state["time"]


def ones(observations):
    return torch.ones(len(observations), 1)


# ---- whole episodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("env_kind", [CartPole, Pendulum])
@pytest.mark.parametrize(("lanes", "count"), [(2, 4), (4, 4), (6, 2), (2, 1)], ids=str)
def test_every_member_plays_the_episodes_a_loop_would(env_kind, lanes, count):
    """``lanes`` of each direction, fewer and more than it has episodes."""
    pm = population(env_kind)
    result = rollout(pm, env_kind(lanes * D), count, seed=5)
    episode = torch.arange(count)
    seeds = hash_words(5, 0, 0, episode).expand(2, D, count)
    returns, lengths = looped(pm, env_kind, seeds)
    assert torch.equal(result.lengths, lengths.long())
    torch.testing.assert_close(result.episode_returns, returns, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.returns, result.episode_returns.mean(2))
    assert result.cost.steps == lengths.sum()
    assert result.cost.episodes == 2 * D * count
    assert result.cost.env_seconds > 0
    assert result.cost.policy_seconds > 0
    if env_kind is CartPole:
        assert len(lengths.unique()) > 3  # members differ


def test_without_pairs_there_is_one_sign():
    pm = population(antithetic=False)
    result = rollout(pm, CartPole(D), 2)
    assert result.returns.shape == (1, D)
    seeds = hash_words(0, 0, 0, torch.arange(2)).expand(1, D, 2)
    assert torch.equal(result.episode_returns, looped(pm, CartPole, seeds)[0])


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 9])
def test_refills_take_the_next_episode_whichever_lane_is_free(lanes):
    lengths = (4, 1, 1, 3, 2, 1)
    env = Script(lanes, lengths)
    result = rollout(ones, env, 6, seeds=torch.arange(6))
    assert result.lengths.tolist() == [[list(lengths)]]
    assert result.episode_returns.tolist() == [[[float(n) for n in lengths]]]
    assert result.cost.steps == sum(lengths)
    started = torch.cat([seeds[mask] for mask, seeds in env.resets])
    assert started.unique().numel() == 6 if lanes <= 6 else 9
    if lanes <= 6:
        assert len(started) == 6  # each once: no lane starts what nobody asked for


def test_idle_lanes_are_announced_and_do_not_count():
    env = Script(2, (1, 9))
    seen = []
    inner = env.set_idle
    env.set_idle = lambda mask: (seen.append(mask.tolist()), inner(mask))
    result = rollout(ones, env, 2, seeds=torch.arange(2), norm=(norm := ObservationNorm(2)))
    assert [True, False] in seen
    assert seen[0] == [False, False]
    assert result.cost.steps == 10
    assert norm.count == 10


def test_pm_around_a_function_is_named():
    pm = population()
    want = rollout(pm, CartPole(2 * D), 2)
    got = rollout(lambda x: pm(x), CartPole(2 * D), 2, pm=pm)
    assert torch.equal(got.returns, want.returns)
    assert rollout(lambda x: pm(x), CartPole(2 * D), 2).returns.shape == (1, 1)


# ---- seeds ---------------------------------------------------------------------------------------


def started(seeds, generation=None, pm=None, seed=0):
    """The seeds that rows of 2 signs x 2 lanes x D directions begin with: (S, n, D)."""
    env = Script(4 * D)
    pm = population(ScriptSizes) if pm is None else pm
    rollout(lambda x: ones(x), env, 2, pm=pm, seeds=seeds, generation=generation, seed=seed)
    return env.resets[0][1].view(2, 2, D)


class ScriptSizes:
    sizes = 2, 1


def test_members_share_episodes_as_asked():
    common, pairs, members = (started(name) for name in ("common", "pairs", "members"))
    assert common.unique().numel() == 2
    assert torch.equal(common[0, :, 0], common[1, :, 2])
    assert pairs.unique().numel() == 2 * D
    assert torch.equal(pairs[0], pairs[1])
    assert members.unique().numel() == 4 * D
    given = torch.arange(4 * D).view(2, D, 2)
    assert torch.equal(started(given), given.transpose(1, 2))


def test_generations_and_seeds_meet_other_episodes():
    pm = population(ScriptSizes)
    first = started("common", pm=pm)
    assert torch.equal(started("common", pm=pm), first)
    assert torch.equal(started("common", generation=0), first)
    pm.set_noise()
    second = started("common", pm=pm)
    assert torch.cat((first, second)).unique().numel() == 4
    assert not torch.equal(started("common", seed=1), first)
    assert torch.equal(started("common", generation=1), second)


def test_the_global_generator_is_left_alone():
    pm = population()
    before = torch.get_rng_state()
    rollout(pm, CartPole(2 * D), 2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- rewards and limits --------------------------------------------------------------------------


def test_the_shift_is_in_one_of_the_returns():
    result = rollout(ones, Script(2), 4, seeds=torch.arange(4), reward_shift=0.25)
    assert result.raw_returns.item() == (2 + 3 + 5 + 1) / 4
    assert result.returns.item() == 0.75 * (2 + 3 + 5 + 1) / 4
    assert result.episode_returns.sum() == 11


@pytest.mark.parametrize(("limit", "own"), [(3, 100), (None, 3), (7, 3), (3, 7)], ids=str)
def test_an_environment_that_never_ends_is_cut(limit, own):
    env = Script(2, (10**6,), max_steps=own)
    env.step = lambda actions, step=env.step: (*step(actions)[:3], torch.zeros(2).bool())
    result = rollout(ones, env, 3, max_steps=limit)
    assert result.lengths.flatten().tolist() == [3, 3, 3]


def test_a_nan_reward_is_the_member_s_return_alone():
    pm = population(ScriptSizes)

    def rewards(env):
        broken = (torch.arange(env.lanes) == 1) & (env.time == 2)
        return torch.where(broken, NAN, 1.0)

    returns = rollout(pm, Script(2 * D, (3,), rewards=rewards), 2, reward_shift=0.5).returns
    assert returns.isnan().nonzero().tolist() == [[0, 1]]
    nes = perturbed.NES(pm, torch.optim.SGD(pm.model.parameters(), 0.1), maximize=True)
    nes.step(lambda: rollout(pm, Script(2 * D, (3,), rewards=rewards), 2).returns)
    assert nes.stats["nonfinite"] == 1
    assert all(p.isfinite().all() for p in pm.model.parameters())


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("env_kind", [CartPole, Pendulum])
def test_unusable_outputs_score_nan(value, env_kind):
    def policy(x):
        out = torch.zeros(len(x), env_kind.sizes[1])
        out[1, 0] = value
        return out

    pm = population(env_kind)
    env = env_kind(2 * D, max_steps=10)
    returns = rollout(policy, env, pm=pm).returns
    masked = value == math.inf and env.discrete  # infinite logits are a choice
    assert returns.isnan().sum() == (0 if masked else 1)
    assert masked or returns[0, 1].isnan()
    assert env.state.isfinite().all()


def test_continuous_actions_are_clipped():
    seen = []
    env = Pendulum(2, max_steps=2)
    env.step = lambda actions, step=env.step: (seen.append(actions.clone()), step(actions))[1]
    rollout(lambda x: torch.tensor([[5.0], [-7.0]]), env, 2)
    assert torch.stack(seen).squeeze().tolist() == [[2, -2], [2, -2]]


def test_act_makes_actions_of_the_output():
    pm = population()
    want = rollout(pm, CartPole(2 * D), 2).returns
    logits = rollout(pm, CartPole(2 * D), 2, act=lambda out: 2 * out).returns
    indices = rollout(pm, CartPole(2 * D), 2, act=lambda out: out.argmax(1)).returns
    assert torch.equal(logits, want)
    assert torch.equal(indices, want)
    flipped = rollout(pm, CartPole(2 * D), 2, act=lambda out: -out).returns
    assert not torch.equal(flipped, want)


# ---- recurrent policies --------------------------------------------------------------------------


def count_steps(observations, state):
    """Output: steps since the state was cleared, plus what the state began with."""
    now = {"n": state["n"] + 1}
    return now["n"], now


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_state_starts_anew_with_every_episode(lanes):
    start = {"n": torch.full((lanes, 1), 10.0)}
    result = rollout(count_steps, Script(lanes), 4, seeds=torch.arange(4), state=start)
    want = [sum(10 + t for t in range(1, n + 1)) for n in (2, 3, 5, 1)]
    assert result.episode_returns.flatten().tolist() == want
    assert (start["n"] == 10).all()


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = perturbed.PerturbedGRUCell(4, 5, D)
        self.head = PerturbedLinear(5, 2, D)

    def forward(self, x, state):
        state = self.cell(x, state)
        return self.head(state), state


def test_a_recurrent_population_is_its_members():
    torch.manual_seed(0)
    pm = PerturbedModel(Memory(), D, sigma=0.5)
    pm.set_noise()
    result = rollout(pm, CartPole(4 * D), 3, state=torch.zeros(4 * D, 5))
    for s, d in [(0, 0), (1, 2)]:
        member = pm.member(d, 1 - 2 * s)
        got = rollout(
            member, CartPole(1), 3, state=torch.zeros(1, 5), generation=pm.state.generation
        )
        torch.testing.assert_close(got.episode_returns[0, 0], result.episode_returns[s, d])


# ---- windows -------------------------------------------------------------------------------------


def test_windows_are_pieces_of_one_run_and_add_up_to_episodes():
    lengths = (2, 3, 5, 1)
    pieces, whole = Rollout(ones, Script(2, lengths)), Rollout(ones, Script(2, lengths))
    windows = [pieces.run(steps) for steps in (1, 4, 7)]
    total = whole.run(12)
    assert sum(w.raw_returns.item() for w in windows) == total.raw_returns.item() == 12
    assert torch.equal(torch.cat([w.ended for w in windows]), total.ended)
    assert torch.equal(torch.cat([w.lengths for w in windows]), total.lengths)
    assert torch.equal(torch.cat([w.episode_returns for w in windows]), total.episode_returns)
    assert torch.equal(total.episode_returns, total.lengths.double())
    assert total.cost.steps == 24
    assert total.cost.episodes == len(total.ended)
    seeds = hash_words(0, 0, 0, torch.arange(40)).tolist()
    at, time, begun, ends = [0, 1], [0, 0], 2, []
    for _ in range(12):
        for lane in range(2):
            time[lane] += 1
            if time[lane] == lengths[seeds[at[lane]] % 4]:
                ends.append((lane, time[lane]))
                at[lane], time[lane], begun = begun, 0, begun + 1
    assert list(zip(total.ended.tolist(), total.lengths.tolist(), strict=True)) == ends
    assert pieces.run(3).cost.steps == 6


def test_windows_see_what_whole_episodes_would():
    pm = population()
    runner = Rollout(pm, CartPole(2 * D))
    windows = [runner.run(15) for _ in range(4)]
    whole = rollout(pm, CartPole(2 * D), 12)
    assert all((w.returns == 15).all() for w in windows)  # a reward of 1 in every step, refilled
    ended, lengths = (
        torch.cat([getattr(w, name) for w in windows]) for name in ("ended", "lengths")
    )
    for row in range(2 * D):
        own = lengths[ended == row].tolist()
        assert own == whole.lengths[row // D, row % D, : len(own)].tolist()
    assert len(ended) > 2 * D


def test_a_window_averages_lanes_and_subtracts_the_shift():
    pm = population(ScriptSizes)
    env = Script(4 * D, (100,), rewards=lambda env: torch.arange(4.0 * D))
    window = Rollout(lambda x: ones(x), env, pm=pm, reward_shift=0.5).run(3)
    rows = torch.arange(4.0 * D, dtype=torch.float64).view(2, 2, D).mean(1)
    assert torch.equal(window.raw_returns, 3 * rows)
    assert torch.equal(window.returns, 3 * rows - 1.5)


def test_restart_begins_with_the_generation_s_episodes():
    runner = Rollout(ones, env := Script(2, (50,)))
    runner.run(3)
    runner.run(3)
    assert env.time.tolist() == [6, 6]
    runner.restart()
    runner.run(2)
    assert env.time.tolist() == [2, 2]
    runner.episodes(1)
    runner.run(1)
    assert env.time.tolist() == [1, 1]


def test_windows_go_on_while_noise_is_reused():
    pm = population(ScriptSizes)
    sgd = torch.optim.SGD(pm.model.parameters(), 0.1)
    nes = perturbed.NES(pm, sgd, maximize=True, reuse=3)
    runner = Rollout(pm, env := Script(2 * D, (50,)))
    times, starts, weights = [], [], [pm.model[0].weight.clone()]
    for _ in range(6):
        if nes.steps % nes.reuse == 0:
            runner.restart()
        nes.step(lambda: runner.run(2).returns)
        times.append(env.time[0].item())
        starts.append(env.seed.unique().item())
        weights.append(pm.model[0].weight.clone())
    assert times == [2, 4, 6, 2, 4, 6]
    assert starts[0] == starts[2] != starts[3] == starts[5]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    pm = PerturbedModel(Memory(), D, sigma=0.5)
    pm.set_noise()

    def make():
        return Rollout(pm, CartPole(2 * D), state=torch.zeros(2 * D, 5), seeds="members")

    straight, parts = make(), make()
    straight.run(25)
    parts.run(25)
    torch.save(parts.state_dict(), tmp_path / "lanes.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "lanes.pt", weights_only=True))
    want, got = straight.run(40), resumed.run(40)
    assert len(want.ended) > 0
    for name in ("returns", "ended", "episode_returns", "lengths"):
        assert torch.equal(getattr(want, name), getattr(got, name))
    fresh = make()
    fresh.load_state_dict(make().state_dict())
    assert torch.equal(fresh.run(5).returns, make().run(5).returns)


# ---- the norm ------------------------------------------------------------------------------------


def test_the_norm_sees_what_the_policy_acts_on_and_holds_still_meanwhile():
    pm = population(sigma=0.3)
    norm, want = ObservationNorm(4), ObservationNorm(4)
    norm.update(torch.randn(50, 4))
    norm.sync()
    want.load_state_dict(norm.state_dict())
    seeds = hash_words(0, 0, 0, torch.arange(3))
    played = [
        [play(pm.member(d, 1 - 2 * s), CartPole(1), int(seed), want) for seed in seeds]
        for s in range(2)
        for d in range(D)
    ]
    result = rollout(pm, CartPole(4 * D), 3, norm=norm)
    assert result.lengths.flatten().tolist() == [n for row in played for _, n, _ in row]
    for row in played:
        for _, _, seen in row:
            want.update(seen)
    want.sync()
    assert norm.count == want.count == 50 + result.cost.steps
    torch.testing.assert_close(norm.mean, want.mean)
    torch.testing.assert_close(norm.m2, want.m2)


def test_a_norm_that_is_frozen_or_not_synced_stays():
    norm = ObservationNorm(2)
    with norm.frozen():
        rollout(ones, Script(2), 2, norm=norm)
    evaluate(ones, Script(2), 2, norm=norm)
    assert norm.training
    norm.sync()
    assert norm.count == 0
    result = rollout(ones, Script(2), 2, norm=norm, sync=False)
    assert norm.count == 0
    assert norm.collect()["count"] == result.cost.steps
    Rollout(ones, Script(2), norm=norm).run(40)
    assert norm.count == 80


def test_an_error_leaves_the_norm_as_it_was():
    norm = ObservationNorm(2)
    norm.update(torch.ones(1, 2))

    def rewards(env):
        if env.time.max() == 60:
            raise OSError("simulator gone")
        return torch.ones(env.lanes)

    with pytest.raises(RuntimeError):
        rollout(ones, Script(2, (80,), rewards=rewards), 2, norm=norm)
    assert norm.count == 0
    assert norm.collect()["count"] == 1


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_of_the_unperturbed_model_on_other_episodes():
    pm = population()
    result = evaluate(pm, CartPole(7), 20, seed=4)
    seeds = hash_words(4, 2**62, 0, torch.arange(20))
    played = [play(pm.model, CartPole(1), int(seed)) for seed in seeds]
    assert result.returns.tolist() == [total for total, _, _ in played]
    assert result.lengths.tolist() == [length for _, length, _ in played]
    assert result.mean == pytest.approx(result.returns.mean().item())
    assert result.std == pytest.approx(result.returns.std(correction=0).item())
    assert result.cost.steps == result.lengths.sum()


# ---- what goes wrong -----------------------------------------------------------------------------


def test_lanes_must_be_rows_of_the_population():
    with pytest.raises(ValueError, match=r"R \* D lanes, D = 3 directions, got lanes = 7"):
        rollout(population(), CartPole(7))
    with pytest.raises(ValueError, match=r"D = 3 directions, got lanes = 9"):
        rollout(population(), CartPole(9))  # R = 3 makes no pairs


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ones, Script(2), 0), {}, ValueError, "episodes must be at least 1, got 0"),
        ((ones, Script(2), 1.5), {}, TypeError, "episodes must be an int"),
        ((ones, "CartPole-v1"), {}, TypeError, "env must be a BatchEnv, got str"),
        ((None, Script(2)), {}, TypeError, "policy must be callable, got NoneType"),
        ((ones, Script(2)), {"pm": ones}, TypeError, "pm must be a PerturbedModel"),
        ((ones, Script(2)), {"seeds": "same"}, ValueError, "seeds must be one of"),
        ((ones, Script(2)), {"seeds": torch.ones(2)}, TypeError, "an int64 tensor"),
        ((ones, Script(2), 3), {"seeds": torch.arange(2)}, ValueError, "one per episode, 3, got 2"),
        ((ones, Script(2)), {"seeds": torch.ones(2, 2).long()}, ValueError, r"\(S, D, E\)"),
        ((ones, Script(2)), {"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ((ones, Script(2)), {"reward_shift": NAN}, ValueError, "reward_shift must be finite"),
        ((ones, Script(2)), {"norm": nn.Identity()}, TypeError, "norm must be an ObservationNorm"),
        ((ones, Script(2)), {"norm": ObservationNorm(3)}, ValueError, "2 numbers, got 3"),
        ((ones, Script(2)), {"act": 1}, TypeError, "act must be callable"),
        ((ones, Script(2)), {"state": torch.zeros(1, 2)}, ValueError, "lanes = 2, got"),
        ((ones, Script(2)), {"state": [1.0]}, ValueError, "got float"),
        ((ones, Script(2)), {"seed": "0"}, TypeError, "seed must be an int"),
        ((lambda x: x, Script(2)), {}, ValueError, r"\(lanes, action_size\) = \(2, 1\)"),
        ((lambda x: 1, Script(2)), {}, TypeError, "policy must return a tensor"),
        ((lambda x: ones(x).long(), Script(2)), {}, ValueError, "floating-point numbers"),
        ((lambda x: torch.full((2,), 2), CartPole(2)), {}, ValueError, "between 0 and 1, got 2"),
        (
            (lambda x, s: ones(x), Script(2)),
            {"state": torch.zeros(2, 1)},
            TypeError,
            r"must return \(output, state\)",
        ),
        (
            (lambda x, s: (ones(x), s[:1]), Script(2)),
            {"state": torch.zeros(2, 1)},
            ValueError,
            "a state like the one it was given",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rollout(*arguments, **options)


def test_windows_refuse_seeds_that_run_out():
    with pytest.raises(ValueError, match="any number, got 2"):
        Rollout(ones, Script(2), seeds=torch.arange(2)).run(1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Rollout(ones, Script(2)).run(0)


def test_an_error_of_the_environment_arrives_with_its_cause_and_drops_the_lanes():
    env = Script(2, (9,))
    runner = Rollout(ones, env)
    runner.run(4)

    def broken(actions):
        raise OSError("simulator gone")

    env.step = broken
    with pytest.raises(RuntimeError, match=r"env.step of Script .* after 4 steps.*gone") as caught:
        runner.run(2)
    assert isinstance(caught.value.__cause__, OSError)
    del env.step
    runner.run(1)
    assert env.time.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, torch.zeros(2, 3), r"observations of shape .* = \(2, 2\), got \(2, 3\)"),
        (0, None, "got NoneType"),
        (1, torch.zeros(2, 1), r"rewards of shape \(lanes,\) = \(2,\), got \(2, 1\)"),
        (2, torch.zeros(1).bool(), "terminated of shape"),
        (3, False, "truncated of shape"),
    ],
)
def test_an_environment_that_changes_its_shapes_is_refused(part, value, message):
    env = Script(2, (9,))
    step = env.step

    def changed(actions):
        parts = list(step(actions))
        if env.time.max() >= 3:
            parts[part] = value
        return tuple(parts)

    env.step = changed
    with pytest.raises(ValueError, match=message):
        rollout(ones, env)


def test_an_interrupted_policy_drops_the_lanes_too():
    env = Script(2, (9,))

    def policy(x):
        if env.time.max() == 2:
            raise KeyboardInterrupt
        return ones(x)

    runner = Rollout(policy, env)
    with pytest.raises(KeyboardInterrupt):
        runner.run(5)
    assert runner.state_dict() == {"started": False}


@pytest.mark.cuda
def test_cuda_plays_the_same_episodes():
    pm = population(sigma=0.3)
    want = rollout(pm, CartPole(2 * D), 2)
    pm.to("cuda")
    got = rollout(pm, CartPole(2 * D, device="cuda"), 2)
    assert got.returns.device.type == "cuda"
    mixed = rollout(pm, CartPole(2 * D), 2)  # the environment stays on the CPU
    for result in (got, mixed):
        close = (result.lengths.cpu() - want.lengths).abs() <= 0.1 * want.lengths
        assert close.float().mean() > 0.8  # a rounding may turn an action
