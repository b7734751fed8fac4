"""PerturbedModel: copies, files, state_dict, and the noise that it holds."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import KINDS, D, Tied, inputs, mlp, population, same

import perturbed
from perturbed import Dense, PerturbedModel
from perturbed.testing import assert_bitwise_equal

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_noise = pytest.mark.parametrize(
    "noise", [Dense(), Dense("rademacher"), Dense(storage="stored")], ids=str
)


def through_file(value, weights_only):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pm: pickle.loads(pickle.dumps(pm)),
    "torch.save": lambda pm: through_file(pm, weights_only=False),
}


# ---- copies and files --------------------------------------------------------------------------


@each_noise
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_continues_with_the_same_noise(how, noise):
    _, pm = population(noise=noise)
    x = inputs()
    y = pm(x)
    other = COPIES[how](pm)
    assert_bitwise_equal(other(x), y)
    assert (other.sigma, other.seed, other.directions) == (pm.sigma, pm.seed, pm.directions)
    pm.set_noise()
    other.set_noise()
    assert_bitwise_equal(other(x), pm(x))
    pm.set_grad(torch.ones(D))
    assert other.model[0].weight.grad is None
    with torch.no_grad():
        pm.model[0].weight.zero_()
    assert other.model[0].weight.any()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_within_the_block_is_switched_off(how):
    net, pm = population()
    with pm.perturbed():
        other = COPIES[how](pm)
    assert not other.state.active
    x = inputs()
    assert_bitwise_equal(other.model(x), net(x))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_ties(how):
    pm = PerturbedModel(perturbed.convert(Tied(), D), D)
    pm.set_noise()
    other = COPIES[how](pm)
    assert other.model.a.weight is other.model.b.weight
    assert other.model.a.site.weight == other.model.b.site.weight
    assert other.model.a.site.state is other.state


def test_a_copy_of_the_base_model_can_join_a_model_of_its_own():
    net, pm = population()
    twin = copy.deepcopy(net)
    x = inputs()
    plain = net(x)
    with pm.perturbed():
        assert_bitwise_equal(twin(x), plain)
    y = pm(x)
    other = PerturbedModel(twin, D, sigma=0.1, seed=9)
    other.set_noise()
    assert not torch.allclose(other(x), y)
    assert_bitwise_equal(pm(x), y)


def test_saving_drops_what_is_held():
    _, pm = population(noise=Dense(storage="stored"))
    pm.allocate_memory()
    assert pm.state.held
    other = COPIES["torch.save"](pm)
    assert not other.state.held
    file = io.BytesIO()
    torch.save(pm, file)
    pm.free_memory()
    empty = io.BytesIO()
    torch.save(pm, empty)
    assert len(file.getvalue()) == len(empty.getvalue())


# ---- state_dict --------------------------------------------------------------------------------


@each_kind
def test_state_dict_round_trip(kind):
    net, pm = kind.convert()
    pm.set_noise(0.2)
    state = through_file(pm.state_dict(), weights_only=True)
    fresh_net, fresh = kind.convert(seed=1)
    fresh.load_state_dict(state, strict=True)
    arguments = kind.arguments(2 * D)
    expected = torch.utils._pytree.tree_leaves(kind.call(pm, *arguments))
    for got, want in zip(
        torch.utils._pytree.tree_leaves(kind.call(fresh, *arguments)), expected, strict=True
    ):
        assert_bitwise_equal(got, want)
    assert (fresh.sigma, fresh.seed, fresh.state.generation) == (0.2, 7, 1)
    plain = kind.make().double()
    plain.load_state_dict(net.state_dict(), strict=True)
    perturbed.convert(plain, D).load_state_dict(fresh_net.state_dict(), strict=True)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_moves_the_draw_of_a_model_in_use(assign):
    _, source = population(seed=3, noise=Dense(storage="stored"))
    net, pm = population(seed=4, noise=Dense(storage="stored"))
    x = inputs()
    pm(x)  # holds the noise of its own draw
    pm.load_state_dict(source.state_dict(), assign=assign)
    assert_bitwise_equal(pm(x), source(x))
    pm.set_grad(torch.ones(D))
    source.set_grad(torch.ones(D))
    assert_bitwise_equal(net[0].weight.grad, source.model[0].weight.grad)


def test_a_state_before_the_first_draw_loads():
    _, source = population()
    source.set_seed(3)
    _, pm = population()
    pm.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match=r"set_noise\(\)"):
        pm(inputs())
    pm.set_noise()
    source.set_noise()
    x = inputs()
    assert_bitwise_equal(pm(x), source(x))


def test_bad_states_are_refused_and_change_nothing():
    _, pm = population()
    x = inputs()
    y = pm(x)
    state = pm.state_dict()
    for key, value, error in (("sigma", -1.0, ValueError), ("seed", "a", TypeError)):
        bad = {**state, "_extra_state": {**state["_extra_state"], key: value}}
        with pytest.raises(error, match=key):
            pm.load_state_dict(bad)
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        pm.load_state_dict({k: v for k, v in state.items() if k != "_extra_state"})
    assert_bitwise_equal(pm(x), y)


# ---- noise that is held ------------------------------------------------------------------------

BYTES = 8 * D * (8 * 6 + 3 * 8)  # float64, the two weights of the MLP


def held(pm):
    assert sum(n.nbytes for n in pm.state.held.values()) == sum(
        layer.held_bytes() for layer in pm.layers()
    )
    return sum(layer.held_bytes() for layer in pm.layers())


@pytest.mark.parametrize("noise", [Dense(), Dense("rademacher")], ids=str)
def test_regenerated_noise_holds_nothing(noise):
    _, pm = population(noise=noise)
    pm.allocate_memory()
    pm(inputs())
    pm(inputs(26))
    pm.set_grad(torch.ones(D))
    assert held(pm) == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_stored_noise_is_held_from_its_first_use_to_the_next_draw(dtype):
    _, pm = population(noise=Dense(storage="stored", dtype=dtype))
    expected = BYTES // 4 if dtype == torch.bfloat16 else BYTES
    assert held(pm) == 0
    pm(inputs())
    assert held(pm) == expected
    first = weakref.ref(next(iter(pm.state.held.values())))
    pm(inputs())
    pm.allocate_memory()
    pm.set_noise_scale(0.1)
    assert first() is next(iter(pm.state.held.values()))  # one draw, one materialisation
    pm.set_noise()
    gc.collect()
    assert first() is None  # gone before the next is made
    assert held(pm) == 0
    pm.allocate_memory()
    assert held(pm) == expected
    pm.free_memory()
    assert held(pm) == 0


def test_stored_noise_follows_a_move():
    """It has the parameter's dtype, and its device."""
    _, pm = population(noise=Dense(storage="stored"))
    pm(inputs())
    pm.bfloat16()
    assert held(pm) == 0
    pm(inputs().bfloat16())
    assert {noise.dtype for noise in pm.state.held.values()} == {torch.bfloat16}


def test_tied_weights_are_held_once():
    net = perturbed.convert(Tied(), D, Dense(storage="stored"))
    pm = PerturbedModel(net, D)
    pm.set_noise()
    pm.allocate_memory()
    assert sum(n.nbytes for n in pm.state.held.values()) == 4 * D * 36


CHANGES = {
    "set_noise": lambda pm: pm.set_noise(),
    "set_seed": lambda pm: (pm.set_seed(5), pm.set_noise()),
    "load_state_dict": lambda pm: pm.load_state_dict(population(seed=5)[1].state_dict()),
    "back_and_forth": lambda pm: (pm.set_noise(), pm.set_seed(7), pm.set_noise()),
    "set_noise_scale": lambda pm: pm.set_noise_scale(0.6),
    "free_memory": lambda pm: pm.free_memory(),
    "move": lambda pm: pm.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_stored_noise_is_never_stale(change):
    """After any change a stored model does what a regenerating one does."""
    results = []
    for storage in ("stored", "regenerate"):
        torch.manual_seed(0)
        net, pm = population(noise=Dense(storage=storage))
        x = inputs()
        pm(x)
        CHANGES[change](pm)
        pm.set_grad(torch.arange(4.0))
        results.append((pm(x), net[0].weight.grad, pm.member(2, -1)[2].weight))
    for stored, regenerated in zip(*results, strict=True):
        same(stored, regenerated)


def test_free_memory_is_not_the_end():
    _, pm = population(noise=Dense(storage="stored"))
    x = inputs()
    y = pm(x)
    pm.free_memory()
    pm.free_memory()
    assert_bitwise_equal(pm(x), y)
    pm.free_memory()
    pm.set_grad(torch.ones(D))
    assert pm.model[0].weight.grad.any()
    fresh = PerturbedModel(perturbed.convert(mlp(), D), D)
    fresh.free_memory()  # before the first draw, too
    fresh.set_noise()
    fresh(torch.ones(D, 6))


def test_fake_tensors_are_not_kept():
    """A memory estimate, for one, runs the model without data."""
    _, pm = population()
    x = inputs()
    y = pm(x)
    pm.free_memory()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert pm(torch.empty(2 * D, 6, dtype=torch.float64)).shape == y.shape
    assert_bitwise_equal(pm(x), y)


def test_a_model_in_the_meta_device_is_only_a_shape():
    """As FSDP or accelerate make large models: no noise is drawn until parameters are real."""
    with torch.device("meta"):
        net = perturbed.convert(nn.Linear(6, 3), D)
    pm = PerturbedModel(net, D)
    pm.to_empty(device="cpu")
    with torch.no_grad():
        net.weight.fill_(1)
        net.bias.fill_(0)
    pm.set_noise()
    x = torch.randn(2 * D, 6)
    torch.testing.assert_close(pm(x)[0], pm.member(0)(x[0]))
