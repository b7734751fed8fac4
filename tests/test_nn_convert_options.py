"""convert's choices: noise by mapping, include and exclude; what stays without noise; errors."""

import functools
import warnings

import pytest
import torch
from torch import nn
from zoo import D, OwnForward, Tied, inputs, same

import perturbed
from perturbed import Dense, LowRank, PerturbedLinear, PerturbedModel, SignFlip, Sparse
from perturbed.nn.twins import TWINS

SIGNS = Dense("rademacher")


class Block(nn.Module):
    """Two layers under names."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks in a list, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def families(net):
    """Family of every Linear by name, None for those that have none."""
    named = ((name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear))
    return {name: getattr(m, "noise", None) for name, m in named}


def layers(net):
    """Names of the perturbed layers."""
    return [name for name, noise in families(net).items() if noise is not None]


# ---- which noise -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ({"*": SIGNS}, [SIGNS] * 5),
        ({}, [Dense()] * 5),
        ({"head": SIGNS}, [Dense()] * 4 + [SIGNS]),
        ({"head": None, "*": SIGNS}, [SIGNS] * 4 + [None]),
        ({"*": SIGNS, "head": None}, [SIGNS] * 5),  # the first counts
        ({"*.up": SIGNS, "blocks.1*": Sparse()}, [SIGNS, Dense(), SIGNS, Sparse(), Dense()]),
        ({"blocks.1": SIGNS}, [Dense()] * 2 + [SIGNS] * 2 + [Dense()]),  # all that it contains
        ({Block: SIGNS, nn.Linear: SignFlip()}, [SIGNS] * 4 + [SignFlip()]),
        ({nn.ModuleList: None, nn.Conv2d: SIGNS}, [None] * 4 + [Dense()]),
        ({lambda name, m: name.endswith("down"): SIGNS}, [Dense(), SIGNS, Dense(), SIGNS, Dense()]),
    ],
)  # fmt: skip
def test_noise_by_mapping(noise, expected):
    net = perturbed.convert(Net(), D, noise)
    assert families(net) == dict(zip(LAYERS, expected, strict=True))


def test_a_model_of_several_families_is_its_members():
    net = Net().double()
    perturbed.convert(net, D, {"*.up": LowRank(), "head": SIGNS, "blocks.0.down": None})
    pm = PerturbedModel(net, D, sigma=0.3)
    pm.set_noise()
    x = inputs(4)
    y = pm(x)
    for b in range(len(x)):
        same(y[b], pm.member(b % D, 1 if b < 2 * D else -1)(x[b]))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, LAYERS),
        ("*.up", None, ["blocks.0.up", "blocks.1.up"]),
        ("blocks.0", None, LAYERS[:2]),
        (["blocks.0", "head"], None, [*LAYERS[:2], "head"]),
        (("blocks.0", "head"), "*.down", ["blocks.0.up", "head"]),
        (Block, None, LAYERS[:4]),
        (None, "head", LAYERS[:4]),
        (None, nn.ModuleList, ["head"]),
        (None, ["*.up", lambda name, m: name.endswith("down")], ["head"]),
        (lambda name, m: "head" not in name, None, LAYERS[:4]),
        ("", "blocks", ["head"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is warned of what was asked for
        net = perturbed.convert(Net(), D, include=include, exclude=exclude)
    assert layers(net) == expected


def test_any_name_of_a_shared_module_counts():
    net = Net()
    net.again = net.blocks[1].up
    perturbed.convert(net, D, {"again": SIGNS})
    assert net.again.noise == SIGNS
    perturbed.revert(net)
    perturbed.convert(net, D, exclude="again")
    assert "blocks.1.up" not in layers(net)


# ---- what stays without noise ------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers with and without twins, a parameter of its own, frozen and tied ones."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))
        self.body = nn.Linear(6, 6)
        self.own = OwnForward(6, 6)
        self.pair = nn.Bilinear(6, 6, 2)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.partly = nn.Linear(6, 6)
        self.partly.bias.requires_grad_(False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.own.weight
        self.left = nn.Linear(6, 6)


WHY = {
    "Mixed": ("Mixed", ("shift",), 6, "no perturbed version"),
    "own": ("OwnForward", ("weight", "bias"), 42, "subclass of Linear; see register_twin"),
    "pair": ("Bilinear", ("weight", "bias"), 74, "no perturbed version"),
    "frozen": ("PerturbedLinear", ("weight", "bias"), 42, "frozen (requires_grad=False)"),
    "partly": ("PerturbedLinear", ("bias",), 6, "frozen (requires_grad=False)"),
    # The weight is counted with its first owner.
    "tied": (
        "Linear", ("weight", "bias"), 6, "shares its weight with own (OwnForward), unperturbed",
    ),
    "left": ("Linear", ("weight", "bias"), 42, "left out of the conversion, or joined later"),
}  # fmt: skip


def test_the_report_lists_every_parameter_with_a_reason():
    net = Mixed()
    with pytest.warns(UserWarning, match="convert left") as caught:
        perturbed.convert(net, D, exclude="left")
    assert [str(w.message) for w in caught] == [
        "convert left 128 parameters without noise: Mixed (Mixed), own (OwnForward), pair "
        "(Bilinear), tied (Linear); perturbed.conversion_report(model) says why"
    ]
    assert caught[0].filename == __file__
    report = perturbed.conversion_report(net)
    found = {e.name: (e.type, e.names, e.parameters, e.why) for e in report.unperturbed}
    assert found == WHY
    assert [(e.name, e.names, e.parameters, e.noise) for e in report.converted] == [
        ("body", ("weight", "bias"), 42, Dense()),
        ("partly", ("weight",), 36, Dense()),
    ]
    everything = [*report.converted, *report.unperturbed]
    assert sum(e.parameters for e in everything) == sum(p.numel() for p in net.parameters())
    text = str(report)
    assert all(e.name in text and (e.why or repr(e.noise)) in text for e in everything)
    assert text.endswith("78 parameters have noise, 218 have none")
    pm = PerturbedModel(net, D)
    for name, (_, names, _, why) in WHY.items():
        assert f"{name}: {', '.join(names)}" in pm.summary()
        assert why in pm.summary()


def test_the_report_of_a_model_that_is_not_converted():
    report = perturbed.conversion_report(Net())
    assert report.converted == ()
    assert {e.why for e in report.unperturbed} == {"left out of the conversion, or joined later"}
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        perturbed.conversion_report(3)


def test_a_long_warning_is_cut():
    net = nn.Sequential(nn.Linear(6, 6), *(OwnForward(6, 6) for _ in range(9)))
    words = r"left 378 parameters without noise: 1 \(OwnForward\), .* 4 \(OwnForward\) and 5 more;"
    with pytest.warns(UserWarning, match=words):
        perturbed.convert(net, D)


def test_frozen_layers_without_a_twin_are_no_loss():
    net = nn.Sequential(nn.Linear(6, 6), OwnForward(6, 6).requires_grad_(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perturbed.convert(net, D)
    (entry,) = perturbed.conversion_report(net).unperturbed
    assert entry.why == "frozen (requires_grad=False)"


class TwoUses(nn.Module):
    """A weight of a Linear that a layer without a twin uses as well, through a chain of ties."""

    def __init__(self):
        super().__init__()
        self.own, self.a, self.b, self.c = OwnForward(6, 6), *(nn.Linear(6, 6) for _ in range(3))
        self.a.weight = self.own.weight
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(self.b(self.a(self.own(x))))


@pytest.mark.filterwarnings("ignore:convert left")
def test_no_parameter_is_half_perturbed():
    net = perturbed.convert(TwoUses().double(), D)
    assert layers(net) == ["c"]
    reasons = {e.name: e.why for e in perturbed.conversion_report(net).unperturbed}
    assert reasons["a"] == "shares its weight with own (OwnForward), unperturbed"
    assert reasons["b"] == "shares its bias with a (Linear), unperturbed"
    pm = PerturbedModel(net, D, sigma=0.3)
    pm.set_noise()
    x = inputs()
    same(pm(x)[1], pm.member(1)(x[1]))
    with pytest.raises(ValueError, match=r"b: shares its weight with a \(Linear\), unperturbed"):
        perturbed.convert(Tied(), D, exclude="a")


@pytest.mark.filterwarnings("ignore:convert left")
@pytest.mark.parametrize("how", ["no_twin", "excluded"])
def test_attention_that_stays_keeps_its_output_layer(monkeypatch, how):
    """It reads out_proj.weight: noise in it would be drawn, estimated and never seen."""
    kind = type(nn.MultiheadAttention(6, 2).out_proj)
    monkeypatch.setitem(TWINS, kind, PerturbedLinear)
    if how == "no_twin":
        monkeypatch.delitem(TWINS, nn.MultiheadAttention, raising=False)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "head": nn.Linear(6, 3)})
    exclude = (lambda name, m: name == "attention") if how == "excluded" else None
    perturbed.convert(net, D, exclude=exclude)
    assert layers(net) == ["head"]
    assert type(net["attention"].out_proj) is kind
    reasons = {e.name: e.why for e in perturbed.conversion_report(net).unperturbed}
    if how == "no_twin":
        words = "attention (MultiheadAttention), unperturbed, reads its weight"
        assert reasons["attention.out_proj"] == words


# ---- errors ------------------------------------------------------------------------------------


def quantised():
    """A model with a quantised layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(6, 6), torch.ao.nn.quantized.dynamic.Linear(6, 6))


def packed():
    """A layer with integers for weights, as libraries of quantisation have them."""
    layer = OwnForward(6, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(nn.Linear(6, 6), layer)


def mixed(where, **change):
    """A model with one part elsewhere."""
    net = Net()
    net.get_submodule(where).to(**change)
    return net


BAD = {
    "name": (Net, {"noise": {"haed": SIGNS}}, ValueError, "noise: .* no module named 'haed'"),
    "include": (Net, {"include": "block.*"}, ValueError, "include: .* no module named 'block"),
    "exclude": (Net, {"exclude": ["head", "x"]}, ValueError, "exclude: .* no module named 'x'"),
    "class": (Net, {"exclude": int}, TypeError, "exclude: int is no nn.Module class"),
    "number": (Net, {"include": 3}, TypeError, "include must be name patterns, .* got 3"),
    "module": (Net, {"include": nn.Linear(2, 2)}, TypeError, "include must be name patterns"),
    "key": (Net, {"noise": {3: SIGNS}}, TypeError, "noise must be name patterns, .* got 3"),
    "value": (Net, {"noise": {"*": "dense"}}, TypeError, "must be a noise family .* got 'dense'"),
    "nothing": (Net, {"exclude": "*"}, ValueError, r"can be perturbed: Net \(.*: left out"),
    "size": (Net, {"noise": {"*": LowRank(4)}}, ValueError, r"head: rank must be at most .* = 3"),
    "ties": (
        Tied, {"noise": {"a": SIGNS}}, ValueError,
        r"same for a.weight and b.weight, .* got Dense\('rademacher'\) and Dense\('normal'\)",
    ),
    "quantised": (quantised, {}, ValueError, r"^1 \(Linear\) is quantised"),
    "packed": (packed, {}, ValueError, r"^1 \(OwnForward\) is quantised"),
    "device": (
        lambda: mixed("blocks.1.up", device="meta"), {}, ValueError,
        "one device .* blocks.0.up.weight with cpu and blocks.1.up.weight with meta",
    ),
    "dtype": (
        lambda: mixed("head", dtype=torch.float64), {}, ValueError,
        "blocks.0.up.weight with torch.float32 and head.weight with torch.float64",
    ),
    "complex": (
        lambda: mixed("head", dtype=torch.complex64), {}, ValueError,
        r"head.weight must be float32, .* got torch.complex64",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(("make", "options", "error", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_converted_is_named_and_nothing_changes(make, options, error, words):
    net = make()
    before = [(type(m), sorted(m.__dict__)) for m in net.modules()]
    with pytest.raises(error, match=words):
        perturbed.convert(net, D, **options)
    assert [(type(m), sorted(m.__dict__)) for m in net.modules()] == before


@pytest.mark.parametrize(
    "make",
    [
        quantised,
        packed,
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3)),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.float64)),
    ],
    ids=["quantised", "packed", "lazy", "dtype"],
)
def test_what_is_excluded_is_in_nobodys_way(make):
    net = perturbed.convert(make(), D, exclude="1")
    assert type(net[0]) is PerturbedLinear


def test_a_layer_with_a_forward_of_its_own_is_reported():
    """Hooks of other libraries replace the forward of an instance, which a class swap misses."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].forward = functools.partial(nn.Linear.forward, net[1])
    with pytest.warns(UserWarning, match="left 42 parameters without noise: 1 "):
        perturbed.convert(net, D)
    assert (type(net[0]), type(net[1])) == (PerturbedLinear, nn.Linear)
    assert "its forward was replaced on the instance" in str(perturbed.conversion_report(net))


def test_vectors_may_be_wider_than_matrices():
    """Norms are often kept in float32 in a model of halves."""
    net = nn.Sequential(nn.Linear(6, 6, dtype=torch.bfloat16), nn.LayerNorm(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perturbed.convert(net, D)
    assert type(net[0]) is PerturbedLinear


def test_meta_models_can_be_converted_before_they_have_storage():
    with torch.device("meta"):
        net = Net()
    perturbed.convert(net, D)
    net.to_empty(device="cpu")
    assert layers(net) == LAYERS


# ---- register_twin -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((int, PerturbedLinear), "torch_class must be an nn.Module class or .* got <class 'int"),
        ((3, PerturbedLinear), "torch_class must be .* got 3"),
        ((PerturbedLinear, PerturbedLinear), "must not be perturbed already, got PerturbedLinear"),
        ((nn.Tanh, nn.Linear), "perturbed_class must be a PerturbedLayer class"),
        ((nn.Tanh, None), "perturbed_class must be a PerturbedLayer class, got None"),
    ],
)  # fmt: skip
def test_only_perturbed_classes_can_be_registered(arguments, words):
    before = dict(TWINS)
    with pytest.raises(TypeError, match=words):
        perturbed.register_twin(*arguments)
    assert before == TWINS
