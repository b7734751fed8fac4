"""Perturbed attention: every row is its member, however it attends."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from families import FAMILIES, SIGMA, D
from torch import nn
from zoo import same

import perturbed
from perturbed import Dense, LowRank, PerturbedModel, PerturbedMultiheadAttention
from perturbed.nn import PerturbedLinear
from perturbed.testing import assert_bitwise_equal

E, H, L, S = 6, 2, 4, 5  # embedding, heads, lengths of queries and of keys
FEW = {"dense": Dense(), "low_rank": LowRank(2, "rademacher"), "stored": Dense(storage="stored")}
each_family = pytest.mark.parametrize("noise", FAMILIES.values(), ids=FAMILIES)
few_families = pytest.mark.parametrize("noise", FEW.values(), ids=FEW)
each_need = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])


def population(noise=None, antithetic=None, **options):
    """A layer with biases of its own (torch starts with zeros), float64, and its model."""
    options = {"batch_first": True, **options}
    layer = PerturbedMultiheadAttention(E, H, D, noise=noise, dtype=torch.float64, **options)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    pm = PerturbedModel(layer, D, antithetic=antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return layer, pm


def tokens(rows, length=L, features=E):
    return torch.randn(rows, length, features, dtype=torch.float64)


def kinds(rows, layer):
    """Arguments of self-attention, of a decoder's, and of three different tensors."""
    x, memory = tokens(rows), tokens(rows, S, layer.kdim)
    kinds = {
        "keys_are_values": (x, memory, memory),
        "three": (x, memory, tokens(rows, S, layer.vdim)),
    }
    if layer.kdim == layer.vdim == E:
        kinds["self"] = (x, x, x)
        kinds["keys_are_queries"] = (x, x, tokens(rows))
        kinds["values_are_queries"] = (x, tokens(rows), x)
    return {k: v for k, v in kinds.items() if k != "keys_are_values" or layer.kdim == layer.vdim}


def call(layer, arguments, b=None, **options):
    """Call with all rows, or with row b; arguments that are one tensor stay one."""
    if b is None:
        return layer(*arguments, **options)
    rows = {id(x): x[b : b + 1] for x in arguments}
    options = dict(options)
    for name, each in (("attn_mask", H), ("key_padding_mask", 1)):
        mask = options.get(name)
        if mask is not None and len(mask) == each * len(arguments[0]):
            options[name] = mask[b * each : (b + 1) * each]
    return layer(*(rows[id(x)] for x in arguments), **options)


def check_rows(pm, inputs, negated=True, **options):
    """Every row of output and weights equals its member's, called with that row alone.

    ``inputs`` is one set of arguments or several.
    """
    members = functools.cache(pm.member)
    for arguments in [inputs] if isinstance(inputs, tuple) else inputs:
        check_rows_of(pm, members, arguments, negated, **options)


def check_rows_of(pm, members, arguments, negated, **options):
    output, weights = call(pm, arguments, **options)
    rows = len(arguments[0])
    for b in range(rows):
        sign = -1 if negated and b >= rows // 2 else 1
        expected, expected_weights = call(members(b % D, sign), arguments, b, **options)
        same(output[b], expected[0], 1e-9)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            same(weights[b], expected_weights[0], 1e-9)


# ---- rows and estimates ------------------------------------------------------------------------


@each_family
@each_need
@torch.no_grad()
def test_rows_are_their_members(noise, need_weights):
    layer, pm = population(noise)
    layer.eval()
    check_rows(pm, kinds(2 * D, layer).values(), need_weights=need_weights)


OPTIONS = {
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "own_sizes": {"kdim": 5, "vdim": 7},
    "own_keys": {"kdim": 5, "bias": False},
    "own_values": {"vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
}


@few_families
@each_need
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_options_of_the_layer(noise, need_weights, options):
    layer, pm = population(noise, **options)
    check_rows(pm, kinds(2 * D, layer).values(), need_weights=need_weights)


def masks(rows, length):
    """Masks of every kind that leave each query something to attend to."""
    never = torch.ones(length, length).triu(1).bool()
    some = torch.rand(rows * H, length, length) < 0.4
    some[..., 0] = False
    padding = torch.arange(length) >= torch.randint(1, length + 1, (rows, 1))
    added = torch.randn(length, length, dtype=torch.float64)
    return {
        "causal": {"attn_mask": never},
        "added": {"attn_mask": added},
        "of_heads": {"attn_mask": some},
        "added_of_heads": {"attn_mask": torch.randn(some.shape, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "added_padding": {"key_padding_mask": torch.randn(rows, length, dtype=torch.float64)},
        "causal_padding": {"attn_mask": never, "key_padding_mask": padding},
        "of_heads_padding": {"attn_mask": some, "key_padding_mask": padding},
        "hint": {"attn_mask": never, "is_causal": True},
        "hint_padding": {"attn_mask": never, "key_padding_mask": padding, "is_causal": True},
    }


@each_need
@pytest.mark.parametrize("mask", masks(1, L))
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
@torch.no_grad()
def test_masks(need_weights, mask, extended):
    _, pm = population(add_bias_kv=extended, add_zero_attn=extended)
    x = tokens(2 * D)
    options = masks(len(x), L)[mask]
    for average in (True, False):
        check_rows(
            pm, (x, x, x), need_weights=need_weights, average_attn_weights=average, **options
        )
    plain, _ = pm(x, x, x)
    assert (pm(x, x, x, **options)[0] - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("repeats", "antithetic"), [(1, None), (2, None), (3, False), (4, True), (2, False)]
)
@torch.no_grad()
def test_repeats_and_signs(repeats, antithetic):
    layer, pm = population(antithetic=antithetic)
    negated = repeats > 1 and antithetic is not False
    check_rows(pm, kinds(repeats * D, layer).values(), negated)


@few_families
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}], ids=repr)
def test_estimates_are_weighted_sums(noise, options):
    layer, pm = population(noise, **options)
    weights = torch.randn(D, dtype=torch.float64)
    pm.set_grad(weights)
    plain = dict(layer.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in plain.items()}
    for d in range(D):
        for name, parameter in pm.member(d).named_parameters():
            total[name] += weights[d] * (parameter - plain[name]).detach()
    assert len(total) == len(list(nn.MultiheadAttention(E, H, **options).parameters()))
    for name, parameter in plain.items():
        assert parameter.grad.any()
        same(parameter.grad, total[name])


@few_families
@torch.no_grad()
def test_replicated_rows(noise):
    """In self-attention the unperturbed product is made once for the n rows."""
    layer, pm = population(noise)
    for arguments in kinds(3, layer).values():
        short = {id(x): pm.replicate(x) for x in arguments}
        y, weights = pm(*(short[id(x)] for x in arguments))
        full = {key: x.full() for key, x in short.items()}
        expected, expected_weights = pm(*(full[id(x)] for x in arguments))
        same(y, expected)
        same(weights, expected_weights)
    mixed = [pm.replicate(arguments[0]), pm.replicate(arguments[1]).full(), arguments[2]]
    mixed[2] = pm.replicate(mixed[2])
    same(pm(*mixed)[0], pm(*(x.full() if hasattr(x, "full") else x for x in mixed))[0])


@torch.no_grad()
def test_replicated_masks():
    _, pm = population()
    n, x = 3, tokens(3)
    short = pm.replicate(x)
    padding = masks(n, L)["padding"]["key_padding_mask"]
    check = pm(short, short, short, key_padding_mask=pm.replicate(padding))[0]
    full = short.full()
    same(check, pm(full, full, full, key_padding_mask=pm.replicate(padding).full())[0])
    heads = masks(n, L)["of_heads"]["attn_mask"]
    with pytest.raises(ValueError, match=r"heads of a row together.*unflatten\(0, \(-1, 2\)\)"):
        pm(short, short, short, attn_mask=pm.replicate(heads))
    good = pm.replicate(heads.unflatten(0, (-1, H))).flatten(0, 1)
    y = pm(short, short, short, attn_mask=good)[0]
    for b in range(len(y)):
        i = b // D % n
        member = pm.member(b % D, 1 if b < len(y) // 2 else -1)
        row = x[i : i + 1]
        same(y[b], member(row, row, row, attn_mask=heads[i * H : (i + 1) * H])[0][0], 1e-9)


class TimeFirst(nn.Module):
    """Rows first outside, steps first inside."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H)

    def forward(self, x, memory):
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        x = self.attention(x, x, x)[0]
        return self.attention(x, memory, memory)[0].transpose(0, 1)


@torch.no_grad()
def test_time_first_layers_inside_of_rows_first_models():
    net = perturbed.convert(TimeFirst().double(), D)
    pm = PerturbedModel(net, D, sigma=SIGMA)
    pm.set_noise()
    x, memory = tokens(2 * D), tokens(2 * D, S)
    y = pm(x, memory)
    for b in range(len(x)):
        member = pm.member(b % D, 1 if b < D else -1)
        same(y[b], member(x[b : b + 1], memory[b : b + 1])[0], 1e-9)


def test_time_first_arguments_are_no_rows():
    """pm(...) takes the first dimension for the rows; the layer would take the second."""
    _, pm = population(batch_first=False)
    x = tokens(L, 2 * D)
    with pytest.raises(ValueError, match="rows must stay the first dimension"):
        pm(x, x, x)
    with pm.perturbed():
        y, _ = pm.model(x, x, x)
    row = x[:, 1:2]
    same(y[:, 1], pm.member(1)(row, row, row)[0][:, 0], 1e-9)


@torch.no_grad()
def test_one_row_of_keys_stands_for_all():
    _, pm = population()
    x, memory = tokens(2 * D), tokens(1, S)
    mask = {"key_padding_mask": torch.tensor([[False, False, True, False, True]])}
    y, _ = pm(x, memory, memory, **mask)
    for b in range(len(x)):
        member = pm.member(b % D, 1 if b < D else -1)
        same(y[b], member(x[b : b + 1], memory, memory, **mask)[0][0], 1e-9)


# ---- transformers ------------------------------------------------------------------------------

SMALL = {"d_model": E, "nhead": H, "dim_feedforward": 9, "batch_first": True}
TRANSFORMERS = {
    "encoder_layer": lambda: nn.TransformerEncoderLayer(**SMALL),
    "norm_first": lambda: nn.TransformerEncoderLayer(**SMALL, norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**SMALL), 2),
    "decoder_layer": lambda: nn.TransformerDecoderLayer(**SMALL),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SMALL), 2),
    "transformer": lambda: nn.Transformer(
        **SMALL, num_encoder_layers=1, num_decoder_layers=1, dropout=0.3
    ),
}


@few_families
@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_torchs_transformers(noise, kind):
    net = TRANSFORMERS[kind]().double().eval()
    net = perturbed.convert(net, D, noise)
    pm = PerturbedModel(net, D, sigma=0.1, seed=3)
    pm.set_noise()
    assert not perturbed.conversion_report(net).unperturbed
    rows = 2 * D
    x, memory = tokens(rows), tokens(rows, S)
    padding = torch.arange(S) >= torch.randint(1, S + 1, (rows, 1))
    causal = torch.ones(L, L).triu(1).bool()
    inputs = {"transformer": (memory, x), "decoder_layer": (x, memory), "decoder": (x, memory)}
    options = {"src_key_padding_mask": padding[:, :L]}
    if kind == "transformer":
        options = {
            "tgt_mask": causal,
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
            "tgt_is_causal": True,
        }
    elif "decoder" in kind:
        options = {"tgt_mask": causal, "memory_key_padding_mask": padding, "tgt_is_causal": True}
    arguments = inputs.get(kind, (x,))
    y = pm(*arguments, **options)
    for b in range(rows):
        here = {k: v[b : b + 1] if "padding" in k else v for k, v in options.items()}
        member = pm.member(b % D, 1 if b < D else -1)
        # The fast path writes zeros at padded positions, which nobody reads.
        live = ~padding[b, :L] if "encoder" in kind or "norm" in kind else slice(None)
        same(y[b][live], member(*(a[b : b + 1] for a in arguments), **here)[0][live], 1e-9)


# ---- conversion --------------------------------------------------------------------------------


def test_conversion_takes_the_output_projection_with_it():
    net = nn.MultiheadAttention(E, H).double()
    out_proj, kind, state = net.out_proj, type(net.out_proj), copy.deepcopy(net.state_dict())
    perturbed.convert(net, D, LowRank(2))
    assert (type(net), type(net.out_proj)) == (PerturbedMultiheadAttention, PerturbedLinear)
    assert net.out_proj is out_proj
    assert net.noise == net.out_proj.noise == LowRank(2)
    perturbed.revert(net)
    assert (type(net), type(net.out_proj)) == (nn.MultiheadAttention, kind)
    for name, tensor in net.state_dict().items():
        assert_bitwise_equal(tensor, state[name])


@torch.no_grad()
def test_parts_can_be_left_out_or_have_other_noise():
    for noise in (
        {"attention.out_proj": None},
        {"attention.out_proj": LowRank(1), "*": Dense("rademacher")},
    ):
        net = perturbed.convert(TimeFirst().double(), D, noise)
        pm = PerturbedModel(net, D, sigma=SIGMA)
        pm.set_noise()
        x = tokens(2 * D)
        same(pm(x, x)[1], pm.member(1)(x[1:2], x[1:2])[0], 1e-9)
        left_out = pm.member(1).attention.out_proj.weight.equal(net.attention.out_proj.weight)
        assert left_out == (list(noise.values()) == [None])


def test_attention_that_is_left_out_keeps_its_output_projection():
    net = nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, H))
    with pytest.warns(UserWarning, match=r"without noise: 1\.out_proj"):
        perturbed.convert(net, D, exclude=lambda _, m: isinstance(m, nn.MultiheadAttention))
    assert type(net[1]) is nn.MultiheadAttention
    assert not isinstance(net[1].out_proj, PerturbedLinear)


def test_parameters_are_those_of_the_torch_layer():
    for options in (*OPTIONS.values(), {}):
        torch.manual_seed(3)
        plain = nn.MultiheadAttention(E, H, **options)
        torch.manual_seed(3)
        layer = PerturbedMultiheadAttention(E, H, D, **options)
        assert list(layer.state_dict()) == list(plain.state_dict())
        for name, parameter in plain.named_parameters():
            assert_bitwise_equal(layer.get_parameter(name), parameter)
        rows = {x: torch.randn(L, 7, x) for x in (plain.embed_dim, plain.kdim, plain.vdim)}
        inputs = [rows[x] for x in (plain.embed_dim, plain.kdim, plain.vdim)]
        for layer_out, plain_out in zip(layer(*inputs), plain(*inputs), strict=True):
            assert_bitwise_equal(layer_out, plain_out)
        assert type(perturbed.revert(layer)) is nn.MultiheadAttention
        assert type(layer.out_proj) is type(plain.out_proj)


@few_families
def test_frozen_and_tied_parameters(noise):
    layer, pm = population(noise, kdim=E, add_bias_kv=True)
    layer.in_proj_weight.requires_grad_(False)
    layer.bias_k.requires_grad_(False)
    layer.out_proj.weight = nn.Parameter(layer.out_proj.weight.detach())
    pm.set_noise()
    member = pm.member(0)
    assert member.in_proj_weight.equal(layer.in_proj_weight)
    assert member.bias_k.equal(layer.bias_k)
    assert not member.bias_v.equal(layer.bias_v)
    x = tokens(2 * D)
    check_rows(pm, (x, x, x))
    pm.set_grad(torch.ones(D, dtype=torch.float64))
    assert layer.in_proj_weight.grad is None
    assert layer.bias_v.grad.any()

    layer, pm = population(noise, kdim=5, vdim=5)
    layer.v_proj_weight = layer.k_proj_weight
    pm.set_noise()
    member = pm.member(1)
    same(member.v_proj_weight, member.k_proj_weight)
    memory = tokens(2 * D, S, 5)
    check_rows(pm, (x, memory, memory))


@few_families
@torch.no_grad()
def test_copies_and_states_continue_with_the_same_noise(noise):
    _, pm = population(noise, add_bias_kv=True)
    x = tokens(2 * D)
    y = pm(x, x, x)[0]
    assert_bitwise_equal(copy.deepcopy(pm)(x, x, x)[0], y)
    assert_bitwise_equal(pickle.loads(pickle.dumps(pm))(x, x, x)[0], y)
    _, other = population(noise, add_bias_kv=True)
    other.set_noise()
    other.load_state_dict(pm.state_dict())
    assert_bitwise_equal(other(x, x, x)[0], y)
    pm.set_noise()
    assert (pm(x, x, x)[0] - y).abs().max() > 0.01


# ---- torch's modes -----------------------------------------------------------------------------


@few_families
@each_need
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}], ids=repr)
def test_gradients(noise, need_weights, options):
    """Of inputs and parameters; those of a row are its member's."""
    layer, pm = population(noise, **options)
    inputs = [tokens(2 * D, 3, n).requires_grad_() for n in (E, layer.kdim, layer.vdim)]

    def forward(*inputs):
        return pm(*inputs, need_weights=need_weights)[0]

    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)
    pm(*inputs, need_weights=need_weights)[0][1].square().sum().backward()
    member = pm.member(1)
    rows = [x.detach()[1:2].requires_grad_() for x in inputs]
    member(*rows)[0].square().sum().backward()
    for x, row in zip(inputs, rows, strict=True):
        same(x.grad[1], row.grad[0], 1e-9)
    for name, parameter in member.named_parameters():
        same(layer.get_parameter(name).grad, parameter.grad, 1e-9)


@each_need
def test_dropout_is_that_of_training(need_weights):
    layer, pm = population(dropout=0.5)
    x = tokens(2 * D)
    layer.eval()
    expected = pm(x, x, x, need_weights=need_weights)[0]
    assert_bitwise_equal(pm(x, x, x, need_weights=need_weights)[0], expected)
    layer.train()
    torch.manual_seed(1)
    y, weights = pm(x, x, x, need_weights=need_weights, average_attn_weights=False)
    assert (y - expected).abs().max() > 0.01
    torch.manual_seed(1)
    assert_bitwise_equal(pm(x, x, x, need_weights=need_weights)[0], y)
    if need_weights:
        assert 0.2 < weights.eq(0).double().mean() < 0.8


@torch.no_grad()
def test_torchs_random_state_is_left_alone():
    _, pm = population()
    before = torch.get_rng_state()
    x = tokens(2 * D)
    after_input = torch.get_rng_state()
    pm.set_noise()
    pm(x, x, x)
    assert torch.get_rng_state().equal(after_input)
    assert not before.equal(after_input)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}], ids=repr)
@torch.no_grad()
def test_autocast_and_half_precision(options):
    layer, pm = population(**options)
    inputs = [tokens(2 * D, L, n) for n in (E, layer.kdim, layer.vdim)]
    exact = pm(*inputs)[0]
    layer.float()
    pm.free_memory()
    with torch.autocast("cpu", torch.bfloat16):
        y = pm(*(x.float() for x in inputs))[0]
    assert y.dtype == torch.bfloat16
    bound = 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() < bound
    layer.bfloat16()
    pm.free_memory()
    y = pm(*(x.bfloat16() for x in inputs))[0]
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < bound


def test_compiled_layers_compute_the_same():
    _, pm = population(LowRank(1))
    torch._dynamo.reset()
    compiled = torch.compile(pm, backend="eager", fullgraph=True)
    for need, repeats in itertools.product((True, False), (2, 4)):  # sizes become symbols
        x, memory = tokens(repeats * D), tokens(repeats * D, S)
        for arguments in ((x, x, x), (x, memory, memory)):
            got = compiled(*arguments, need_weights=need)[0]
            same(got, pm(*arguments, need_weights=need)[0])


# ---- bad input ---------------------------------------------------------------------------------

X, M = torch.ones(2 * D, L, E).double(), torch.ones(2 * D, S, E).double()
BAD = {
    "unbatched": (
        (X[0],) * 3, {}, ValueError, r"query must be \(B, T, 6\).*got \(4, 6\).*unsqueeze\(0\)"
    ),
    "key_unbatched": ((X, M[0], M[0]), {}, ValueError, r"key must be \(B, T, 6\)"),
    "features": ((X, M, M[..., :3]), {}, ValueError, r"value must be \(B, T, 6\).*got \(6, 5, 3\)"),
    "integers": ((X.long(),) * 3, {}, TypeError, "floating point, got torch.int64"),
    "rows": ((X, M[:3], M[:3]), {}, ValueError, "same rows"),
    "lengths": ((X, M, M[:, :3]), {}, ValueError, "key and value the same length"),
    "directions": ((X[:5],) * 3, {}, ValueError, r"R \* D rows, D = 3 .* got 5"),
    "mask": (
        (X, M, M), {"attn_mask": torch.ones(L, L)}, ValueError, r"must be \(L, S\) = \(4, 5\)"
    ),
    "mask_rows": (
        (X, X, X),
        {"attn_mask": torch.ones(2 * D, L, L)},
        ValueError,
        r"\(B \* H, L, S\) = \(12, 4, 4\), got \(6, 4, 4\)",
    ),
    "mask_type": (
        (X, X, X), {"attn_mask": torch.ones(L, L).int()}, TypeError, "attn_mask must be bool"
    ),
    "padding": (
        (X, M, M),
        {"key_padding_mask": torch.ones(2 * D, L).bool()},
        ValueError,
        r"key_padding_mask must be \(B, S\) = \(6, 5\), got \(6, 4\)",
    ),
    "hint": ((X, X, X), {"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_inputs_are_refused(bad):
    arguments, options, error, words = BAD[bad]
    _, pm = population()
    with pytest.raises(error, match=words):
        pm(*arguments, **options)
    assert not pm.state.active


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    _, pm = population()
    x = torch.nested.nested_tensor([torch.ones(n, E).double() for n in (2, 3, 4)])
    with pytest.raises(TypeError, match="query must be a padded tensor"), pm.perturbed():
        pm.model(x, x, x)


def test_noise_that_does_not_fit_is_refused():
    for options, words in (({}, "rank must be at most .* = 6"), ({"kdim": 3, "vdim": 3}, "= 3")):
        with pytest.raises(ValueError, match=words):
            PerturbedMultiheadAttention(E, H, D, noise=LowRank(7 if not options else 4), **options)


@torch.no_grad()
def test_empty_sequences():
    _, pm = population()
    for rows, length, source in itertools.product((0, 2 * D), (0, L), (1, S)):
        x, memory = tokens(rows, length), tokens(rows, source)
        y, _ = pm(x, memory, memory)
        assert y.shape == (rows, length, E)
