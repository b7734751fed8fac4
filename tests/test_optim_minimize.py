"""Minimize: scipy's methods on losses whose minima are known."""

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perturbed
from perturbed.optim.minimize import METHODS
from perturbed.testing import devices

pytest.importorskip("scipy", reason="Minimize needs scipy (the extra `scipy`)")
from scipy.optimize import LinearConstraint, minimize, rosen
from scipy.optimize._minimize import MINIMIZE_METHODS

Minimize = perturbed.Minimize
GRADIENT = [name for name, m in METHODS.items() if m.derivatives == 1]
HESSIAN = [name for name, m in METHODS.items() if m.derivatives == 2]
LOSSES = [name for name, m in METHODS.items() if m.derivatives == 0 and not m.is_global]
LOCAL = GRADIENT + HESSIAN + LOSSES
GLOBAL = [name for name, m in METHODS.items() if m.is_global]
SIMPLEX = {"maxiter": 20000, "maxfev": 20000, "adaptive": True, "xatol": 1e-6, "fatol": 1e-12}
ENOUGH = {"SLSQP": {"maxiter": 10000}, "COBYLA": {"maxiter": 10000}, "Nelder-Mead": SIMPLEX}


def make_bowl(dtype=torch.float64):
    """Three tensors of several shapes, whose loss is least where all are 1, 2 and 3."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    q = nn.Parameter(torch.ones(1, dtype=dtype))
    r = nn.Parameter(torch.ones(2, dtype=dtype))

    def loss():
        rest = (q - 2).square().sum() + (r - 3).square().sum()
        return (p - 1).square().sum() + rest + 0.1 * (p.sum() - 4 + q.sum() - 2).square()

    return (p, q, r), loss


def assert_solved(parameters, atol):
    for i, parameter in enumerate(parameters):
        assert torch.allclose(parameter, torch.full_like(parameter, i + 1.0), atol=atol)


# ---- every method --------------------------------------------------------------------------------


def test_all_methods_of_scipy_are_known():
    local = {name.lower() for name, m in METHODS.items() if not m.is_global}
    assert local == {name.lower() for name in MINIMIZE_METHODS if name != "_custom"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LOCAL)
def test_minimum_of_three_tensors(method, dtype):
    parameters, loss = make_bowl(dtype)
    pointers = [p.data_ptr() for p in parameters]
    optimizer = Minimize(parameters, method, options=ENOUGH.get(method))
    before = loss().item()
    found = optimizer.step(loss)
    assert_solved(parameters, atol=5e-3)
    assert found.shape == ()
    assert found.item() == loss().item() < 1e-4 < before
    assert [p.data_ptr() for p in parameters] == pointers
    assert all(p.grad is None and p.dtype == dtype for p in parameters)
    assert optimizer.result.x.dtype == np.float64
    assert optimizer.best_loss == found.item()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.best(), parameters, strict=True))
    assert optimizer.method == method


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-exact", "trust-krylov", "Nelder-Mead"])
def test_parameters_stay_on_their_devices(method, device):
    """scipy's vector is on the CPU; parameters may be here and there."""
    p = nn.Parameter(torch.zeros(2, device=device))
    q = nn.Parameter(torch.ones(1, dtype=torch.float64))
    options = {"maxiter": 2000, "fatol": 1e-12} if method == "Nelder-Mead" else None

    def loss():
        return (p - 1).square().sum().cpu() + (q - p.sum().cpu()).square().sum()

    Minimize([p, q], method, options=options).step(loss)
    assert p.device == torch.device(device, p.device.index)
    assert q.device.type == "cpu"
    assert torch.allclose(p.cpu(), torch.ones(2), atol=5e-3)
    assert q.item() == pytest.approx(2.0, abs=5e-3)


@pytest.mark.parametrize("method", GLOBAL)
def test_global_minimum_among_many(method):
    p = nn.Parameter(torch.tensor([2.8, -2.1], dtype=torch.float64))

    def loss():
        return (p.square() - 4 * (3 * p).cos()).sum() + 8  # waves; 0 at 0

    options = {"dual_annealing": {"maxiter": 100}, "basinhopping": {"niter": 30, "stepsize": 2.0}}
    bounds = (-5, 4)
    trapped = Minimize([p], "BFGS").step(loss)
    assert trapped > 3
    optimizer = Minimize([p], method, bounds=bounds, options=options.get(method), seed=3)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert optimizer.step(loss) < 1e-4
    assert p.abs().max() < 5e-3
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("method", ["CG", "BFGS", "L-BFGS-B", "Nelder-Mead", "Newton-CG"])
def test_same_as_scipy_alone(method):
    """The bridge adds nothing: scipy with hand-written functions takes the same path."""
    from scipy.optimize import rosen_der, rosen_hess_prod

    p = nn.Parameter(torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64))

    def loss():
        return (100 * (p[1:] - p[:-1].square()).square() + (1 - p[:-1]).square()).sum()

    start = p.detach().numpy().copy()
    optimizer = Minimize([p], method)
    found = optimizer.step(loss)
    extra = {} if method == "Nelder-Mead" else {"jac": rosen_der}
    if method == "Newton-CG":
        extra["hessp"] = rosen_hess_prod
    expected = minimize(rosen, start, method=method, **extra)
    assert found.item() == pytest.approx(expected.fun, abs=1e-8)
    assert optimizer.result.nit == pytest.approx(expected.nit, rel=0.2)
    np.testing.assert_allclose(optimizer.result.x, expected.x, atol=1e-4)


# ---- numbers of pytorch-minimize -----------------------------------------------------------------


def classify(method, dtype, **options):
    """Train the linear classifier of pytorch-minimize's tests; return the optimizer."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the data are scikit-learn's")
    x, y = datasets.make_classification(120, 20, n_informative=10, n_classes=10, random_state=0)
    x, y = torch.from_numpy(x[:100]).to(dtype), torch.from_numpy(y[:100])
    net = nn.Linear(20, 10).to(dtype)
    side = options.pop("side", None)
    if side is not None:  # of Nelder-Mead's first simplex, which is tiny by default
        start = torch.cat([p.detach().flatten() for p in net.parameters()]).double().numpy()
        options["initial_simplex"] = np.vstack([start, start + side * np.eye(len(start))])
    optimizer = Minimize(net.parameters(), method, options=options or None)
    found = optimizer.step(lambda: F.nll_loss(F.log_softmax(net(x), 1), y))
    assert found.item() == F.nll_loss(F.log_softmax(net(x), 1), y).item()
    return optimizer


SLOW = ("CG", "Newton-CG", "trust-ncg", "trust-constr", "Powell")
CLASSIFY = [*GRADIENT, *HESSIAN, "Powell"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in CLASSIFY],
)
def test_classification_of_120_rows(method, dtype):
    # scipy's own limits but for SLSQP, whose 100 are too few; Powell would go on for long.
    options = {"SLSQP": {"maxiter": 10000}, "Powell": {"maxiter": 35}}.get(method, {})
    optimizer = classify(method, dtype, **options)
    assert optimizer.best_loss < 0.1
    assert optimizer.evaluations < (100000 if method == "Powell" else 20000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "reached"),
    [
        ("Nelder-Mead", {"adaptive": True, "maxfev": 10000, "side": 4.0}, 0.88),
        ("COBYLA", {"rhobeg": 1.0, "maxiter": 1000}, 1.25),
        ("COBYQA", {"initial_tr_radius": 1.0, "maxfev": 1000}, 1.19),
    ],
)
def test_searches_of_losses_alone_get_not_so_far(method, options, reached):
    """From a loss of 2.7; what docs/optimizers.md says of them with 210 parameters."""
    torch.manual_seed(0)
    optimizer = classify(method, torch.float64, **options)
    assert optimizer.evaluations <= max(options.get("maxfev", 0), 1000) + 1
    assert 0.1 < optimizer.best_loss
    assert optimizer.best_loss == pytest.approx(reached, rel=0.15)


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENT)
def test_both_kinds_of_closures_take_the_same_path(method):
    (p, q, r), loss = make_bowl()
    first = Minimize([p, q, r], method)
    expected = first.step(loss)
    parameters, loss = make_bowl()
    second = Minimize(parameters, method)

    def closure():
        second.zero_grad()
        value = loss()
        value.backward()
        return value

    assert second.step(closure) == expected
    assert (first.result.x == second.result.x).all()
    assert first.evaluations == second.evaluations
    third_parameters, loss = make_bowl()
    third = Minimize(third_parameters, method)

    def closure_of_numbers():
        value = loss()
        value.backward()
        return value.item()

    assert third.step(closure_of_numbers) == expected


@pytest.mark.parametrize("method", HESSIAN)
def test_penalties_of_parameters_count_in_the_hessian(method):
    """One Newton step solves a quadratic; without the penalty's Hessian it would not."""
    net = nn.Linear(3, 1).double()
    x, y = torch.randn(30, 3).double(), torch.randn(30, 1).double()

    def loss():
        penalty = sum(p.square().sum() for p in net.parameters())
        return (net(x) - y).square().mean() + 10 * penalty

    optimizer = Minimize(net.parameters(), method)
    optimizer.step(loss)
    full = torch.cat([x, torch.ones(30, 1)], 1).double()
    exact = torch.linalg.solve(full.T @ full / 30 + 10 * torch.eye(4), full.T @ y / 30)
    assert torch.allclose(torch.cat([net.weight[0], net.bias]), exact[:, 0], atol=1e-5)
    if method not in ("trust-constr",):
        assert optimizer.result.nit <= 5


def test_hessian_is_that_of_torch_func():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1])
    problem = make_problem(net, lambda: F.cross_entropy(net(x), y), 2)
    names = [n for n, _ in net.named_parameters()]

    def functional(vector):
        parts = vector.split([p.numel() for p in net.parameters()])
        shapes = [p.shape for p in net.parameters()]
        values = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, values, x), y)

    point = torch.from_numpy(problem.start)
    expected = torch.func.hessian(functional)(point)
    found = torch.from_numpy(problem.hessian(problem.start))
    assert torch.allclose(found, expected, atol=1e-12)
    vector = torch.randn(len(point)).double()
    product = problem.product(problem.start, vector.numpy())
    assert torch.allclose(torch.from_numpy(product), expected @ vector, atol=1e-12)
    gradient = torch.func.grad(functional)(point)
    assert torch.allclose(torch.from_numpy(problem.gradient(problem.start)), gradient, atol=1e-14)
    assert problem.evaluations == 1  # one forward for all of it


def make_problem(net, closure, derivatives):
    from perturbed.optim.minimize.problem import Problem

    parameters = list(net.parameters())
    size = sum(p.numel() for p in parameters)
    return Problem(
        closure, parameters, derivatives, (np.full(size, -np.inf), np.full(size, np.inf)), None
    )


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "Newton-CG", "trust-constr"])
def test_many_parameters_without_their_hessian(method, monkeypatch):
    """10,000 parameters, whose Hessian would have 800 MB."""
    from perturbed.optim.minimize.problem import Problem

    monkeypatch.delattr(Problem, "hessian")
    net = nn.Sequential(nn.Linear(99, 100, bias=False), nn.Tanh(), nn.Linear(100, 1))
    x = torch.randn(200, 99)
    y = x[:, :3].prod(1, keepdim=True)

    def loss():
        penalty = sum(p.square().sum() for p in net.parameters())
        return (net(x) - y).square().mean() + 1e-4 * penalty

    before = loss().item()
    optimizer = Minimize(net.parameters(), method, options={"maxiter": 5})
    assert sum(p.numel() for p in net.parameters()) == 10001
    assert optimizer.step(loss) < 0.7 * before
    assert optimizer.evaluations < 30


def test_an_operator_without_batching_has_its_hessian_one_by_one():
    class Cube(torch.autograd.Function):
        """No vmap: torch refuses to batch it."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return CubeGrad.apply(grad, x)

    class CubeGrad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, grad, x):
            ctx.save_for_backward(grad, x)
            return grad * 3 * x**2

        @staticmethod
        def backward(ctx, outer):
            grad, x = ctx.saved_tensors
            return outer * 3 * x**2, outer * grad * 6 * x

    net = nn.Module()
    net.p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    problem = make_problem(net, lambda: Cube.apply(net.p).sum(), 2)
    assert (problem.hessian(problem.start) == np.diag([6.0, 12.0, 18.0])).all()


def test_dogleg_of_a_loss_that_is_not_convex():
    p = nn.Parameter(torch.tensor([0.1, 0.1], dtype=torch.float64))

    def loss():
        return (p**4 - 2 * p**2).sum() + 2  # saddle at 0, minima at +-1

    assert Minimize([p], "dogleg").step(loss) < 1e-8
    assert torch.allclose(p.abs(), torch.ones(2).double(), atol=1e-4)


@pytest.mark.parametrize("method", ["L-BFGS-B", "Newton-CG", "dogleg", "trust-krylov"])
def test_frozen_and_unused_parameters(method):
    (p, q, r), loss = make_bowl()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.full((2,), 5.0))  # float32 beside float64
    linear = nn.Parameter(torch.zeros(()).double())
    optimizer = Minimize([p, frozen, q, unused, linear, r], method, tol=1e-8)
    optimizer.step(lambda: loss() + frozen.sum() + 0 * linear)
    assert_solved((p, q, r), atol=1e-5)
    assert (frozen == 1).all()
    assert (unused == 5).all()
    assert len(optimizer.result.x) == 4 + 1 + 2 + 1 + 2


def test_gradients_of_the_user_are_left_alone():
    parameters, loss = make_bowl()
    grad = parameters[0].grad = torch.full((2, 2), 7.0).double()
    Minimize(parameters, "BFGS").step(loss)
    assert parameters[0].grad is grad
    assert (grad == 7).all()
    assert parameters[1].grad is None


# ---- bounds, constraints -------------------------------------------------------------------------


BOUNDED = [name for name in LOCAL if METHODS[name].bounds]


@pytest.mark.parametrize("method", BOUNDED)
def test_bounds_by_name(method):
    net = nn.Module()
    (p, q, r), loss = make_bowl()
    net.p, net.q, net.r = p, q, r
    bounds = {"q": (None, 1.5), "r": (torch.tensor([3.5, -1.0]), 4.0)}
    seen = []
    optimizer = Minimize(
        net.named_parameters(), method, bounds=bounds, options=ENOUGH.get(method), tol=1e-8
    )

    def closure():
        seen.append((q.max().item(), r[0].item()))
        return loss()

    optimizer.step(closure)
    assert q.item() == pytest.approx(1.5, abs=1e-3)
    assert r[0].item() == pytest.approx(3.5, abs=1e-3)  # the start, 1, was outside
    assert r[1].item() == pytest.approx(3.0, abs=5e-3)
    assert q.item() <= 1.5 + 1e-12
    assert r[0].item() >= 3.5 - 1e-12


def test_bounds_of_groups_and_of_all():
    (p, q, r), loss = make_bowl()
    groups = [{"params": [p, q], "bounds": (0, 0.5)}, {"params": [r]}]
    Minimize(groups, "L-BFGS-B").step(loss)
    assert (p == 0.5).all()
    assert (q == 0.5).all()
    assert torch.allclose(r, torch.full_like(r, 3.0), atol=1e-4)
    Minimize([p, q, r], "TNC", bounds=(None, 0.25)).step(loss)
    assert max(x.max() for x in (p, q, r)) == 0.25


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr", "COBYLA", "COBYQA"])
def test_constraints(method):
    parameters, loss = make_bowl()
    ones = LinearConstraint(np.ones((1, 7)), -np.inf, 6.0)  # the free minimum has 12
    optimizer = Minimize(parameters, method, constraints=ones, options=ENOUGH.get(method), tol=1e-7)
    found = optimizer.step(loss)
    total = sum(p.sum().item() for p in parameters)
    assert total == pytest.approx(6.0, abs=5e-3)  # trust-constr stays inside
    free, loss_free = make_bowl()

    def penalised():
        return loss_free() + 1e5 * F.relu(sum(p.sum() for p in free) - 6).square()

    expected = Minimize(free, "BFGS").step(penalised)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


# ---- losses that are no numbers ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", LOCAL + GLOBAL)
def test_losses_that_are_not_finite_never_win(method, bad):
    p = nn.Parameter(torch.tensor([2.5, 2.0], dtype=torch.float64))
    calls = []

    def closure():
        loss = (p - 1).square().sum()
        if p.min() < 0.3:  # steps that go too far
            calls.append(1)
            return loss * 0 + bad
        return loss

    options = {**ENOUGH, "dual_annealing": {"maxiter": 30}, "basinhopping": {"niter": 5}}
    bounds = (-3, 4) if METHODS[method].bounds else None
    optimizer = Minimize([p], method, bounds=bounds, options=options.get(method))
    found = optimizer.step(closure)
    assert torch.isfinite(found)
    assert found < 0.05
    assert optimizer.best_loss == found
    assert torch.allclose(p, torch.ones(2).double(), atol=0.2)


def test_nothing_finite():
    p = nn.Parameter(torch.tensor([0.5]))

    def closure():
        return p.sum() * float("nan")

    with pytest.raises(ValueError, match="finite loss at the start of L-BFGS-B, got nan"):
        Minimize([p]).step(closure)
    optimizer = Minimize([p], "direct", bounds=(0, 1), options={"maxiter": 3})
    assert optimizer.step(closure).item() == float("inf")
    assert optimizer.best_loss == float("inf")
    assert p.item() == 0.5


# ---- callbacks, options, repeated steps ----------------------------------------------------------


@pytest.mark.parametrize("method", LOCAL + ["basinhopping", "dual_annealing", "direct"])
def test_callbacks_see_the_iterate_and_can_stop(method):
    (p, q, r), loss = make_bowl()
    seen = []

    def callback(result):
        assert (result.x[:4].reshape(2, 2) == p.detach().numpy()).all()
        assert result.x[4] == q.item()
        assert loss().item() == pytest.approx(result.fun, rel=1e-12)
        seen.append(result.nfev)
        return len(seen) == 2

    bounds = (-3, 4) if METHODS[method].needs_bounds else None
    optimizer = Minimize([p, q, r], method, bounds=bounds, callback=callback)
    optimizer.step(loss)
    if method not in ("trust-krylov", "trust-exact", "trust-ncg", "Newton-CG", "dogleg"):
        assert len(seen) == 2  # those solve it in fewer
        assert optimizer.result.status == 99
    assert 1 <= len(seen) <= 2
    assert seen == sorted(seen)
    assert optimizer.best_loss == loss().item()


def test_callback_that_raises():
    parameters, loss = make_bowl()

    def stop(result):
        raise StopIteration

    optimizer = Minimize(parameters, "BFGS", callback=stop)
    optimizer.step(loss)
    assert optimizer.result.message == "callback has ended the run"

    def fail(result):
        raise RuntimeError("mine")

    before = [p.detach().clone() for p in parameters]
    optimizer = Minimize(parameters, "BFGS", callback=fail)
    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step(lambda: loss() + parameters[0].sum())
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert optimizer.steps == optimizer.evaluations == 0


@pytest.mark.parametrize(
    "error", [KeyError, ValueError, TypeError, RuntimeError, KeyboardInterrupt]
)
@pytest.mark.parametrize("method", LOCAL + GLOBAL)
def test_a_closure_that_raises_changes_nothing(method, error):
    """Through C and Cython too."""
    parameters, loss = make_bowl()
    before = [p.detach().clone() for p in parameters]
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise error("mine")
        return loss() ** 2

    bounds = (-3, 4) if METHODS[method].needs_bounds else None
    optimizer = Minimize(parameters, method, bounds=bounds)
    with pytest.raises(error, match="mine"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert optimizer.result is None
    assert optimizer.steps == 0


def test_options_are_scipys_and_are_not_changed():
    options = {"maxiter": 2}
    parameters, loss = make_bowl()
    optimizer = Minimize(parameters, "L-BFGS-B", options=options)
    optimizer.step(lambda: loss() ** 2)
    assert optimizer.result.nit == 2
    assert options == {"maxiter": 2}
    free = Minimize(make_bowl()[0], "CG")
    assert free.options == {}  # maxiter is left to scipy


def test_steps_go_on_from_where_the_last_ended():
    parameters, loss = make_bowl()
    optimizer = Minimize(parameters, "CG", options={"maxiter": 1})
    losses = [optimizer.step(lambda: (1 + loss()).log()).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.steps == 6
    with torch.no_grad():
        parameters[0].add_(1)
    optimizer.load_best()
    assert math.log1p(loss().item()) == pytest.approx(losses[-1], rel=1e-12)


def test_buffers_are_those_of_the_best_evaluation():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.randn(20, 3).double()
    mean = net[1].running_mean.clone()

    def loss():
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    optimizer = Minimize(net.parameters(), "L-BFGS-B", options={"maxiter": 20}, model=net)
    optimizer.step(loss)
    assert optimizer.evaluations > 10
    assert net[1].num_batches_tracked == 1
    with torch.no_grad():
        batch = net[0](x).mean(0)
    assert torch.allclose(net[1].running_mean, 0.9 * mean + 0.1 * batch, atol=1e-12)


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["basinhopping", "dual_annealing", "differential_evolution"])
def test_resumed_runs_are_the_same_bit_for_bit(method, tmp_path):
    def make():
        p = nn.Parameter(torch.tensor([2.0, -1.0]))
        options = {"basinhopping": {"niter": 3}}.get(method, {"maxiter": 3})
        optimizer = Minimize([p], method, bounds=(-4, 4), options=options, seed=5)
        return p, optimizer, lambda: (p.square() - 4 * (3 * p + 1).cos()).sum()

    p, optimizer, loss = make()
    optimizer.step(loss)
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    rest = [optimizer.step(loss).item() for _ in range(2)]
    q, resumed, loss = make()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    q.data.copy_(saved["p"])
    resumed.load_state_dict(saved["optimizer"])
    assert [resumed.step(loss).item() for _ in range(2)] == rest
    assert torch.equal(p, q)
    assert (resumed.evaluations, resumed.steps) == (optimizer.evaluations, 3)
    assert resumed.best_loss == optimizer.best_loss
    assert torch.equal(resumed.best()[0], optimizer.best()[0])
    other = Minimize([nn.Parameter(torch.tensor([2.0, -1.0]))], method, bounds=(-4, 4), seed=6)
    assert other.seed != resumed.seed
    other.load_state_dict(resumed.state_dict())
    assert other.seed == 5


def test_copies_and_pickles():
    parameters, loss = make_bowl()
    optimizer = Minimize(parameters, "bfgs", bounds=None, options={"gtol": 1e-7})
    optimizer.step(loss)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.method == "BFGS"
        assert twin.options == {"gtol": 1e-7}
        assert twin.best_loss == optimizer.best_loss
        mine = twin.param_groups[0]["params"]
        assert all(torch.equal(a, b) for a, b in zip(mine, parameters, strict=True))
        assert mine[0] is not parameters[0]
        twin.step(lambda: sum(p.square().sum() for p in mine))  # noqa: B023
        assert mine[0].abs().max() < 1e-5
    assert_solved(parameters, atol=1e-3)


def test_state_of_others_is_refused():
    optimizer = Minimize([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"must have the entries .* missing"):
        optimizer.load_state_dict(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1).state_dict())


def test_the_package_does_not_import_scipy():
    code = "import sys, perturbed; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_scipy_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "perturbed\[scipy\]"'):
        Minimize([nn.Parameter(torch.ones(2))])
