"""swarm_move_ and uniforms: wrong arguments, empty problems, gradients and compilation."""

import math

import pytest
import torch
from ops import check_error, make_key, stream
from ops_errors import KEY_ERRORS, word_errors
from test_ops_swarm import move, swarm

from perturbed import _ops
from perturbed.testing import assert_bitwise_equal


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("position", zeros(24), "position must have 2 dimensions, got shape (24)"),
        ("position", zeros(6, 4).mT, "position must be contiguous"),
        ("velocity", zeros(4, 5), "velocity must have position's shape (4, 6), got (4, 5)"),
        ("velocity", zeros(6, 4).mT, "velocity must be contiguous"),
        ("best", zeros(3, 6), "best must have position's shape (4, 6), got (3, 6)"),
        ("best", zeros(4, 6, dtype=torch.float64), "best must have dtype Float, got Double"),
        ("improved", zeros(4), "improved must have dtype Bool, got Float"),
        ("improved", zeros(3, dtype=torch.bool), "improved must have shape (4,), got (3)"),
        ("guide", zeros(4, dtype=torch.int32), "guide must have dtype Long, got Int"),
        ("guide", zeros(4, 1, dtype=torch.int64), "guide must have shape (4,), got (4, 1)"),
        ("guide", torch.tensor([0, 1, 4, 2]), "guide must be between 0 and 3, got 4"),
        ("guide", torch.tensor([0, 1, -1, 2]), "guide must be between 0 and 3, got -1"),
        ("coefficients", zeros(3), "coefficients must have dtype Double, got Float"),
        ("coefficients", zeros(2, dtype=torch.float64), "coefficients must have shape (3,)"),
        ("limit", zeros(4), "limit must have shape (1,) or (6,), got (4)"),
        ("limit", torch.tensor(1.0), "limit must have shape (1,) or (6,), got ()"),
        ("limit", zeros(1, dtype=torch.float64), "limit must have dtype Float, got Double"),
        ("lower", zeros(2), "lower must have shape (1,) or (6,), got (2)"),
        ("upper", zeros(12)[::2], "upper must be contiguous"),
        ("bounds", 3, "bounds must be 0 (none), 1 (clip) or 2 (reflect), got 3"),
        ("bounds", -1, "bounds must be 0 (none), 1 (clip) or 2 (reflect), got -1"),
        ("bounds", 0, "lower and upper must both be None with bounds = 0"),
        *KEY_ERRORS,
        *word_errors("stream"),
    ],
)
def test_errors_name_the_argument(argument, value, message):
    arguments = swarm(4, 6, walls="clip") | {argument: value}
    before = {n: arguments[n].clone() for n in ("position", "velocity", "best")}
    check_error("swarm_move_", arguments, message)
    for name, value in before.items():
        assert_bitwise_equal(arguments[name], value)


def test_walls_need_a_mode_and_a_mode_needs_walls():
    message = "lower and upper must not both be None with bounds = 2"
    check_error("swarm_move_", swarm(4, 6, bounds=2), message)


def test_pairs_need_an_even_number():
    message = "antithetic needs an even number of particles, got 5"
    check_error("swarm_move_", swarm(5, 6, antithetic=True), message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
def test_dtypes(dtype):
    arguments = swarm(2, 6)
    for name in ("position", "velocity", "best", "limit"):
        arguments[name] = arguments[name].to(dtype)
    check_error("swarm_move_", arguments, "position must be float32 or float64, got")
    key = make_key()
    with pytest.raises(RuntimeError, match="dtype must be float32 or float64, got"):
        _ops.uniforms(key, 0, 0, 2, 3, dtype)


def test_memory_in_common():
    """A best that is the live particle would move with it."""
    arguments = swarm(4, 6)
    shared = arguments | {"best": arguments["position"]}
    check_error("swarm_move_", shared, "position and best must not share memory")
    memory = torch.zeros(6, 6)
    overlapping = arguments | {"position": memory[:4], "velocity": memory[2:]}
    check_error("swarm_move_", overlapping, "position and velocity must not share memory")
    move(arguments | {"velocity": torch.zeros(8, 6)[4:]})  # neighbours in one storage are fine


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("first", -1, "first must not be negative, got -1"),
        ("count", -2, "count must not be negative, got -2"),
        ("cols", -1, "cols must not be negative, got -1"),
        ("cols", 2**34, "17179869184 columns have more than 2^32 noise blocks"),
        *KEY_ERRORS,
        *word_errors("stream"),
    ],
)
def test_errors_of_uniforms(argument, value, message):
    arguments = {"key": make_key(), "stream": stream(12), "first": 0, "count": 2, "cols": 3}
    arguments["dtype"] = torch.float32
    check_error("uniforms", arguments | {argument: value}, message)


@pytest.mark.parametrize("size", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_empty_problems(size):
    for got in move(swarm(*size)) if size[0] else move(swarm(2, 0)):
        assert got.numel() == 0
    assert _ops.uniforms(make_key(), stream(12), 0, *size, torch.float32).shape == size


def test_no_gradient():
    arguments = swarm(2, 6)
    arguments["position"] = arguments["position"].requires_grad_() * 1.0
    with pytest.raises(RuntimeError, match=r"swarm_move_ is not differentiable; call it under"):
        _ops.swarm_move_(**arguments)
    with torch.no_grad():
        _ops.swarm_move_(**arguments)


def test_a_new_generation_draws_anew_and_no_global_state_is_touched():
    before = torch.get_rng_state()
    arguments = swarm(4, 50)
    first = move(arguments)[0]
    assert_bitwise_equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_bitwise_equal(move(arguments)[0], first)
    for word in range(3):
        key = arguments["key"].clone()
        key[word] += 1
        assert not torch.equal(move(arguments | {"key": key})[0], first)
    other = arguments | {"stream": stream(13)}
    assert not torch.equal(move(other)[0], first)


def test_a_converging_swarm():
    """Constricted (Clerc and Kennedy 2002), on the sphere in 20 dimensions."""
    particles, cols = 40, 20
    chi = 0.7298
    key = make_key()
    position = 10 * _ops.uniforms(key, stream(12), 0, particles, cols, torch.float64) - 5
    state = {"position": position, "velocity": torch.zeros_like(position)}
    state["best"] = position.clone()
    value = torch.full((particles,), math.inf, dtype=torch.float64)
    for step in range(400):
        loss = state["position"].square().sum(1)
        improved = loss < value
        value = torch.where(improved, loss, value)
        key[1] = step
        _ops.swarm_move_(
            **swarm(particles, cols, torch.float64)
            | state
            | {"improved": improved, "guide": value.argmin().repeat(particles), "key": key}
            | {"coefficients": torch.tensor([chi, 2.05 * chi, 2.05 * chi], dtype=torch.float64)}
            | {"limit": torch.tensor([math.inf], dtype=torch.float64)}
        )
    assert value.min() < 1e-10
    # The stored best evaluates to exactly the recorded value.
    assert_bitwise_equal(state["best"].square().sum(1), value)
