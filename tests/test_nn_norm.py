"""Affine and normalisation layers: every row has scale and shift of its own, members their own
statistics."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from families import signs
from torch import nn
from zoo import same

import perturbed
from perturbed import (
    Dense,
    LowRank,
    PerturbedAffine,
    PerturbedBatchNorm1d,
    PerturbedBatchNorm2d,
    PerturbedBatchNorm3d,
    PerturbedGroupNorm,
    PerturbedLayerNorm,
    PerturbedModel,
    PerturbedRMSNorm,
    convert,
    revert,
)
from perturbed.nn import Affine
from perturbed.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_close_to_reference,
    dtype_id,
)

SIGMA, D = 0.3, 3


@dataclass(frozen=True)
class Kind:
    """A layer, the shape of its rows, and a torch layer that is the same without noise."""

    make: Callable[..., nn.Module]
    row: tuple[int, ...]
    torch_layer: Callable[..., nn.Module]


KINDS = {
    "affine": Kind(lambda **k: PerturbedAffine(6, D, **k), (6,), lambda **k: Affine(6, **k)),
    "affine-tokens": Kind(
        lambda **k: PerturbedAffine((4, 6), D, bias=False, **k),
        (5, 4, 6),
        lambda **k: Affine((4, 6), bias=False, **k),
    ),
    "affine-channels": Kind(
        lambda **k: PerturbedAffine((5, 1, 1), D, **k),
        (5, 2, 3),
        lambda **k: Affine((5, 1, 1), **k),
    ),
    "layer_norm": Kind(
        lambda **k: PerturbedLayerNorm(6, D, **k), (6,), lambda **k: nn.LayerNorm(6, **k)
    ),
    "layer_norm-tokens": Kind(
        lambda **k: PerturbedLayerNorm((4, 6), D, eps=0.1, **k),
        (5, 4, 6),
        lambda **k: nn.LayerNorm((4, 6), eps=0.1, **k),
    ),
    "layer_norm-no_bias": Kind(
        lambda **k: PerturbedLayerNorm(6, D, bias=False, **k),
        (5, 6),
        lambda **k: nn.LayerNorm(6, bias=False, **k),
    ),
    "rms_norm": Kind(lambda **k: PerturbedRMSNorm(6, D, **k), (6,), lambda **k: nn.RMSNorm(6, **k)),
    "rms_norm-tokens": Kind(
        lambda **k: PerturbedRMSNorm((4, 6), D, eps=0.1, **k),
        (5, 4, 6),
        lambda **k: nn.RMSNorm((4, 6), eps=0.1, **k),
    ),
    "group_norm": Kind(
        lambda **k: PerturbedGroupNorm(2, 6, D, **k),
        (6, 2, 3),
        lambda **k: nn.GroupNorm(2, 6, **k),
    ),
    "group_norm-flat": Kind(
        lambda **k: PerturbedGroupNorm(3, 6, D, eps=0.1, **k),
        (6,),
        lambda **k: nn.GroupNorm(3, 6, eps=0.1, **k),
    ),
    "batch_norm1d": Kind(
        lambda **k: PerturbedBatchNorm1d(6, D, **k), (6,), lambda **k: nn.BatchNorm1d(6, **k)
    ),
    "batch_norm1d-length": Kind(
        lambda **k: PerturbedBatchNorm1d(6, D, **k), (6, 5), lambda **k: nn.BatchNorm1d(6, **k)
    ),
    "batch_norm2d": Kind(
        lambda **k: PerturbedBatchNorm2d(6, D, eps=0.1, **k),
        (6, 2, 3),
        lambda **k: nn.BatchNorm2d(6, eps=0.1, **k),
    ),
    "batch_norm3d": Kind(
        lambda **k: PerturbedBatchNorm3d(6, D, **k),
        (6, 2, 1, 3),
        lambda **k: nn.BatchNorm3d(6, **k),
    ),
}
BATCH_NORMS = {name: kind for name, kind in KINDS.items() if name.startswith("batch")}

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_batch_norm = pytest.mark.parametrize("kind", BATCH_NORMS.values(), ids=BATCH_NORMS)
each_repeats = pytest.mark.parametrize(
    ("repeats", "antithetic", "negated"),
    [(1, None, False), (3, False, False), (4, None, True)],
)


def population(kind, antithetic=None, noise=None, dtype=torch.float64, sigma=SIGMA):
    """A layer in eval mode with parameters and statistics that are not torch's initial ones."""
    layer = kind.make(noise=noise, dtype=dtype).eval()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    pm = PerturbedModel(layer, D, antithetic=antithetic, sigma=sigma, seed=5)
    pm.set_noise()
    return layer, pm


def batch(kind, repeats, dtype=torch.float64):
    return (torch.randn(repeats * D, *kind.row) + 0.3).to(dtype)


# ---- one noise ---------------------------------------------------------------------------------


@each_kind
@each_repeats
@torch.no_grad()
def test_rows_are_their_members(kind, repeats, antithetic, negated):
    _, pm = population(kind, antithetic, Dense("rademacher" if repeats == 3 else "normal"))
    x = batch(kind, repeats)
    y = pm(x)
    assert y.shape == x.shape
    for b, s in enumerate(signs(len(x), D, negated)):
        same(pm.member(b % D, int(s))(x[b : b + 1])[0], y[b])


@each_kind
def test_members_and_estimates_hold_the_same_noise(kind):
    layer, pm = population(kind)
    weights = torch.randn(D, dtype=torch.float64)
    pm.set_grad(weights)
    for name, parameter in layer.named_parameters():
        noise = layer.parameter_noise(name, 0, D)
        assert noise.shape == (D, *parameter.shape)
        assert len(noise.unique()) == noise.numel()  # every element has its own
        same(parameter.grad, SIGMA * torch.tensordot(weights, noise, 1))
        for d in range(D):
            for sign in (1, -1):
                member = dict(pm.member(d, sign).named_parameters())[name]
                same(member - parameter, sign * SIGMA * noise[d])


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@torch.no_grad()
def test_every_dtype_is_as_accurate_as_plain_torch(kind, dtype):
    layer, pm = population(kind, dtype=dtype)
    x = batch(kind, 2, dtype)
    y = pm(x)
    members = [pm.member(b % D, 1 if b < D else -1) for b in range(len(x))]
    plain = torch.cat([m(x[b : b + 1]) for b, m in enumerate(members)])
    exact = []
    for b in range(len(x)):
        member = revert(copy.deepcopy(layer)).double()
        for name, parameter in member.named_parameters():
            noise = layer.parameter_noise(name, b % D, 1)[0].double()
            parameter.add_(noise, alpha=SIGMA if b < D else -SIGMA)
        exact.append(member(x[b : b + 1].double()))
    if dtype == torch.float64:
        same(y, torch.cat(exact))
    else:
        assert_close_to_reference(y, plain, torch.cat(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@torch.no_grad()
def test_half_precision_keeps_noise_below_its_resolution(dtype):
    """1.1 plus or minus an eighth of the dtype's step is 1.1, yet shows in the mean over many."""
    sigma = torch.finfo(dtype).eps / 8
    layer = PerturbedAffine(1, D, bias=False, dtype=dtype)
    layer.weight.fill_(1.1)
    pm = PerturbedModel(layer, D, sigma=sigma)
    pm.set_noise()
    x = (torch.rand(D, 1 << 16, 1) + 1).to(dtype)
    y, values = pm(x).double().flatten(1), x.double().flatten(1)
    scale = (y * values).sum(1) / values.square().sum(1) - layer.weight.double()
    noise = sigma * layer.parameter_noise("weight", 0, D).double().flatten()
    assert noise.abs().max() > sigma / 2
    torch.testing.assert_close(scale, noise, rtol=0, atol=sigma / 4)


@each_kind
@pytest.mark.parametrize("antithetic", [None, False])
@torch.no_grad()
def test_replicated_rows_are_normalised_once(kind, antithetic, monkeypatch):
    _, pm = population(kind, antithetic)
    x = batch(kind, 2)[:4]
    short = pm.replicate(x)
    expected = pm(short.full())
    seen = []
    for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm"):
        function = getattr(torch.nn.functional, name)

        def spy(rows, *args, function=function, **kwargs):
            seen.append(len(rows))
            return function(rows, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, name, spy)
    same(pm(short), expected)
    assert seen in ([], [4])


@each_kind
@torch.no_grad()
def test_inputs_are_left_alone(kind):
    _, pm = population(kind)
    x = batch(kind, 2)
    before = x.clone()
    pm(x)
    assert_bitwise_equal(x, before)


@torch.no_grad()
def test_replicates_of_another_number_of_copies_are_written_out():
    kind = KINDS["batch_norm1d"]
    layer, pm = population(kind)
    layer.train()
    rows = perturbed.Replicated(batch(kind, 2)[:4], 1, D)  # 4 repeats of which 2 are negated
    same(pm(rows), pm(rows.full()))


@each_kind
def test_gradients_are_those_of_the_members(kind):
    layer, pm = population(kind)
    x = batch(kind, 2).requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype)
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad((pm(x) * weights).sum(), (x, *parameters.values()))
    total = torch.zeros(())
    values = {name: torch.zeros_like(p) for name, p in parameters.items()}
    of_x = []
    for b in range(len(x)):
        member = pm.member(b % D, 1 if b < D else -1)
        row = x[b : b + 1].detach().requires_grad_()
        total = (member(row) * weights[b : b + 1]).sum()
        names = dict(member.named_parameters())
        grads = torch.autograd.grad(total, (row, *names.values()))
        of_x.append(grads[0])
        for name, grad in zip(names, grads[1:], strict=True):
            values[name] += grad
    same(got[0], torch.cat(of_x), 1e-9)
    for grad, name in zip(got[1:], parameters, strict=True):
        same(grad, values[name], 1e-9)


@each_kind
def test_frozen_parameters_have_no_noise(kind):
    layer, _ = population(kind)
    layer.weight.requires_grad_(False)
    if layer._parameters.get("bias") is None:
        layer = nn.Sequential(layer, PerturbedAffine(kind.row[-1], D, dtype=torch.float64))
    pm = PerturbedModel(layer, D, sigma=SIGMA)
    pm.set_noise()
    x = batch(kind, 2)
    assert pm(x).requires_grad
    with torch.no_grad():
        y = pm(x)
    same(pm(x), y)
    frozen = layer[0] if isinstance(layer, nn.Sequential) else layer
    assert "weight" not in frozen.perturbed_parameters()
    for b in range(len(x)):
        same(pm.member(b % D, 1 if b < D else -1)(x[b : b + 1])[0], y[b])
    short = pm.replicate(x[:4])
    same(pm(short), pm(short.full()))


@torch.no_grad()
def test_one_row_stands_for_all():
    """Embedded positions, (1, T, n), in a forward of B rows."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = PerturbedLayerNorm(6, D, dtype=torch.float64)
            self.register_buffer("positions", torch.randn(1, 5, 6).double())

        def forward(self, x):
            return x + self.norm(self.positions)

    pm = PerturbedModel(Positions(), D, sigma=SIGMA)
    pm.set_noise()
    x = torch.randn(2 * D, 5, 6).double()
    y = pm(x)
    for b in range(2 * D):
        same(pm.member(b % D, 1 if b < D else -1)(x[b : b + 1])[0], y[b])


# ---- batch statistics --------------------------------------------------------------------------


@each_batch_norm
@pytest.mark.parametrize("antithetic", [None, False])
@torch.no_grad()
def test_members_in_training_mode_see_the_statistics_of_their_rows(kind, antithetic):
    layer, pm = population(kind, antithetic)
    layer.train()
    x = batch(kind, 6)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = pm(x)
    for name, value in layer.state_dict().items():
        assert_bitwise_equal(value, before[name])
    s = signs(len(x), D, antithetic is not False)
    for d in range(D):
        for sign in s.unique():
            rows = [b for b in range(len(x)) if b % D == d and s[b] == sign]
            member = pm.member(d, int(sign))
            assert member.training
            same(member(x[rows]), y[rows])


@each_batch_norm
@torch.no_grad()
def test_one_member_does_not_feel_the_rows_of_another(kind):
    layer, pm = population(kind)
    layer.train()
    x = batch(kind, 4)
    y = pm(x)
    x[1::D] = 100 * torch.randn(x[1::D].shape).double()
    changed = pm(x)
    assert_bitwise_equal(changed[0::D], y[0::D])
    assert not torch.equal(changed[1::D], y[1::D])


@pytest.mark.parametrize("antithetic", [None, False])
@torch.no_grad()
def test_replicated_rows_share_their_statistics(antithetic):
    layer, pm = population(KINDS["batch_norm2d"], antithetic)
    layer.train()
    x = pm.replicate(batch(KINDS["batch_norm2d"], 2)[:4])
    same(pm(x), pm(x.full()))


@torch.no_grad()
def test_without_running_statistics_evaluation_is_by_member_too():
    layer = PerturbedBatchNorm2d(6, D, track_running_stats=False, dtype=torch.float64).eval()
    pm = PerturbedModel(layer, D, sigma=SIGMA)
    pm.set_noise()
    x = batch(KINDS["batch_norm2d"], 4)
    y = pm(x)
    for sign in (1, -1):
        rows = [0, D] if sign == 1 else [2 * D, 3 * D]
        same(pm.member(0, sign)(x[rows]), y[rows])


@torch.no_grad()
def test_statistics_without_parameters_are_not_mixed_either():
    norm = PerturbedBatchNorm1d(6, D, affine=False, dtype=torch.float64)
    net = nn.Sequential(norm, PerturbedAffine(6, D, dtype=torch.float64))
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    x = batch(KINDS["batch_norm1d"], 4)
    y = pm(x)
    for d in range(D):
        rows = [2 * D + d, 3 * D + d]
        same(pm.member(d, -1)(x[rows]), y[rows])


def test_conversion_finds_statistics_without_parameters():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))
    convert(net, D)
    assert type(net[1]) is PerturbedBatchNorm1d
    assert type(revert(net)[1]) is nn.BatchNorm1d


@torch.no_grad()
def test_unperturbed_forwards_update_the_running_statistics():
    layer, _ = population(KINDS["batch_norm1d"])
    layer.train()
    x = batch(KINDS["batch_norm1d"], 4)
    expected = nn.BatchNorm1d(6, dtype=torch.float64)
    expected.load_state_dict(layer.state_dict())
    assert_bitwise_equal(layer(x), expected(x))
    assert_bitwise_equal(layer.running_mean, expected.running_mean)


@pytest.mark.parametrize("repeats", [1, 2])
def test_statistics_of_a_single_value_are_refused(repeats):
    layer, pm = population(KINDS["batch_norm1d"])
    layer.train()
    with pytest.raises(ValueError, match="more than one value per channel: a member has 1 rows"):
        pm(batch(KINDS["batch_norm1d"], repeats))


# ---- as torch layers ---------------------------------------------------------------------------


@each_kind
def test_conversion_changes_the_class_alone(kind):
    net = nn.Sequential(kind.torch_layer(dtype=torch.float64)).eval()
    plain, weight = type(net[0]), net[0].weight
    x = batch(kind, 2)
    expected = net(x)
    convert(net, D, LowRank(2, "rademacher"))
    assert type(net[0]) is type(kind.make())
    assert net[0].noise == Dense("rademacher")
    assert net[0].weight is weight
    assert_bitwise_equal(net(x), expected.detach())
    pm = PerturbedModel(net, D)
    pm.set_noise()
    assert not torch.equal(pm(x), expected)
    revert(net)
    assert type(net[0]) is plain
    assert_bitwise_equal(net(x), expected)


@each_kind
def test_layers_pickle_and_describe_themselves(kind):
    layer, pm = population(kind)
    again = pickle.loads(pickle.dumps(pm))
    x = batch(kind, 2)
    assert_bitwise_equal(again(x), pm(x))
    assert f"directions={D}, noise=Dense('normal')" in repr(layer)
    assert repr(kind.torch_layer()).split("(", 1)[1][:-1] in repr(layer)


@each_kind
@torch.no_grad()
def test_empty_batches_stay_empty(kind):
    _, pm = population(kind)
    x = batch(kind, 0)
    assert pm(x).shape == x.shape
    assert pm(pm.replicate(x)).shape == x.shape


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "batch_norm2d"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, of its own layer
@torch.no_grad()
def test_autocast_gives_the_dtype_of_the_torch_layer(name):
    kind = KINDS[name]
    _, pm = population(kind, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = batch(kind, 2, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert pm(x).dtype == pm.model(x).dtype


@torch.no_grad()
def test_float32_parameters_serve_half_precision_rows():
    for name in ("layer_norm", "group_norm", "batch_norm2d"):
        _, pm = population(KINDS[name], dtype=torch.float32)
        x = batch(KINDS[name], 2, torch.bfloat16)
        assert pm(x).dtype == pm.model(x).dtype == torch.bfloat16


@torch.no_grad()
def test_channels_last_images_stay_so():
    for name in ("group_norm", "batch_norm2d", "affine-channels"):
        _, pm = population(KINDS[name])
        x = batch(KINDS[name], 4).to(memory_format=torch.channels_last)
        for mode in (True, False):
            pm.model.train(mode)
            same(pm(x), pm(x.contiguous()))


@pytest.mark.parametrize("name", ["affine", "layer_norm", "rms_norm", "batch_norm2d"])
@torch.no_grad()
def test_compiled_forwards_follow_the_draw(name):
    kind = KINDS[name]
    _, pm = population(kind)
    torch._dynamo.reset()
    compiled = torch.compile(pm.model, backend="eager", fullgraph=True)
    x = batch(kind, 2)
    for _ in range(2):
        with pm.perturbed():
            assert_bitwise_equal(compiled(x), pm(x))
        pm.set_noise()


def test_the_global_generator_is_left_alone():
    _, pm = population(KINDS["layer_norm"])
    state = torch.get_rng_state()
    pm.set_noise()
    pm(batch(KINDS["layer_norm"], 2).clone())
    assert not torch.equal(torch.get_rng_state(), state)  # the batch
    state = torch.get_rng_state()
    pm.set_noise()
    pm.set_grad(torch.ones(D))
    assert torch.equal(torch.get_rng_state(), state)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "error", "words"),
    [
        ("layer_norm", torch.ones(6), ValueError, r"input must be \(B, \*, \(6,\)\).* \(6,\)"),
        ("layer_norm", torch.ones(7, 6), ValueError, "R \\* D rows, D = 3 .* got 7 rows"),
        ("layer_norm", torch.ones(6, 6).int(), TypeError, "floating point, got torch.int32"),
        ("group_norm", torch.ones(6), ValueError, r"input must be \(B, 6, \*\)"),
        ("group_norm", torch.ones(6, 4), ValueError, r"6 channels, got \(6, 4\)"),
        ("batch_norm2d", torch.ones(6, 6), ValueError, "expected 4D input"),
        ("batch_norm2d", torch.ones(6, 5, 2, 2), ValueError, "6 channels, got"),
        ("affine", torch.ones(6), ValueError, r"input must be \(B, \*, \(6,\)\)"),
        ("affine", torch.ones(6, 5), ValueError, r"normalized_shape = \(6,\) broadcasts to, got"),
        ("affine-channels", torch.ones(6, 4, 2, 2), ValueError, r"normalized_shape = \(5, 1, 1\)"),
    ],
)
def test_wrong_inputs_are_named(name, x, error, words):
    _, pm = population(KINDS[name], dtype=torch.float32)
    with pytest.raises(error, match=words):
        pm(x)


@pytest.mark.parametrize(
    ("shape", "error"),
    [(-1, ValueError), ((3, -2), ValueError), (2.5, TypeError), ("3", TypeError)],
)
def test_wrong_shapes_of_an_affine_layer_are_named(shape, error):
    with pytest.raises(error, match="normalized_shape must"):
        Affine(shape)
