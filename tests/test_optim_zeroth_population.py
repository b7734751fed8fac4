"""Candidates of a PerturbedModel in one forward: what the same members give one after the other."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import perturbed
from perturbed.optim import RDSA, SPSA, RandomBestGrad, RandomGrad, RandomSearch, RandomWalk

D = 6
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def model(antithetic=True, noise=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.5, generator=generator)
    net[0].bias.requires_grad_(False)
    perturbed.convert(net, D, noise or perturbed.Dense("rademacher"))
    return perturbed.PerturbedModel(net, D, antithetic, seed=seed)


def rows(pm):
    return (pm(pm.replicate(X.to(next(pm.parameters()).dtype))) - 1).square().mean(1)


def plain(net):
    return (net(X.to(next(net.parameters()).dtype)) - 1).square().mean().item()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])


def vector(net):
    """Parameters of a plain member that are perturbed here."""
    frozen = "0.bias"
    return torch.cat([p.detach().flatten() for n, p in net.named_parameters() if n != frozen])


def adam(pm):
    return torch.optim.Adam(pm.model.parameters(), 0.05)


METHODS = {
    "spsa": lambda pm, **options: SPSA(pm, 0.05, 0.02, **options),
    "spsa-adam": lambda pm, **options: SPSA(pm, magn=0.02, opt=adam(pm), **options),
    "rdsa": lambda pm, **options: RDSA(pm, 0.05, 0.02, **options),
    "best-grad": lambda pm, **options: RandomBestGrad(pm, 0.02, adam(pm), **options),
    "average-grad": lambda pm, **options: RandomBestGrad(
        pm, 0.02, adam(pm), avgbest=True, **options
    ),
    "walk": lambda pm, **options: RandomWalk(pm, 0.05, **options),
    "walk-2": lambda pm, **options: RandomWalk(pm, 0.02, order=2, stochastic=False, **options),
}
every = pytest.mark.parametrize("name", METHODS)


def candidates(pm, signs):
    """Members one after the other: their losses and their distances from the model."""
    members = [pm.member(d, s) for s in signs for d in range(D)]
    return [plain(m) for m in members], [vector(m) - flat(pm.model) for m in members]


def put(net, x):
    with torch.no_grad():
        nn.utils.vector_to_parameters(x, [p for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", [SPSA, RDSA])
def test_finite_differences_are_those_of_the_members_in_turn(kind):
    pm = model(noise=None if kind is SPSA else perturbed.LowRank(1))
    search = kind(pm, lr=0.05, magn=0.02)
    for _ in range(8):
        x = flat(pm.model).clone()
        loss = search.step(lambda: rows(pm)).item()
        after = flat(pm.model).clone()
        put(pm.model, x)  # where the step began, with the noise that it used
        losses, moves = candidates(pm, (1, -1))
        put(pm.model, after)
        assert loss == pytest.approx(min(losses), rel=1e-9)
        q = [(losses[d] - losses[D + d]) / (2 * 0.02) for d in range(D)]
        want = x - 0.05 * sum(q[d] * moves[d] / 0.02 for d in range(D)) / D
        assert (want - x).norm() > 1e-3
        torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-7)
    assert search.evaluations == 8 * 2 * D
    assert all(p.grad is None for p in pm.model.parameters())


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("avgbest", [True, False])
def test_the_best_move_is_that_of_the_members_in_turn(antithetic, avgbest):
    pm = model(antithetic)
    search = RandomBestGrad(pm, 0.02, avgbest=avgbest)
    x = flat(pm.model).clone()
    loss = search.step(lambda: rows(pm))
    assert loss.item() == pytest.approx(plain(pm.model), rel=1e-9)
    losses, moves = candidates(pm, (1, -1) if antithetic else (1,))
    lower = [k for k, value in enumerate(losses) if value < loss]
    assert lower
    chosen = lower if avgbest else [losses.index(min(losses))]
    want = -sum(moves[k] for k in chosen) / len(chosen) / 0.02
    got = torch.cat([p.grad.flatten() for p in pm.model.parameters() if p.requires_grad])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert torch.equal(flat(pm.model), x)
    assert search.evaluations == 1 + len(losses)
    assert search.best_loss == pytest.approx(min(losses), rel=1e-9)
    search.load_best()
    assert plain(pm.model) == pytest.approx(search.best_loss, rel=1e-9)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_walk_is_that_of_the_members_in_turn(antithetic, stochastic):
    pm = model(antithetic)
    walk = RandomWalk(pm, 0.05, order=2, stochastic=stochastic)
    present, count = plain(pm.model), 0 if stochastic else 1
    velocity, successes = torch.zeros(12 + 5), 0
    for _ in range(15):
        x = flat(pm.model).clone()
        loss = walk.step(lambda: rows(pm)).item()
        after = flat(pm.model).clone()
        put(pm.model, x + velocity)
        losses, moves = candidates(pm, (1, -1) if antithetic else (1,))
        count += stochastic + len(losses)
        move, lowest = moves[losses.index(min(losses))], min(losses)
        if not lowest < present:
            count += 1
            move = -moves[losses.index(max(losses))]
        point = x + velocity + move
        put(pm.model, point)
        here = plain(pm.model)
        put(pm.model, after)
        success = here < present
        successes += success
        velocity = 0.9 * (velocity + move)
        present = min(present, here)
        torch.testing.assert_close(after, point if success else x, rtol=1e-7, atol=1e-9)
        assert loss == pytest.approx(min(present, lowest), rel=1e-7)
    assert walk.evaluations == count
    assert 0 < successes < 15


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains(name, dtype):
    pm = model(dtype=dtype)
    search = METHODS[name](pm)
    before, frozen = plain(pm.model), pm.model[0].bias.clone()
    for _ in range(120):
        search.step(lambda: rows(pm))
    assert plain(pm.model) < 0.5 * before
    assert search.best_loss < 0.3 * before
    search.load_best()  # a forward of all members sums in another order
    near = 1e-4 if dtype == torch.float32 else 0.2
    assert plain(pm.model) == pytest.approx(search.best_loss, rel=near, abs=near / 10)
    assert torch.equal(pm.model[0].bias, frozen)


@every
def test_a_state_continues_bit_for_bit(name):
    pm = model()
    search = METHODS[name](pm)

    def steps(search, pm, count):
        return [search.step(lambda: rows(pm)).item() for _ in range(count)]

    steps(search, pm, 5)
    file = io.BytesIO()
    torch.save({"model": pm.model.state_dict(), "search": search.state_dict()}, file)
    straight = steps(search, pm, 5)
    again = model(seed=7)
    resumed = METHODS[name](again)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["search"])
    assert steps(resumed, again, 5) == straight
    assert torch.equal(flat(again.model), flat(pm.model))


@every
@pytest.mark.parametrize("at", [0, 1])
def test_a_closure_that_fails_changes_nothing(name, at):
    pm, twin = model(), model()
    search, other = METHODS[name](pm), METHODS[name](twin)
    for s, p in ((search, pm), (other, twin)):
        s.step(lambda p=p: rows(p))
    x, noise, sigma, calls = flat(pm.model).clone(), pm.get_extra_state(), pm.sigma, 0

    def closure():
        nonlocal calls
        calls += 1
        return torch.zeros(2, 3, 4) if calls > at else rows(pm)

    if at == 1 and not name.endswith("grad") and name != "walk":  # has one evaluation a step
        search.step(lambda: rows(pm))
        other.step(lambda: rows(twin))
    else:
        with pytest.raises(ValueError, match="values must be"):
            search.step(closure)
        assert torch.equal(flat(pm.model), x)
        assert pm.get_extra_state() == noise
        assert pm.sigma == sigma
    assert search.step(lambda: rows(pm)) == other.step(lambda: rows(twin))
    assert torch.equal(flat(pm.model), flat(twin.model))


@every
def test_members_that_are_not_finite_never_win(name):
    pm = model()
    search = METHODS[name](pm)

    def closure():
        losses = rows(pm).view(-1, pm.directions)
        losses = losses.clone()
        if pm.directions == D:
            losses[0, 0], losses[-1, 3] = math.nan, -math.inf
        return losses.flatten()

    before = plain(pm.model)
    for _ in range(80):
        search.step(closure)
    assert flat(pm.model).isfinite().all()
    assert plain(pm.model) < 0.7 * before
    assert math.isfinite(search.best_loss)


def test_rows_that_were_replicated_outside_of_the_closure():
    """They are of all directions; the loss without noise is a forward of one."""
    pm = model()
    outside = pm.replicate(X.double())
    SPSA(pm, 0.05, 0.02).step(lambda: (pm(outside) - 1).square().mean(1))  # needs no such loss
    with pytest.raises(ValueError, match=r"call pm\.replicate .* inside the closure"):
        RandomWalk(pm, 0.05).step(lambda: (pm(outside) - 1).square().mean(1))


# ---- several forwards --------------------------------------------------------------------------


class Run:
    """A search, and how many directions its forwards had."""

    def __init__(self, name, **options):
        self.pm, self.shown = model(), []
        self.search = METHODS[name](self.pm, **options)

    def step(self):
        return self.search.step(self.closure)

    def closure(self):
        self.shown.append(self.pm.directions)
        return rows(self.pm)

    def outcome(self):
        search = self.search
        return [search.evaluations, search.best_loss, *map(torch.clone, search.best())]


@every
@pytest.mark.parametrize("chunk", [1, 4, D + 3])
def test_chunks_give_what_one_forward_gives(name, chunk):
    one, run = Run(name), Run(name, chunk=chunk)
    for _ in range(3):
        one.shown.clear(), run.shown.clear()
        assert run.step() == one.step()
        assert torch.equal(flat(run.pm.model), flat(one.pm.model))
        # Between them, in both, losses without noise: a forward of one direction.
        cut = [min(chunk, D - first) for first in range(0, D, chunk)]
        alone = len(one.shown) - 1
        assert sorted(run.shown) == sorted(cut + [1] * alone)
    for got, want in zip(run.outcome(), one.outcome(), strict=True):
        assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want
    assert run.pm.directions == D


@every
def test_a_limit_of_memory_cuts_the_population(name):
    one, run = Run(name), Run(name, max_memory="1 GB")
    assert run.search.evaluation.chunk == 2  # the first forward, to learn what one takes
    for _ in range(3):
        assert run.step() == one.step()
    assert run.search.evaluation.chunk == D
    tight = Run(name, max_memory=1)
    with pytest.warns(UserWarning, match="a forward of one direction alone takes"):
        tight.step()
    for _ in range(2):
        tight.step()
    assert tight.search.evaluation.chunk == 1
    assert torch.equal(flat(tight.pm.model), flat(one.pm.model))
    again = Run(name, max_memory=1)
    again.search.load_state_dict(tight.search.state_dict())
    again.pm.model.load_state_dict(tight.pm.model.state_dict())
    assert again.search.evaluation.chunk == 1
    assert again.step() == one.step()


@every
def test_a_forward_that_fails_in_the_middle_changes_nothing(name):
    one, run = Run(name), Run(name, chunk=2)
    x, noise, forwards = flat(run.pm.model).clone(), run.pm.get_extra_state(), 0

    def closure():
        nonlocal forwards
        forwards += run.pm.directions == 2
        if forwards == 2:
            raise KeyError("the data are gone")
        return rows(run.pm)

    with pytest.raises(KeyError):
        run.search.step(closure)
    assert forwards == 2
    assert torch.equal(flat(run.pm.model), x)
    assert run.pm.get_extra_state() == noise
    assert run.pm.directions == D
    assert run.step() == one.step()


@every
def test_a_closure_that_draws_is_refused(name):
    run, twin = Run(name), Run(name)

    def closure():
        run.pm.set_noise()
        return rows(run.pm)

    with pytest.raises(ValueError, match="it drew other noise"):
        run.search.step(closure)
    assert run.step() == twin.step()


def test_memory_that_has_run_out_is_explained():
    run = Run("spsa")

    def closure():
        raise MemoryError

    with pytest.raises(RuntimeError, match="give the optimizer chunk="):
        run.search.step(closure)


def test_chunk_and_max_memory_are_checked():
    pm = model()
    with pytest.raises(ValueError, match="chunk must be at least 1 direction, got 0"):
        SPSA(pm, chunk=0)
    with pytest.raises(ValueError, match="must not both be given"):
        RandomWalk(pm, chunk=2, max_memory="1 GB")
    with pytest.raises(ValueError, match="max_memory"):
        RandomBestGrad(pm, max_memory="many")
    with pytest.raises(TypeError, match="chunk"):
        RDSA(pm, chunk=2.5)
    plain = [nn.Parameter(torch.zeros(2))]
    for kind in (SPSA, RDSA, RandomWalk, RandomBestGrad):
        for options in ({"chunk": 2}, {"max_memory": 100}):
            with pytest.raises(ValueError, match="bound the forwards of a PerturbedModel"):
                kind(plain, **options)


def test_arguments_are_checked():
    pm = model()
    with pytest.raises(ValueError, match="best_of, L1: leave out with a PerturbedModel"):
        RandomWalk(pm, best_of=3, L1=0.1)
    with pytest.raises(ValueError, match="bestof: leave out"):
        RandomBestGrad(pm, bestof=3)
    with pytest.raises(ValueError, match="n: leave out"):
        SPSA(pm, n=3)
    with pytest.raises(ValueError, match="RandomGrad tries one move at a time"):
        RandomGrad(pm)
    with pytest.raises(ValueError, match="must have antithetic=True"):
        SPSA(model(antithetic=False))
    with pytest.raises(ValueError, match=r"needs layers with noise=Dense\('rademacher'\)"):
        SPSA(model(noise=perturbed.Dense()))
    with pytest.raises(ValueError, match="members that are given"):
        RandomWalk(model(antithetic=None, noise=perturbed.Explicit()))
    search = RandomWalk(pm)
    with pytest.raises(ValueError, match="only group"):
        search.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(TypeError):
        RandomSearch(pm)  # tries one point at a time
    unpaired = model(antithetic=None)
    with pytest.raises(ValueError, match="antithetic pairs, 2 D = 12 members, got 6"):
        SPSA(unpaired).step(lambda: unpaired(X.new_ones(D, 3).double()).squeeze(1))


def test_copies_go_on_alone():
    pm = model()
    search = SPSA(pm, 0.05, 0.02)
    search.step(lambda: rows(pm))
    other = copy.deepcopy(search)
    first = other.step(lambda: rows(other.pm))
    assert first == search.step(lambda: rows(pm))
    assert other.pm is not pm
    assert torch.equal(flat(other.pm.model), flat(pm.model))


def test_small_moves_show_in_the_mean_of_rows():
    """The mean of rows is one of float64: float32 numbers near 1 are 1e-7 apart."""
    pm = model(dtype=torch.float32)
    search = RandomBestGrad(pm, 1e-3)
    base = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2.0**-23])  # of four rows, one hardly higher

    def closure():
        members = torch.arange(2 * pm.directions) if pm.directions == D else torch.full((2,), -1)
        rises = torch.where(members[:, None] == 7, torch.ones(4), base)  # member 7 is lower
        return rises.T.reshape(4, 2, -1).transpose(0, 1).flatten()

    search.step(closure)
    assert search.best_loss == 1.0
    assert any(p.grad.abs().max() > 0 for p in pm.model.parameters() if p.requires_grad)
