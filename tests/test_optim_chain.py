"""Chains and combinations of optimizers: with closures and without, third-party ones, resuming."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from perturbed.description import digest
from perturbed.optim import (
    AlternatingOpt,
    GradChain,
    OptimizerAverage,
    RandomOpt,
    RandomSearch,
    SequentialOpt,
    ShrinkingRandomSearch,
    UpdateToGrad,
    with_momentum,
)

INPUT = torch.linspace(-1, 1, 12).view(4, 3)


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return net


def loss_of(net):
    return (net(INPUT) - torch.tensor([0.5, -0.25])).square().sum()


def closure_of(net, calls=None):
    def closure():
        if calls is not None:
            calls.append(torch.is_grad_enabled())
        net.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    return closure


def train(net, optimizer, steps=20, with_closure=True):
    closure = closure_of(net)
    for _ in range(steps):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Sign(torch.optim.Optimizer):
    """Third-party style: no decorators, calls the closure in the caller's mode, moves p.data."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.sign(), alpha=-group["lr"])
        return loss


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_in_front_is_momentum(with_closure, nesterov):
    """The chain has an effect, and the right one: the last optimizer does not run the closure."""
    a, b, c = network(), network(), network()
    p = list(b.parameters())
    first = SGD(p, lr=1.0, momentum=0.9, nesterov=nesterov)
    chained = train(b, GradChain(p, [first, SGD(p, lr=0.02)]), 20, with_closure)
    whole = train(a, SGD(a.parameters(), lr=0.02, momentum=0.9, nesterov=nesterov))
    plain = train(c, SGD(c.parameters(), lr=0.02))
    torch.testing.assert_close(chained, whole, rtol=0, atol=1e-6)
    assert (whole - plain).abs().max() > 0.05


def test_numbers_that_floats_hold_give_equal_bits():
    a, b = (nn.Parameter(torch.tensor([2.0, -1.0])) for _ in range(2))
    one = SGD([a], lr=0.125, momentum=0.5)
    chain = GradChain([b], [SGD([b], lr=1.0, momentum=0.5), SGD([b], lr=0.125)])
    for _ in range(6):
        for p, optimizer in ((a, one), (b, chain)):
            p.grad = torch.tensor([1.0, -2.0])
            optimizer.step()
    assert torch.equal(a, b)


def test_the_closure_is_called_by_the_first_alone():
    net, calls = network(), []
    p = list(net.parameters())
    chain = GradChain(p, [SGD(p, 1.0), Adam(p, 0.1), SGD(p, 0.1)])
    before = loss_of(net)
    loss = chain.step(closure_of(net, calls))
    assert calls == [True]
    assert loss == before


def test_third_party_members_call_closures_as_if_alone():
    a, b = network(), network()
    p = list(b.parameters())
    chained = train(b, GradChain(p, [Sign(p, 1.0), Sign(p, 0.01)]))
    assert torch.equal(chained, train(a, Sign(a.parameters(), 0.01)))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_as_the_first(search):
    a, b = network(), network()
    p = list(b.parameters())
    first = LBFGS(p, lr=0.5, line_search_fn=search)
    chained = train(b, GradChain(p, [first, SGD(p, 1.0)]), 1)
    whole = train(a, LBFGS(a.parameters(), lr=0.5, line_search_fn=search), 1)
    torch.testing.assert_close(chained, whole, rtol=0, atol=1e-6)
    assert loss_of(b) < 0.1 * loss_of(network())


def test_lbfgs_as_the_last_steps_on_the_chained_gradient():
    net, calls = network(), []
    p = list(net.parameters())
    start = [q.detach().clone() for q in p]
    chain = GradChain(p, [SGD(p, 0.5), LBFGS(p, lr=1.0, max_iter=1)])
    chain.step(closure_of(net, calls))
    assert len(calls) == 1
    length = sum(q.grad.abs().sum() for q in p)
    for q, s in zip(p, start, strict=True):  # the first step of L-BFGS: g min(1, 1 / |g|)
        torch.testing.assert_close(q.detach(), s - q.grad * min(1.0, 1.0 / float(length)))


def test_a_search_as_the_first_runs_without_gradients():
    net = network()
    p = list(net.parameters())
    search = ShrinkingRandomSearch(p, lr=0.3)
    chain = GradChain(p, [search, SGD(p, 1.0, momentum=0.3)])
    grads = []

    def closure():
        grads.append(torch.is_grad_enabled())
        return loss_of(net)

    start = loss_of(net).item()
    for _ in range(100):
        chain.step(closure)
    assert not any(grads)
    assert search.evaluations == len(grads)
    assert loss_of(net) < start
    with pytest.raises(ValueError, match=r"optimizers\[1\] must step along gradients"):
        GradChain(p, [SGD(p, 1.0), search])


def test_modes():
    for mode in ("step", lambda opt, closure: opt.step(closure), ["closure", "step"]):
        a, b = network(), network()
        p = list(b.parameters())
        chained = train(b, GradChain(p, [Adam(p, 1.0), SGD(p, 0.1)], mode=mode))
        q = list(a.parameters())
        assert torch.equal(chained, train(a, GradChain(q, [Adam(q, 1.0), SGD(q, 0.1)])))


def test_mode_grad_passes_gradients_on():
    class Doubler(torch.optim.Optimizer):
        def step(self, closure=None):
            loss = closure()
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(2)
            return loss

    a, b = network(), network()
    p = list(b.parameters())
    chain = GradChain(p, [Doubler(p, {}), SGD(p, 0.01)], lrs=0.5, mode=["grad", "closure"])
    torch.testing.assert_close(train(b, chain), train(a, SGD(a.parameters(), 0.01)))


def test_grad_modes_and_reset():
    def one(**options):
        p = nn.Parameter(torch.tensor([1.0, 2.0]))
        p.grad = torch.tensor([4.0, -2.0])
        UpdateToGrad([p], SGD([p], lr=0.5), lr=3.0, **options).step()
        return p.grad.tolist(), p.tolist()

    assert one() == ([6.0, -3.0], [1.0, 2.0])
    assert one(grad_mode="add") == ([10.0, -5.0], [1.0, 2.0])
    assert one(grad_mode=torch.maximum) == ([6.0, -2.0], [1.0, 2.0])
    assert one(reset=False) == ([6.0, -3.0], [-1.0, 3.0])
    with pytest.raises(ValueError, match="grad_mode must return"):
        one(grad_mode=lambda g, u: u[:1])


def test_parameters_without_a_gradient_stay():
    """As in plain optimizers: weight decay passes over them."""
    p, unused, other = (nn.Parameter(torch.ones(2)) for _ in range(3))
    chain = GradChain([p, unused, other], [SGD([p, unused], 1.0), SGD([p, unused, other], 0.1)])
    chain.optimizers[-1].param_groups[0]["weight_decay"] = 0.5
    p.grad, other.grad = torch.ones(2), torch.full((2,), 2.0)
    chain.step()
    assert unused.grad is None
    assert unused.tolist() == [1, 1]
    assert torch.allclose(other, torch.tensor(1 - 0.1 * 2.5))  # keeps its gradient: not the first's
    assert torch.allclose(p, torch.tensor(1 - 0.1 * 1.5))


def test_schedulers_and_groups():
    net = network()
    p = list(net.parameters())
    chain = GradChain(p, [SGD(p, 1.0), SGD(p, 0.5)])
    schedule = torch.optim.lr_scheduler.ExponentialLR(chain, 0.5)
    factor = torch.optim.lr_scheduler.ExponentialLR(chain.optimizers[0], 0.1)
    chain.step(closure_of(net))
    schedule.step()
    factor.step()
    assert chain.optimizers[-1].param_groups[0]["lr"] == 0.25
    assert chain.optimizers[0].opt.param_groups[0]["lr"] == 1.0
    assert chain.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    more = nn.Parameter(torch.ones(1))
    chain.add_param_group({"params": (q for q in [more])})
    more.grad = torch.ones(1)
    chain.step()
    assert more.tolist() == pytest.approx([1 - 0.5 * 1.0])  # the defaults of each
    chain.zero_grad()
    assert more.grad is None
    groups = [{"params": p[:2], "lr": 2.0}, {"params": p[2:]}]
    assert len(GradChain(groups, [SGD(p, 1.0), SGD(p, 0.1)]).optimizers[0].param_groups) == 2


def make_chain(p):
    return GradChain(p, [SGD(p, 1.0, momentum=0.9), Adam(p, 0.3), AdamW(p, 0.05)], lrs=[1, 0.5])


COMPOSITES = {
    "chain": make_chain,
    "link": lambda p: SequentialOpt(
        [UpdateToGrad(p, Adam(p, 0.02)), SGD(p, 1.0)], ["closure", lambda opt, closure: opt.step()]
    ),
    "momentum": lambda p: with_momentum(Adam(p, 0.02), 0.5, where="update"),
    "sequential": lambda p: SequentialOpt([Adam(p, 0.02), SGD(p, 0.01, momentum=0.5)]),
    "alternating": lambda p: AlternatingOpt([Adam(p, 0.02), SGD(p, 0.01)], [2, 3]),
    "random": lambda p: RandomOpt([Adam(p, 0.02), SGD(p, 0.01)], [1, 2], seed=4),
    "average": lambda p: OptimizerAverage([Adam(p, 0.02), SGD(p, 0.01, 0.9)], nbest=1),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_runs_resume_bit_for_bit(name, tmp_path):
    a, b = network(), network()
    one = COMPOSITES[name](list(a.parameters()))
    state = torch.get_rng_state()
    train(a, one, 7)
    torch.save({"net": a.state_dict(), "opt": one.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    held = digest(saved["opt"])
    other = COMPOSITES[name](list(b.parameters()))
    b.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    assert torch.equal(train(a, one, 7), train(b, other, 7))
    assert digest(one.state_dict()) == digest(other.state_dict()) != held
    assert torch.equal(torch.get_rng_state(), state)
    assert loss_of(a) < 0.9 * loss_of(network())


@pytest.mark.parametrize("name", COMPOSITES)
def test_copies_go_their_own_way(name):
    net = network()
    one = COMPOSITES[name](list(net.parameters()))
    train(net, one, 3)
    twin, other = copy.deepcopy((net, one))
    before = digest(one.state_dict())
    end = train(twin, other, 5)
    assert digest(one.state_dict()) == before
    assert torch.equal(train(net, one, 5), end)
    torch.optim.lr_scheduler.StepLR(other, 1)  # the groups are still those of the members


@pytest.mark.parametrize("name", COMPOSITES)
def test_wrong_states_change_nothing(name):
    net = network()
    one = COMPOSITES[name](list(net.parameters()))
    train(net, one, 3)
    before = digest(one.state_dict())
    state = one.state_dict()
    wrong = [{}, {**state, "optimizers": []}, {**state, "progress": {"x": 1}}]
    for bad in wrong:
        with pytest.raises(ValueError, match="state_dict must"):
            one.load_state_dict(bad)
        assert digest(one.state_dict()) == before
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        one.load_state_dict(None)


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize(
    ("value", "error"),
    [(None, TypeError), (torch.ones(2), ValueError), (1j, TypeError), (ZeroDivisionError, None)],
)
def test_wrong_closures_move_nothing(name, value, error):
    net = network()
    one = COMPOSITES[name](list(net.parameters()))
    before = copy.deepcopy(net.state_dict())

    def closure():
        if error is None:
            raise value
        return value

    with pytest.raises(error or value, match="closure must return" if error else None):
        one.step(closure)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_turns_and_draws():
    p = nn.Parameter(torch.zeros(1))
    members = [SGD([p], 1.0), SGD([p], 10.0), SGD([p], 100.0)]

    def moves(optimizer, steps):
        found = []
        for _ in range(steps):
            before = p.item()
            p.grad = -torch.ones(1)
            optimizer.step()
            found.append(round(p.item() - before))
        return found

    assert moves(AlternatingOpt(members, [1, 2, 1]), 5) == [1, 10, 10, 100, 1]
    drawn = moves(RandomOpt(members, [1, 0, 3]), 1000)
    assert drawn.count(10) == 0
    assert abs(drawn.count(100) - 750) < 5 * math.sqrt(1000 * 0.75 * 0.25)
    assert drawn[:50] != moves(RandomOpt(members, [1, 0, 3], seed=1), 50)
    assert moves(SequentialOpt(members), 1) == [111]


def test_averages():
    def moved(target, **options):
        p = nn.Parameter(torch.zeros(1))
        average = OptimizerAverage([SGD([p], 0.5), SGD([p], 0.05), SGD([p], 5.0)], **options)

        def closure():
            average.zero_grad()
            loss = 0.5 * (p - target).square().sum()
            loss.backward()
            return loss if abs(p.item()) < 4.5 else loss * math.nan

        average.step(closure)
        return p.item()

    assert moved(1.0) == pytest.approx(5.55 / 3)
    assert moved(1.0, weights=[1, 3, 0]) == pytest.approx((0.5 + 0.15) / 4)
    assert moved(1.0, nbest=1) == pytest.approx(0.5)  # the best, not weight 0 for the best
    assert moved(1.0, nbest=3) == pytest.approx(0.55 / 2)  # NaN where the third arrives
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="closure must be given with nbest"):
        OptimizerAverage([SGD([p], 0.5)], nbest=1).step()


def test_arguments():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sgd = SGD([p], 0.1)
    with pytest.raises(ValueError, match="at least two"):
        GradChain([p], [sgd])
    with pytest.raises(TypeError, match=r"optimizers\[1\] must be a torch.optim.Optimizer"):
        GradChain([p], [sgd, Adam])
    with pytest.raises(TypeError, match="optimizers must be a list"):
        SequentialOpt(sgd)
    with pytest.raises(ValueError, match="lrs must have 1 entries, got 2"):
        GradChain([p], [sgd, sgd], lrs=[1, 2])
    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        GradChain([p], [sgd, sgd], lrs=-1.0)
    with pytest.raises(ValueError, match="mode must be"):
        GradChain([p], [sgd, sgd], mode="x")
    with pytest.raises(ValueError, match="grad_mode must be"):
        UpdateToGrad([p], sgd, grad_mode="x")
    with pytest.raises(ValueError, match="params must have all parameters of opt"):
        UpdateToGrad([q], sgd)
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"params must be float32 or wider, got torch.bfloat16"):
        UpdateToGrad([half], SGD([half], 0.1))
    with pytest.raises(ValueError, match="weights must not all be 0"):
        RandomOpt([sgd], [0.0])
    with pytest.raises(ValueError, match="nbest must be from 1 to 1"):
        OptimizerAverage([sgd], nbest=2)
    with pytest.raises(ValueError, match="momentum must be below 1"):
        with_momentum(sgd, 1.0)
    p.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        SequentialOpt([sgd])


def test_the_best_of_a_composite_is_that_of_its_searches():
    p, q = nn.Parameter(torch.tensor([3.0, 1.0])), nn.Parameter(torch.tensor([2.0]))
    search = RandomSearch([p, q], seed=3)
    both = SequentialOpt([torch.optim.SGD([q, p], lr=0.0), search])
    assert both.best_loss == math.inf
    assert [t.tolist() for t in both.best()] == [[2.0], [3.0, 1.0]]  # as they are

    def loss():
        return p.square().sum() + q.square().sum()

    for _ in range(20):
        both.step(loss)
    assert both.best_loss == search.best_loss < 14
    best = both.best()
    assert [t.shape for t in best] == [(1,), (2,)]  # in the order of its own groups
    assert sum(t.square().sum().item() for t in best) == pytest.approx(both.best_loss)
    with torch.no_grad():
        p.zero_()
    both.load_best()
    assert loss().item() == pytest.approx(both.best_loss)
    nested = AlternatingOpt([both, torch.optim.SGD([p, q], lr=0.1)])
    assert nested.best_loss == both.best_loss
    # A search of some of the parameters says nothing of the rest.
    assert SequentialOpt([RandomSearch([p]), torch.optim.SGD([q], lr=0.1)]).best_loss == math.inf


def test_the_best_of_a_chain_is_that_of_its_first():
    p = nn.Parameter(torch.tensor([3.0]))
    chain = GradChain([p], [RandomSearch([p]), torch.optim.SGD([p], lr=0.5)])
    for _ in range(10):
        chain.step(lambda: (p - 1).square().sum())
    assert chain.best_loss == chain.optimizers[0].opt.best_loss < 4
    assert (chain.best()[0] - 1).square().item() == pytest.approx(chain.best_loss)
