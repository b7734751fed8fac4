"""PerturbedModel with explicit members: set_members, members, and what becomes of them."""

import copy
import pickle

import pytest
import torch
from swarms import check_rows, each_kind, particles, population, randn, swarm
from torch import nn
from zoo import KINDS, D, inputs, same

import perturbed
from perturbed import NES, Dense, Explicit, LowRank, PerturbedLinear, PerturbedModel
from perturbed import nn as pnn
from perturbed.testing import DTYPES, assert_bitwise_equal, assert_close_to_reference, dtype_id

# ---- what is given -----------------------------------------------------------------------------


def test_members_are_held_and_not_copied():
    pm, x = population(flat=True), inputs(3)
    members = pm.members()
    before = pm(x)
    assert pm.members()["0.weight"] is members["0.weight"]
    with torch.no_grad():
        for tensor in members.values():
            tensor[1].zero_()
    after = pm(x).view(3, D, -1)
    assert not after[:, 1].any()
    keep = [0, 2, 3]
    assert_bitwise_equal(after[:, keep], before.view(3, D, -1)[:, keep])


def test_members_may_share_memory_or_be_transposed():
    pm, x = population(), inputs(3)
    members = particles(pm)
    members["0.weight"] = randn(D, 6, 8).mT
    members["2.weight"] = randn(3, 8).expand(D, -1, -1)
    pm.set_members(members)
    check_rows(pm, 3 * D, x)
    same(pm(pm.replicate(x)), pm(pm.replicate(x).full()))


def test_the_order_of_names_is_free_and_the_next_members_replace_the_last():
    pm, x = population(), inputs()
    before, last = pm(x), pm.members()
    pm.set_members(particles(pm))
    assert not torch.allclose(pm(x), before)
    pm.set_members(dict(reversed(last.items())))
    assert_bitwise_equal(pm(x), before)
    assert list(pm.members()) == list(last)


def test_freezing_takes_effect_with_the_next_members():
    pm = population()
    x = inputs()
    members, before = pm.members(), pm(x)
    pm.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got \['0.weight'\] too, which are none of them"):
        pm.set_members(members)
    assert_bitwise_equal(pm(x), before)
    del members["0.weight"]
    pm.set_members(members)
    check_rows(pm, 2 * D, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_dtype(dtype):
    """Errors are those of the plain module in the same dtype."""
    net = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 3)).to(dtype)
    pm = swarm(perturbed.convert(net, 3, Explicit()), 3)
    x = torch.randn(9, 24).to(dtype)
    y, shared = pm(x), pm(pm.replicate(x))
    plain = torch.stack([pm.member(b % 3)(x[b : b + 1])[0] for b in range(9)])
    exact = torch.stack([pm.member(b % 3).double()(x[b].double()) for b in range(9)])
    if dtype == torch.float64:
        same(y, exact)
    else:
        assert_close_to_reference(y, plain, exact)
    same(shared.double(), pm(pm.replicate(x).full()).double(), 0.05)
    pm.set_grad(torch.randn(3).to(dtype))
    assert net[0].weight.grad.dtype == dtype


def test_autocast_multiplies_in_its_dtype():
    net = nn.Sequential(nn.Conv1d(2, 6, 3), nn.Flatten(), nn.Linear(42, 3))
    net[2].weight.requires_grad_(False)
    pm = swarm(perturbed.convert(net, 3, Explicit()), 3)
    x = torch.randn(30, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y, shared = pm(x), pm(pm.replicate(x))
        alone = pm.member(1)(x[1::3])
    assert y.dtype == shared.dtype == alone.dtype == torch.bfloat16
    same(y[1::3].double(), alone.double(), 0.1)
    same(y.double(), pm(x).double(), 0.1)


# ---- members -----------------------------------------------------------------------------------


@each_kind
@pytest.mark.filterwarnings("ignore:convert left")
def test_a_member_has_exactly_the_bits_that_were_given(kind):
    net = perturbed.convert(kind.make().double().eval(), D, Explicit())
    pm = swarm(net, flat=True)
    given = pm.members()
    for d in range(D):
        member = pm.member(d)
        assert not any(isinstance(m, pnn.PerturbedLayer) for m in member.modules())
        for name, parameter in member.named_parameters():
            expected = given[name][d] if name in given else net.get_parameter(name)
            assert_bitwise_equal(parameter, expected)
            assert parameter.data_ptr() != expected.data_ptr()


def test_members_have_no_other_sign():
    pm = population()
    with pytest.raises(ValueError, match=r"sign must be 1: .* got -1"):
        pm.member(0, -1)
    assert pm.state.antithetic is False
    assert pm.signs == 1
    assert pm.member_mean(randn(4 * D)).shape == (1, D)


# ---- the life of a population ------------------------------------------------------------------


def test_nothing_runs_before_members_are_given():
    net = perturbed.convert(KINDS["mlp"].make().double(), D, Explicit())
    pm = PerturbedModel(net, D)
    for use in (
        lambda: pm(inputs()),
        lambda: pm.set_grad(randn(D)),
        lambda: pm.member(0),
        pm.members,
        pm.allocate_memory,
    ):
        with pytest.raises(RuntimeError, match=r"no members have been given yet.* set_members\(\)"):
            use()
    net(inputs())  # unperturbed, as ever


@pytest.mark.parametrize(
    "let_go",
    [
        lambda pm: pm.free_memory(),
        lambda pm: pm.float().double(),
        lambda pm: copy.deepcopy(pm),
        lambda pm: pickle.loads(pickle.dumps(pm)),
    ],
    ids=["free_memory", "move", "deepcopy", "pickle"],
)
def test_members_are_let_go_and_can_be_given_again(let_go):
    pm, x = population(flat=True), inputs()
    members, before = pm.members(), pm(x)
    other = let_go(pm) or pm
    assert not other.state.explicit
    assert not other.state.members
    with pytest.raises(RuntimeError, match="set_members"):
        other(x)
    other.set_members(members)
    assert_bitwise_equal(other(x), before)
    if other is not pm:
        assert_bitwise_equal(pm(x), before)


def test_a_pickle_does_not_hold_the_members():
    net = perturbed.convert(nn.Linear(50, 50), 200, Explicit())
    pm = swarm(net, 200)
    assert len(pickle.dumps(pm)) < 2 * net.weight.nbytes


def test_state_dicts_know_nothing_of_members():
    pm, x = population(), inputs()
    noisy = perturbed.convert(KINDS["mlp"].make().double(), D)
    other = PerturbedModel(noisy, D, seed=3)
    other.set_noise()
    assert list(pm.state_dict()) == list(other.state_dict())
    before = pm(x)
    pm.load_state_dict(other.state_dict())  # which has a draw
    assert_bitwise_equal(pm(x), before)
    pm.free_memory()
    pm.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="set_members"):
        pm(x)


def test_the_summary_counts_the_bytes_of_members():
    pm = population("tied")
    given = sum(tensor.nbytes for tensor in pm.members().values())
    total = pm.summary().splitlines()[-1]
    assert f"{given:,}" in total
    assert "Explicit()" in pm.summary()


def test_compiled_forwards_see_the_next_members():
    torch._dynamo.reset()
    pm, x = population(), inputs(3)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    fast = torch.compile(pm, backend=backend, fullgraph=True)
    for step in range(4):
        if step < 3:
            pm.set_members(particles(pm))
        else:
            with torch.no_grad():
                pm.members()["0.weight"].mul_(2)
        for rows in (x, pm.replicate(x)):
            same(fast(rows), pm(rows))
        if step == 0:
            first = len(graphs)
    assert len(graphs) == first > 0


# ---- errors ------------------------------------------------------------------------------------


def without(name):
    return lambda given: {key: tensor for key, tensor in given.items() if key != name}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g: list(g.values()), TypeError, "tensors must map names .* got list"),
        (lambda g: {**g, "0.bias": 0.0}, TypeError, r"\['0.bias'\] must be a tensor, got float"),
        (without("0.bias"), ValueError, r"got none for \['0.bias'\]"),
        (lambda g: {**g, "1.bias": g["0.bias"]}, ValueError, r"got \['1.bias'\] too"),
        (
            lambda g: {**without("0.bias")(g), 3: g["0.bias"]},
            ValueError,
            r"got none for \['0.bias'\] and \[3\] too",
        ),
        (
            lambda g: {**g, "0.bias": g["0.bias"][:3]},
            ValueError,
            r"\(D, \*parameter.shape\) = \(4, 8\), got \(3, 8\)",
        ),
        (
            lambda g: {**g, "0.bias": g["0.bias"].float()},
            ValueError,
            "dtype and device, torch.float64 on cpu, got torch.float32 on cpu",
        ),
        (
            lambda g: {**g, "0.bias": g["0.bias"].to("meta")},
            ValueError,
            "got torch.float64 on meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, error, words):
    pm, x = population(), inputs()
    members, before = pm.members(), pm(x)
    with pytest.raises(error, match=words):
        pm.set_members(change(dict(members)))
    assert_bitwise_equal(pm(x), before)
    assert pm.members() == members or all(pm.members()[k] is t for k, t in members.items())


def test_kernels_must_be_contiguous_in_a_member():
    net = perturbed.convert(nn.Conv2d(2, 3, 3).double(), D, Explicit())
    pm = PerturbedModel(net, D)
    members = particles(pm)
    members["weight"] = randn(D, 3, 3, 3, 2).permute(0, 1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"\['weight'\] must be contiguous in every member"):
        pm.set_members(members)
    assert not pm.state.drawn


def test_sampling_is_not_antithetic():
    net = perturbed.convert(KINDS["mlp"].make(), D, Explicit())
    with pytest.raises(ValueError, match="antithetic must be False or None, got True"):
        PerturbedModel(net, D, antithetic=True)
    for antithetic in (None, False):
        assert PerturbedModel(net, D, antithetic=antithetic).state.antithetic is False


def test_explicit_members_and_noise_do_not_mix():
    noise = {"0": Explicit(), "*": Dense()}
    net = perturbed.convert(KINDS["mlp"].make(), D, noise)
    with pytest.raises(ValueError, match=r"all have Explicit\(\), .* got Dense\('normal'\) too"):
        PerturbedModel(net, D)
    net[2].requires_grad_(False)  # what has no noise does not count
    assert list(swarm(net).members()) == ["0.weight", "0.bias"]


def test_noise_is_not_drawn_for_explicit_members():
    pm, x = population(), inputs()
    before = pm(x)
    with pytest.raises(RuntimeError, match=r"not drawn; give them to set_members\(\)"):
        pm.set_noise()
    assert_bitwise_equal(pm(x), before)
    with pytest.raises(ValueError, match="pm must have layers with noise"):
        NES(pm, torch.optim.SGD(pm.model.parameters(), 0.1))


def test_members_are_not_given_to_models_with_noise():
    net = perturbed.convert(KINDS["mlp"].make(), D, LowRank(1))
    pm = PerturbedModel(net, D)
    pm.set_noise()
    with pytest.raises(RuntimeError, match=r"needs layers with noise=Explicit\(\)"):
        pm.set_members({})
    with pytest.raises(RuntimeError, match="members: those of this model are drawn"):
        pm.members()


def test_a_population_whose_layers_were_taken_refuses_members():
    pm = population()
    members = pm.members()
    PerturbedModel(pm.model, D)
    with pytest.raises(RuntimeError, match="serve a newer PerturbedModel"):
        pm.set_members(members)


def test_the_family_is_a_value():
    assert Explicit() == Explicit() != Dense()
    assert hash(Explicit()) == hash(Explicit())
    assert repr(PerturbedLinear(3, 2, 4, noise=Explicit())).endswith("noise=Explicit())")
    with pytest.raises(TypeError, match="no noise to be added"):
        Explicit().add_linear(randn(1, 1, 1), randn(1, 1, 1), None, False)
