"""Minimize: what is refused, by name and before anything is changed."""

import pytest
import torch
from torch import nn

import perturbed

pytest.importorskip("scipy", reason="Minimize needs scipy (the extra `scipy`)")

Minimize = perturbed.Minimize


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "gradient"}, ValueError, r"method must be of CG, BFGS, .*, direct, got 'grad"),
        ({"method": None}, TypeError, "method must be the name of a method, got None"),
        ({"method": "CG", "bounds": (0, 1)}, ValueError, "bounds must be None: CG takes none"),
        ({"method": "direct"}, ValueError, "bounds must be finite for every parameter"),
        ({"method": "shgo", "bounds": (0, None)}, ValueError, "bounds must be finite for every"),
        (
            {"method": "TNC", "constraints": [{"type": "eq", "fun": sum}]},
            ValueError,
            "constraints must be empty: TNC takes none; of the methods, SLSQP, trust-constr, COB",
        ),
        ({"local": "CG"}, ValueError, "local is for basinhopping, differential_evolution, shgo"),
        (
            {"method": "basinhopping", "local": "direct"},
            ValueError,
            "local must be a local method, got 'direct'",
        ),
        (
            {"method": "basinhopping", "local": "CG", "bounds": (0, 2)},
            ValueError,
            "bounds must be None: CG takes none",
        ),
        (
            {"method": "shgo", "local": "CG", "bounds": (0, 2)},
            ValueError,
            "local must be of L-BFGS-B, TNC, SLSQP, COBYQA for shgo, got 'CG'",
        ),
        ({"local_options": {"gtol": 1}}, ValueError, "local_options are of local searches"),
        ({"options": [("maxiter", 3)]}, TypeError, "options must map names of options to values"),
        (
            {"method": "basinhopping", "options": {"maxiter": 3}},
            ValueError,
            r"options of basinhopping must be of .*niter.*, got \['maxiter'\]",
        ),
        (
            {"method": "basinhopping", "options": {"rng": 3}},
            ValueError,
            r"options of basinhopping must be of .*, got \['rng'\]",
        ),
        ({"tol": -1.0}, ValueError, "tol must be finite and at least 0"),
        ({"callback": 3}, TypeError, "callback must be callable or None, got int"),
        ({"model": 3}, TypeError, "model must be an nn.Module or None, got int"),
        ({"seed": "one"}, TypeError, "seed"),
        ({"bounds": 1.0}, ValueError, r"bounds must be a pair \(lower, upper\) or None, got 1.0"),
        ({"bounds": (2, 1)}, ValueError, "bounds must have lower ends that are at most the upper"),
        ({"bounds": (float("nan"), 1)}, ValueError, "bounds must not be NaN"),
        ({"bounds": ("a", 1)}, TypeError, "bounds must have numbers or tensors as ends, got 'a'"),
        ({"bounds": (torch.zeros(4), None)}, ValueError, r"broadcast to \(2, 3\), got \(4,\)"),
        ({"bounds": {"weight": (0, 1)}}, ValueError, "bounds by name need parameters with names"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Minimize([parameter(2, 3)], **arguments)


def test_bounds_of_unknown_names():
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"bounds must name parameters of .*, got \['wieght'\]"):
        Minimize(net.named_parameters(), bounds={"wieght": (0, 1)})
    groups = [{"params": list(net.named_parameters()), "bounds": {"wieght": (0, 1)}}]
    with pytest.raises(ValueError, match=r"bounds must name parameters of .*, got \['wieght'\]"):
        Minimize(groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=f"got {dtype}"):
        Minimize([parameter(2, dtype=dtype)])
    optimizer = Minimize([parameter(2)])
    with pytest.raises(ValueError, match="float32 or float64"):
        optimizer.add_param_group({"params": [parameter(2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"params must be real numbers, got torch.complex64"):
        Minimize([parameter(2, dtype=torch.complex64)])


def test_nothing_to_train():
    frozen = parameter(2).requires_grad_(False)
    with pytest.raises(ValueError, match="params have nothing to train"):
        Minimize([frozen])
    later = parameter(2)
    optimizer = Minimize([later])
    later.requires_grad_(False)
    with pytest.raises(ValueError, match="params have nothing to train"):
        optimizer.step(lambda: later.sum())


@pytest.mark.parametrize("method", ["L-BFGS-B", "Newton-CG", "Nelder-Mead", "trust-constr"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda p: None, TypeError, "closure must return the loss, got None"),
        (lambda p: p, ValueError, r"closure must return one loss, .* got a tensor of shape \(2,\)"),
        (lambda p: p[:0], ValueError, r"closure must return one loss, .* shape \(0,\)"),
        (lambda p: p.sum() * 1j, TypeError, "closure must return a real loss, got torch.complex64"),
        (
            lambda p: "0.5",
            TypeError,
            "closure must return a real number or a 0-dim tensor, got str",
        ),
    ],
)
def test_closures_that_return_no_loss(method, result, error, message):
    p = parameter(2)
    with pytest.raises(error, match=message):
        Minimize([p], method).step(lambda: result(p))
    assert (p == 1).all()


@pytest.mark.parametrize("closure", [None, 3.0])
def test_step_needs_a_closure(closure):
    with pytest.raises(TypeError, match="closure must be a function without arguments"):
        Minimize([parameter(2)]).step(closure)


@pytest.mark.parametrize("method", ["L-BFGS-B", "Newton-CG"])
def test_closures_without_a_gradient(method):
    p = parameter(2)
    with pytest.raises(ValueError, match=r"closure must have a gradient .*return the loss with"):
        Minimize([p], method).step(lambda: p.sum().item())
    with pytest.raises(ValueError, match="closure must have a gradient"):
        Minimize([p], method).step(lambda: p.detach().sum())


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("Newton-CG", ValueError, r"closure must return the loss without backward\(\)"),
        ("trust-exact", ValueError, r"closure must return the loss without backward\(\)"),
        ("Nelder-Mead", RuntimeError, r"closure must not call backward\(\)"),
    ],
)
def test_closures_that_must_not_call_backward(method, error, message):
    p = parameter(2)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.raises(error, match=message):
        Minimize([p], method).step(closure)
    assert (p == 1).all()
    assert p.grad is None


@pytest.mark.parametrize("method", ["L-BFGS-B", "Nelder-Mead", "trust-constr", "COBYQA"])
def test_unknown_options_are_told_before_anything_is_evaluated(method):
    p = parameter(2)
    optimizer = Minimize([p], method, options={"max_iter": 3})
    with pytest.raises(ValueError, match=rf"options of {method}: .*max_iter"):
        optimizer.step(lambda: p.square().sum())
    assert (p == 1).all()
    assert optimizer.steps == 0


# ---- a PerturbedModel as population --------------------------------------------------------------


def test_populations_that_do_not_fit():
    net = perturbed.convert(nn.Linear(2, 1), 8, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, 8)
    arguments = {"method": "differential_evolution", "bounds": (-1, 1), "model": pm}
    with pytest.raises(ValueError, match="model must be a plain module: only differential_evol"):
        Minimize(net.parameters(), "L-BFGS-B", model=pm)
    with pytest.raises(ValueError, match="not differential_evolution with local"):
        Minimize(net.parameters(), **arguments, local="L-BFGS-B")
    with pytest.raises(ValueError, match="options must leave popsize and init to the model"):
        Minimize(net.parameters(), **arguments, options={"popsize": 3})
    with pytest.raises(ValueError, match="params must be all trainable parameters of the Pert"):
        Minimize([net.weight], **arguments)
    with pytest.raises(ValueError, match="params must be all trainable parameters of the Pert"):
        Minimize([*net.parameters(), parameter(2)], **arguments)
    few = perturbed.convert(nn.Linear(2, 1), 4, perturbed.Explicit())
    arguments["model"] = perturbed.PerturbedModel(few, 4)
    with pytest.raises(ValueError, match=r"model must have at least 5 directions .*, got 4"):
        Minimize(few.parameters(), **arguments)
    noisy = perturbed.convert(nn.Linear(2, 1), 8)
    arguments["model"] = perturbed.PerturbedModel(noisy, 8)
    with pytest.raises(ValueError, match=r"noise=Explicit\(\)"):
        Minimize(noisy.parameters(), **arguments)


def test_population_with_a_closure_of_one_loss():
    net = perturbed.convert(nn.Linear(2, 1), 8, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, 8)
    before = net.weight.detach().clone()
    optimizer = Minimize(net.parameters(), "differential_evolution", bounds=(-1, 1), model=pm)
    with pytest.raises(ValueError, match="values must be one per row"):
        optimizer.step(lambda: pm(torch.ones(8, 2)).mean())
    assert torch.equal(net.weight, before)
