"""conv_members_: convolutions with kernels of every direction's own."""

import dataclasses

import pytest
import torch
from ops import (
    check_error,
    check_reference,
    check_refuses_gradients,
    check_registration,
    check_threads,
    run,
)

from perturbed import reference
from perturbed.testing import assert_bitwise_equal, cpu_capability


@dataclasses.dataclass(frozen=True)
class Conv:
    """R repeats of D directions, channels, kernel and size of x."""

    repeats: int
    directions: int
    channels: tuple[int, int]
    kernel: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True

    def __str__(self):
        return "-".join(
            "x".join(map(str, v)) if isinstance(v, tuple) else str(int(v))
            for v in dataclasses.astuple(self)
        )

    def arguments(self):
        inputs, outputs = self.channels
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(self.size, self.kernel, self.stride, self.dilation, strict=True)
        ]
        rows = self.repeats, self.directions
        return {
            "y": torch.full((*rows, outputs, *size), float("nan")),
            "x": torch.randn(*rows, inputs, *self.size),
            "kernels": torch.randn(self.directions, outputs, inputs, *self.kernel),
            "bias": torch.randn(self.directions, outputs) if self.bias else None,
            "stride_height": self.stride[0],
            "stride_width": self.stride[1],
            "dilation_height": self.dilation[0],
            "dilation_width": self.dilation[1],
        }


# Panels are of 12 pixels, of all repeats, and 64 channels, in steps of 16.
CASES = [
    Conv(1, 1, (1, 1), (1, 1), (1, 1)),
    Conv(2, 3, (2, 5), (3, 2), (7, 6)),
    Conv(1, 2, (3, 16), (2, 2), (4, 5), bias=False),
    Conv(3, 2, (1, 17), (4, 4), (9, 11)),
    Conv(2, 2, (5, 48), (1, 3), (3, 6)),
    Conv(5, 2, (4, 64), (2, 2), (3, 3)),
    Conv(2, 1, (7, 65), (3, 3), (6, 9), (2, 3)),
    Conv(1, 3, (3, 130), (2, 3), (9, 8), (1, 2), (3, 2)),
    Conv(2, 2, (40, 33), (3, 3), (5, 5)),  # taps beyond a cache line
    Conv(3, 5, (2, 8), (3, 3), (40, 37)),  # several tasks for each direction
]
ONE = CASES[3]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def channels_last(rows):
    return rows.movedim(2, 4).contiguous().movedim(4, 2)


@each_case
def test_against_the_reference(case):
    check_reference("conv_members_", case.arguments())


@each_case
def test_bits_on_every_instruction_set(case, capability):
    arguments = case.arguments()
    got = run("conv_members_", arguments)
    with cpu_capability("portable"):
        assert_bitwise_equal(run("conv_members_", arguments), got)


@each_case
def test_bits_in_every_layout(case):
    arguments = case.arguments()
    expected = run("conv_members_", arguments)
    x = arguments["x"]
    wide = torch.randn(*x.shape[:4], 2 * x.shape[4])
    wide[..., ::2] = x
    for layout in (channels_last(x), wide[..., ::2], x.flip(0).contiguous().flip(0)):
        assert_bitwise_equal(run("conv_members_", arguments | {"x": layout}), expected)
    last = channels_last(arguments["y"])
    got = run("conv_members_", arguments | {"y": last})
    assert got.stride() == last.stride()
    assert_bitwise_equal(got, expected)


def test_bits_of_shared_rows():
    arguments = ONE.arguments()
    shared = arguments["x"][:, :1].expand_as(arguments["x"])
    got = run("conv_members_", arguments | {"x": shared})
    assert_bitwise_equal(got, run("conv_members_", arguments | {"x": shared.contiguous()}))


@each_case
def test_bits_of_any_split_of_the_batch(case):
    """Rows and directions may be computed apart, and into parts of a larger tensor."""
    arguments = case.arguments()
    whole = run("conv_members_", arguments)
    for d in range(case.directions):
        for r in range(case.repeats):
            part = arguments | {name: arguments[name][r : r + 1, d : d + 1] for name in "xy"}
            part |= {
                n: arguments[n][d : d + 1] for n in ("kernels", "bias") if arguments[n] is not None
            }
            got = torch.full_like(arguments["y"], float("nan"))
            inside = got[r : r + 1, d : d + 1]
            torch.ops.perturbed.conv_members_(*(part | {"y": inside}).values())
            assert_bitwise_equal(inside, whole[r : r + 1, d : d + 1])
            assert got.isnan().sum() == got.numel() - inside.numel()


@pytest.mark.parametrize("case", [CASES[3], CASES[-1]], ids=str)
def test_bits_on_any_number_of_threads(case):
    check_threads("conv_members_", case.arguments())


def test_kernels_that_do_not_follow_each_other():
    """As columns of a matrix of flat parameter vectors are."""
    arguments = ONE.arguments()
    kernels, bias = arguments["kernels"], arguments["bias"]
    flat = torch.cat([torch.randn(2, 7), bias, kernels.flatten(1), torch.randn(2, 3)], 1)
    apart = flat[:, 7 + bias.shape[1] : -3].view(kernels.shape)
    assert not apart.is_contiguous()
    got = run("conv_members_", arguments | {"kernels": apart, "bias": flat[:, 7:24]})
    assert_bitwise_equal(got, run("conv_members_", arguments))


def test_not_a_number_stays_in_its_pixels():
    arguments = Conv(1, 2, (2, 20), (3, 3), (8, 8)).arguments()
    arguments["x"][0, 1, 0, 7, 7] = float("nan")
    got = run("conv_members_", arguments)
    expected = reference.conv_members(**arguments)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().sum() == 20


@pytest.mark.parametrize(
    "case",
    [
        Conv(0, 2, (2, 3), (2, 2), (4, 4)),
        Conv(2, 0, (2, 3), (2, 2), (4, 4)),
        Conv(2, 2, (2, 0), (2, 2), (4, 4)),
        Conv(2, 2, (0, 3), (2, 2), (4, 4)),
    ],
    ids=str,
)
def test_nothing_to_do(case):
    arguments = case.arguments()
    got = run("conv_members_", arguments)
    expected = arguments["bias"][None, :, :, None, None].expand_as(got)  # without inputs
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_registration():
    check_registration("conv_members_", ONE.arguments())


def test_inputs_have_no_gradients():
    for name in ("y", "x", "kernels", "bias"):
        check_refuses_gradients("conv_members_", ONE.arguments(), name)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("y", torch.zeros(2, 3, 5, 4), "y must have 5 dimensions, got shape (2, 3, 5, 4)"),
        ("x", torch.zeros(2, 3), "x must have 5 dimensions, got shape (2, 3)"),
        ("kernels", torch.zeros(3), "kernels must have 5 dimensions, got shape (3)"),
        ("y", torch.zeros(2, 3, 5, 5, 5).double(), "y must have dtype Float, got Double"),
        ("x", torch.zeros(2, 3, 2, 7, 6).half(), "x must have dtype Float, got Half"),
        ("kernels", torch.zeros(3, 5, 2, 3, 2).double(), "kernels must have dtype Float"),
        ("x", torch.zeros(2, 4, 2, 7, 6), "x must have y's 2 repeats and 3 directions"),
        ("x", torch.zeros(1, 3, 2, 7, 6), "x must have y's 2 repeats and 3 directions"),
        ("x", torch.zeros(2, 3, 4, 7, 6), "kernels must be of 3 directions, 5 outputs and 4"),
        ("kernels", torch.zeros(3, 6, 2, 3, 2), "kernels must be of 3 directions, 5 outputs"),
        ("kernels", torch.zeros(3, 5, 2, 0, 2), "kernels must have taps"),
        ("kernels", torch.zeros(3, 5, 2, 2, 3).mT, "kernels must be contiguous in every direction"),
        ("y", torch.zeros(2, 3, 5, 6, 5), "y must be as small as what fits in x"),
        ("y", torch.zeros(2, 3, 5, 5, 6), "y must be as small as what fits in x"),
        ("y", torch.zeros(2, 3, 5, 5, 5).mT, "y must have rows of their own"),
        (
            "y",
            torch.zeros(1, 3, 5, 5, 5).expand(2, -1, -1, -1, -1),
            "y must have rows of their own",
        ),
        (
            "y",
            torch.zeros(2, 1, 5, 5, 5).expand(-1, 3, -1, -1, -1),
            "y must have rows of their own",
        ),
        ("bias", torch.zeros(5), "bias must have shape (3, 5), got (5)"),
        ("bias", torch.zeros(3, 6), "bias must have shape (3, 5), got (3, 6)"),
        ("bias", torch.zeros(5, 3).mT, "bias must be contiguous in its last dimension"),
        ("bias", torch.zeros(3, 5).double(), "bias must have dtype Float, got Double"),
        ("stride_width", 0, "strides and dilations must be positive, got 1, 0 and 1, 1"),
        ("dilation_height", -1, "strides and dilations must be positive, got 1, 1 and -1, 1"),
        (
            "stride_width",
            2**62,
            "strides and dilations must be below 2^31, got 1, 4611686018427387",
        ),
        (
            "dilation_height",
            2**31,
            "strides and dilations must be below 2^31, got 1, 1 and 2147483",
        ),
        ("dilation_height", 2, "y must be as small as what fits in x"),
    ],
)
def test_errors_name_the_argument(argument, value, message):
    check_error("conv_members_", CASES[1].arguments() | {argument: value}, message)
