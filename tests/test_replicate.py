"""pm.replicate: every member sees the same rows, whatever the model does with them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import KINDS, D, inputs, population, same

import perturbed
from perturbed import Dense, PerturbedModel, Replicated
from perturbed.testing import assert_bitwise_equal

N = 3
SIGNS = {None: 2, True: 2, False: 1}

each_antithetic = pytest.mark.parametrize("antithetic", SIGNS)


def written_out(x, copies, directions=D):
    """Row b = x[b // D % n], from the definition."""
    rows = copies * len(x) * directions
    return torch.stack([x[b // directions % len(x)] for b in range(rows)])


@each_antithetic
@pytest.mark.parametrize("shape", [(N,), (N, 6), (N, 2, 6), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_rows(antithetic, shape, dtype):
    _, pm = population(antithetic=antithetic)
    x = torch.randint(0, 2, shape).to(dtype)
    rows = pm.replicate(x)
    assert isinstance(rows, Replicated)
    assert (rows.dtype, rows.shape) == (dtype, (SIGNS[antithetic] * shape[0] * D, *shape[1:]))
    assert rows.source.data_ptr() == x.data_ptr()
    expected = written_out(x, SIGNS[antithetic])
    assert_bitwise_equal(rows.full(), expected)
    assert_bitwise_equal(torch.cat([rows, rows]), torch.cat([expected, expected]))
    assert_bitwise_equal(rows[1::2], expected[1::2])


KINDS_OF_ONE_INPUT = {
    name: kind
    for name, kind in KINDS.items()
    if name not in ("keywords", "batch")  # their rows come in several arguments
}


@each_antithetic
@pytest.mark.parametrize("noise", [Dense(), Dense("rademacher"), Dense(storage="stored")], ids=str)
@pytest.mark.parametrize("rows", [1, N, 30])
@pytest.mark.parametrize("kind", KINDS_OF_ONE_INPUT.values(), ids=KINDS_OF_ONE_INPUT)
@torch.no_grad()
def test_every_kind_of_model_sees_the_rows(kind, rows, noise, antithetic):
    _, pm = kind.convert(noise=noise, antithetic=antithetic)
    (x,), _ = kind.arguments(rows)
    short = kind.call(pm, (pm.replicate(x),), {})
    full = kind.call(pm, (written_out(x, SIGNS[antithetic]),), {})
    assert type(short) is torch.Tensor
    same(short, full)
    members = pm.member_mean(short)
    assert members.shape == (SIGNS[antithetic], D)
    alone = kind.call(pm.member(2, 1), (x,), {})
    same(members[0, 2], alone.mean())


@pytest.mark.parametrize("noise", [Dense(), Dense(storage="stored")], ids=str)
def test_the_base_product_is_computed_once_for_all(noise, monkeypatch):
    _, pm = population(noise=noise)
    rows = []
    linear = F.linear

    def spy(x, weight, bias=None):
        rows.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    pm(pm.replicate(inputs()[:N]))
    assert rows == [N, 2 * N * D]  # the second layer's rows differ from each other


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 - 1,
        lambda x: (x / 255).float().double(),
        lambda x: torch.relu(x).neg().abs(),
        lambda x: x.flatten(1),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(-1, 12).reshape(x.shape),
        lambda x: F.dropout(x, 0.0),
        lambda x: x.clamp(0, 1).contiguous().detach().clone(),
    ],
)
@torch.no_grad()
def test_row_wise_functions_keep_the_short_form(function):
    _, pm = population()
    x = torch.randn(N, 2, 6, dtype=torch.float64)
    result = function(pm.replicate(x))
    assert isinstance(result, Replicated)
    assert_bitwise_equal(result.full(), function(written_out(x, 2)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(0),
        lambda x: x.transpose(0, 1),
        lambda x: x.flatten(0, 1),
        lambda x: x + torch.arange(12.0).view(2, 6),
        lambda x: x * x,
        lambda x: x @ torch.ones(6, 3, dtype=torch.float64),
        lambda x: F.layer_norm(x, (6,)),
        lambda x: torch.stack([x, x]).mean(),
        lambda x: x.sort(0).values,
        lambda x: x[x > 0],
        lambda x: x.cumsum(0),
        lambda x: F.softmax(x, 0),
        lambda x: x.unfold(0, 2, 1),
        lambda x: x.roll(1, 0),
        lambda x: x.view(6, -1),
        lambda x: x.unsqueeze(0),
        lambda x: torch.outer(x[:, 0, 0], x[:, 0, 1]),
        lambda x: 1 - x,
        lambda x: torch.where(x > 0, x, torch.zeros(())),
    ],
)
@torch.no_grad()
def test_all_other_functions_see_the_full_rows(function):
    _, pm = population()
    x = torch.randn(N, 2, 6, dtype=torch.float64)
    result = function(pm.replicate(x))
    if isinstance(result, Replicated):
        result = result.full()
    same(result, function(written_out(x, 2)))


def test_labels_and_losses():
    _, pm = population()
    x, labels = inputs()[:N], torch.tensor([0, 2, 1])
    logits = pm(pm.replicate(x))
    losses = F.cross_entropy(logits, pm.replicate(labels), reduction="none")
    same(losses, F.cross_entropy(logits, written_out(labels, 2), reduction="none"))
    hits = logits.argmax(1) == pm.replicate(labels)
    assert_bitwise_equal(hits, logits.argmax(1) == written_out(labels, 2))
    plus = F.cross_entropy(pm.member(1)(x), labels)
    same(pm.member_mean(losses)[0, 1], plus)


def test_writing_in_place_is_refused():
    """As torch refuses it for expanded tensors: the rows share their memory."""
    _, pm = population()
    x = inputs()[:N]
    before = x.clone()
    rows = pm.replicate(x)
    for write in (lambda: rows.add_(1), rows.zero_, lambda: torch.relu_(rows)):
        with pytest.raises(RuntimeError, match=r"in place into replicated rows; use x\.full\(\)"):
            write()
    with pytest.raises(RuntimeError, match="replicated rows"):
        rows[0] = 1
    assert_bitwise_equal(x, before)
    out = torch.empty(rows.shape, dtype=x.dtype)
    out.copy_(rows)  # reading in an operator that writes elsewhere is fine
    assert_bitwise_equal(out, rows.full())


@pytest.mark.parametrize("rows", [N, 30])
def test_gradients_of_the_rows(rows):
    _, pm = population()
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    outputs = pm(pm.replicate(x))
    (grad,) = torch.autograd.grad(outputs.square().sum(), x)
    total = sum(pm.member(d, s)(x).square().sum() for d in range(D) for s in (1, -1))
    (expected,) = torch.autograd.grad(total, x)
    same(grad, expected)
    with torch.no_grad():
        assert isinstance(pm.replicate(x), Replicated)


@pytest.mark.parametrize("rows", [N, 30])
def test_gradients_of_the_parameters(rows):
    net, pm = population()
    x = torch.randn(rows, 6, dtype=torch.float64)
    grads = []
    for batch in (pm.replicate(x), pm.replicate(x).full()):
        loss = pm(batch).square().sum()
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    for short, full in zip(*grads, strict=True):
        same(short, full)


def test_rows_of_rows():
    _, pm = population()
    x = inputs()[:N]
    twice = pm.replicate(pm.replicate(x))
    assert_bitwise_equal(twice.full(), written_out(written_out(x, 2), 2))
    same(pm(twice), pm(twice.full()))


def test_rows_of_another_population():
    """Their order is another; only the full rows are right."""
    _, pm = population()
    other = PerturbedModel(perturbed.convert(nn.Linear(6, 3), 2), 2)
    rows = other.replicate(inputs()[:4])  # 2 * 4 * 2 = 16 rows, R = 4 for D = 4
    same(pm(rows), pm(rows.full()))


def test_no_rows():
    _, pm = population()
    assert pm(pm.replicate(torch.empty(0, 6).double())).shape == (0, 3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_the_source_only(how):
    _, pm = population()
    rows = pm.replicate(inputs()[:N])
    other = how(rows)
    assert isinstance(other, Replicated)
    assert other.source.data_ptr() != rows.source.data_ptr()
    assert_bitwise_equal(other.full(), rows.full())
    assert "S=2, D=4" in repr(rows)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.tensor(1.0), ValueError, "without dimensions"),
        ([1.0], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_has_no_rows_is_refused(x, error, words):
    _, pm = population()
    with pytest.raises(error, match=words):
        pm.replicate(x)
