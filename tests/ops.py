"""What the tests of the operators share: arguments, and one check for every rule they keep.

A check takes the operator's name and its arguments by name, in the order of the schema, so that a
test can change one of them. `run` makes in-place operators functions, which lets one check serve
both forms.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from perturbed import _C, _ops, reference
from perturbed.testing import (
    DTYPES,
    assert_bitwise_equal,
    assert_close_to_reference,
    devices,
    dtype_id,
)

SIGMA = 0.3

each_distribution = pytest.mark.parametrize("rademacher", [False, True], ids=["normal", "signs"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_accumulator = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
each_device = pytest.mark.parametrize("device", devices())


def stream(number, layer=2):
    return layer << 8 | number


def make_key(device="cpu", first=0, generation=3):
    return torch.tensor([_C.splitmix64(99), generation, first], device=device)


def make_sigma(device="cpu"):
    return torch.tensor(SIGMA, dtype=torch.float64, device=device)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def documented_program():
    """The functions of the program in docs/conventions.md, which says all of the noise contract."""
    page = Path(__file__).parent.parent / "docs" / "conventions.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {}
    exec(program, namespace)
    return namespace


def twin(name):
    return getattr(reference, name.removesuffix("_"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call on rows. `shared`: N rows of x that every member sees; 0: x is [B, T, n]."""

    repeats: int
    directions: int
    tokens: int
    out: int
    inputs: int
    antithetic: bool = False
    shared: int = 0
    strided: bool = False
    bias: bool = True

    def __str__(self):
        sizes = f"R{self.repeats}-D{self.directions}-T{self.tokens}-{self.out}x{self.inputs}"
        changed = [
            f.name if value is True else f"{f.name}{int(value)}"
            for f in dataclasses.fields(self)[5:]
            if (value := getattr(self, f.name)) != f.default
        ]
        return "-".join([sizes, *changed])

    @property
    def rows(self):
        return self.repeats * self.directions

    def activations(self, rows, columns, dtype, device):
        """Random rows of x; `strided`: every other token and some columns of a larger tensor."""
        if not self.strided:
            return torch.randn(rows, self.tokens, columns).to(device, dtype)
        x = torch.randn(rows, 2 * self.tokens, columns + 5).to(device, dtype)
        return x[:, ::2, 3 : 3 + columns]

    def outputs(self, dtype, device):
        return torch.randn(self.rows, self.tokens, self.out).to(device, dtype)


def run(name, arguments):
    """Result of an operator, or what one that works in place makes of its first argument."""
    function = getattr(_ops, name)
    if not name.endswith("_"):
        return function(**arguments)
    first = next(iter(arguments))
    changed = arguments[first].clone()
    assert function(**arguments | {first: changed}) is None
    return changed


# ---- against the reference -----------------------------------------------------------------------


def assert_close(actual, plain, expected, factor):
    """`plain`: what plain torch makes in the same dtype; `expected`: in float64."""
    if actual.dtype == torch.float64:
        # Nothing wider to compare with; sums of these tests have at most some 1000 terms.
        eps = torch.finfo(torch.float64).eps
        limit = 64 * eps * float(expected.abs().max()) if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=limit)
    else:
        assert_close_to_reference(actual, plain, expected, factor=factor)


def in_double(arguments):
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def check_reference(name, arguments, factor=2.0):
    """The operator errs at most `factor` times as much as its twin in the same dtype."""
    check_functional(name, arguments)
    plain = twin(name)(**arguments)
    expected = twin(name)(**in_double(arguments))
    assert_close(run(name, arguments), plain, expected, factor)


def check_bits(name, arguments):
    """The operator gives the bits of its twin: it moves numbers, or adds in a fixed order."""
    check_functional(name, arguments)
    assert_bitwise_equal(run(name, arguments), twin(name)(**arguments))


def check_functional(name, arguments):
    """Inputs are left alone, a second call gives the same bits, and so does the in-place form."""
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    result = run(name, arguments)
    for argument, value in before.items():
        assert_bitwise_equal(arguments[argument], value)
    assert_bitwise_equal(run(name, arguments), result)
    if hasattr(_ops, name + "_"):
        assert_bitwise_equal(run(name + "_", arguments), result)


def check_overwrites(name, arguments):
    """Without `accumulate` an estimate is that added to zeros, whatever it finds, NaN included."""
    first = next(iter(arguments))
    added = run(name, arguments | {first: torch.zeros_like(arguments[first]), "accumulate": True})
    nans = torch.full_like(added, float("nan"))
    written = run(name, arguments | {first: nans, "accumulate": False})
    torch.testing.assert_close(written, added, rtol=0, atol=0)  # but for the sign of zeros


# ---- bitwise -------------------------------------------------------------------------------------


def check_threads(name, arguments):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(run(name, arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


def rows_of_shard(tensor, directions, begin, end):
    return tensor.unflatten(0, (-1, directions))[:, begin:end].flatten(0, 1).contiguous()


def check_shards(name, arguments, split):
    """Any range of directions gives the rows that the whole gives; `split` names rows to divide."""
    directions = arguments["directions"]
    whole = run(name, arguments)
    for begin, end in ((0, 1), (1, directions - 2), (directions - 2, directions)):
        part = {n: rows_of_shard(arguments[n], directions, begin, end) for n in split}
        key = arguments["key"] + torch.tensor([0, 0, begin], device=whole.device)
        shard = arguments | part | {"key": key, "directions": end - begin}
        assert_bitwise_equal(run(name, shard), rows_of_shard(whole, directions, begin, end))


def check_weights_of_shards(name, arguments):
    """A sum in the order of d over some directions is the whole with the other weights zero."""
    weights = arguments["weights"]
    count = weights.shape[0]
    for begin, end in ((0, count // 3), (count // 3, count - 2), (count - 1, count)):
        masked = torch.zeros_like(weights)
        masked[begin:end] = weights[begin:end]
        key = arguments["key"] + torch.tensor([0, 0, begin], device=weights.device)
        shard = arguments | {"weights": weights[begin:end].contiguous(), "key": key}
        assert_bitwise_equal(run(name, shard), run(name, arguments | {"weights": masked}))


# ---- registration, derivatives, errors -----------------------------------------------------------


def check_registration(name, arguments, differentiable=()):
    """opcheck: schema, fake kernel, autograd registration, and compilation with gradients."""
    arguments = arguments | {n: arguments[n].detach().requires_grad_() for n in differentiable}
    operator = getattr(torch.ops.perturbed, name).default
    torch.library.opcheck(operator, tuple(arguments.values()))


def check_gradients(name, arguments, inputs):
    """Derivatives against finite differences, and against those of the twin."""
    point = tuple(arguments[n].double().requires_grad_() for n in inputs)

    def function(of):
        return lambda *values: of(**arguments | dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(function(getattr(_ops, name)), point)
    got, expected = (
        torch.autograd.grad(
            (result * torch.linspace(-1, 2, result.numel()).view_as(result)).sum(), point
        )
        for result in (function(getattr(_ops, name))(*point), function(twin(name))(*point))
    )
    torch.testing.assert_close(got, expected)


def check_empty(name, arguments, inputs):
    """An operator that has nothing to do gives what its twin gives, and so does its derivative."""
    check_bits(name, arguments)
    arguments = arguments | {n: arguments[n].clone().requires_grad_() for n in inputs}
    values = [arguments[n] for n in inputs]
    got, expected = (
        torch.autograd.grad(function(**arguments).sum(), values, materialize_grads=True)
        for function in (getattr(_ops, name), twin(name))
    )
    for gradient, other in zip(got, expected, strict=True):
        assert_bitwise_equal(gradient, other)


def check_refuses_gradients(name, arguments, argument):
    arguments = arguments | {argument: arguments[argument].clone().requires_grad_() * 1.0}
    with pytest.raises(RuntimeError, match=rf"perturbed::{name} is not differentiable"):
        getattr(_ops, name)(**arguments)
    with torch.no_grad():
        getattr(_ops, name)(**arguments)


def check_error(name, arguments, message):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as failure:
        getattr(_ops, name)(**arguments)
    text = str(failure.value)
    assert f"perturbed::{name.removesuffix('_')}" in text
    assert message in text
