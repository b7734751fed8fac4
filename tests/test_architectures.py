"""Whole models that others wrote: each row is its member, the estimate sums the members' noise."""

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import same

import perturbed
from perturbed import Dense, LowRank, Permuted, PerturbedModel, SignFlip, Sparse
from perturbed.nn.cost import count_multiply_adds
from perturbed.noise import NoiseFamily

D, REPEATS, SIGMA = 2, 4, 0.1

FAMILIES = [
    Dense(),
    Dense("rademacher", storage="stored"),
    LowRank(1),
    LowRank(2, "rademacher"),
    SignFlip(),
    Permuted(),
    Sparse(0.5),
]

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
each_family = pytest.mark.parametrize("noise", FAMILIES, ids=str)
# What no layer owns is expected to stay as it is; test_everything_else_has_noise says what it is.
pytestmark = pytest.mark.filterwarnings("ignore:convert left")


def unfit(noise: NoiseFamily) -> Callable[[str, nn.Module], bool]:
    """Return the predicate of layers that a family does not fit, such as too small a side."""

    def selector(name: str, module: nn.Module) -> bool:
        if next(module.children(), None) is not None or not module._parameters:
            return False
        try:
            perturbed.convert(copy.deepcopy(module), D, noise)
        except ValueError:
            return True
        return False

    return selector


def population(name: str, noise=None) -> tuple[nn.Module, PerturbedModel]:
    """Build an architecture, convert it to a family where that fits, and draw."""
    model = ARCHITECTURES[name].build()
    noise = noise or Dense()
    perturbed.convert(model, D, {unfit(noise): Dense(noise.distribution), "*": noise})
    pm = PerturbedModel(model, D, sigma=SIGMA, seed=3)
    pm.set_noise()
    return model, pm


def scores(output) -> Tensor:
    """Return the rows of a model's output."""
    return output if isinstance(output, Tensor) else output.logits


def members(pm: PerturbedModel):
    """Iterate over direction, sign, member and the rows that it has in a batch."""
    for d in range(D):
        for half, sign in enumerate((1, -1)):
            rows = [r * D + d for r in range(half * REPEATS // 2, (half + 1) * REPEATS // 2)]
            yield d, sign, pm.member(d, sign), rows


@each_family
@each_architecture
@torch.no_grad()
def test_every_row_is_its_member_and_the_estimate_their_sum(name, noise):
    model, pm = population(name, noise)
    assert any(layer.noise == noise for layer in pm.layers())
    inputs = ARCHITECTURES[name].inputs(REPEATS * D)
    before = scores(model(**inputs))
    together = scores(pm(**inputs))
    assert not torch.isclose(together, before).all(-1).any()  # the noise is seen in every row
    weights = torch.tensor([0.7, -1.3], dtype=torch.float64)
    expected = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for d, sign, member, rows in members(pm):
        same(together[rows], scores(member(**{k: v[rows] for k, v in inputs.items()})), 1e-9)
        for key, parameter in member.named_parameters():
            noise_d = sign * (parameter - model.get_parameter(key))
            expected[key] += weights[d] * noise_d / 2  # each direction has two members
    pm.set_grad(weights)
    for key, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        same(grad, expected[key], 1e-9)
    same(scores(model(**inputs)), before, 0)


@each_architecture
def test_everything_has_noise_that_a_layer_owns(name):
    model, pm = population(name)
    bare = {
        f"{e.name}.{n}" for e in perturbed.conversion_report(model).unperturbed for n in e.names
    }
    assert bare == ARCHITECTURES[name].bare
    assert "not called" not in pm.summary(**ARCHITECTURES[name].inputs(1))
    pm.set_grad(torch.ones(D, dtype=torch.float64))
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == bare


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(name):
    model, _ = population(name)
    inputs = ARCHITECTURES[name].inputs(3)
    counts = count_multiply_adds(model, (), inputs)
    matrices = (nn.modules.conv._ConvNd, nn.Linear)
    ours = sum(counts[id(m)] for m in model.modules() if isinstance(m, matrices))
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert 2 * ours == counter.get_total_flops()


@each_architecture
@torch.no_grad()
def test_replicated_rows_are_the_rows_repeated(name):
    """The short form of what every member sees; integers of language models too."""
    _, pm = population(name, LowRank(1))
    inputs = {k: pm.replicate(v) for k, v in ARCHITECTURES[name].inputs(2).items()}
    full = {k: v.full() for k, v in inputs.items()}
    same(scores(pm(**inputs)), scores(pm(**full)), 1e-9)


@each_architecture
def test_conversion_leaves_no_trace(name):
    model = ARCHITECTURES[name].build()
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    perturbed.revert(perturbed.convert(model, D))
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
    assert [id(p) for p in model.parameters()] == parameters


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_tied_embedding_and_output_have_one_noise(name):
    _, pm = population(name)
    tied = [
        m
        for m in pm.layers()
        if isinstance(m, nn.Embedding | nn.Linear) and m.weight.shape == (23, 8)
    ]
    assert len(tied) == 2
    embedding, head = (m.parameter_noise("weight", 0, D) for m in tied)
    assert tied[0].weight is tied[1].weight
    assert torch.equal(embedding, head)
    member = pm.member(1)
    weights = [m.weight for m in member.modules() if getattr(m, "weight", None) is not None]
    assert sum(w.shape == (23, 8) for w in weights) == 2
    assert len({id(w) for w in weights if w.shape == (23, 8)}) == 1


@pytest.mark.slow  # imports what transformers generates with
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_every_row_is_continued_by_its_member(name):
    """``generate`` as any method of the model, with its cache of keys and values."""
    _, pm = population(name, LowRank(1))
    rows = torch.arange(REPEATS * D * 3).view(-1, 3) % 23

    def write(model, prompts):
        mask = torch.ones_like(prompts)
        return model.generate(
            input_ids=prompts,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )

    together = write(pm, rows)
    for _, _, member, own in members(pm):
        assert torch.equal(together[own], write(member, rows[own]))
    assert not torch.equal(together, write(pm.model, rows))
