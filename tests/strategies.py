"""Random layers, families, rows and layouts for the property tests (hypothesis).

A drawn case is a value with a readable repr: what a failure prints is enough to build it again. Its
numbers come from torch's generator, seeded by the case. `examine` runs a check over many cases, the
same ones in every run and process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import perturbed
from perturbed import Dense, LowRank, Permuted, PerturbedModel, SignFlip, Sparse
from perturbed.nn import Affine
from perturbed.noise import NoiseFamily

SIGMA = 0.3


def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test by the number of cases: some in the default suite, all in the slow one."""
    numbers = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("examples", numbers)


def examine(check: Callable[..., None], examples: int, **strategies: Any) -> None:
    """Run `check` on so many cases; the first that fails is made small and shown."""
    settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(given(**strategies)(check))()


# ---- families ------------------------------------------------------------------------------------

distributions = st.sampled_from(["normal", "rademacher"])
storages = st.sampled_from(["regenerate", "stored"])
sides = st.sampled_from(["auto", "in", "out", "both"])
fractions = st.sampled_from([0.25, 0.5, 0.9, 1.0])

families: st.SearchStrategy[NoiseFamily] = st.one_of(
    st.builds(Dense, distributions, storages),
    st.builds(LowRank, st.integers(1, 5), distributions),
    st.builds(Sparse, st.just("auto") | st.integers(1, 2) | fractions, distributions),
    st.builds(
        Permuted,
        sides,
        st.just(0) | st.integers(1, 2) | fractions,
        st.just(0) | st.integers(1, 2) | fractions,
        st.booleans(),
        distributions,
        storages,
    ),
    st.builds(SignFlip, sides, st.integers(1, 3), distributions, storages),
)

# ---- layers --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """A torch layer and the shapes of one row of its arguments; `ids`: rows of an embedding.

    `states`: whether what comes after the first result is (layers, B, hidden) states.
    """

    kind: Callable[..., nn.Module]
    arguments: tuple
    options: dict[str, Any]
    rows: tuple[tuple[int, ...], ...]
    ids: int = 0
    states: bool = False

    def results(self, output: Any) -> list[Tensor]:
        """The tensors that the layer returned, rows first."""
        first, *rest = tree_leaves(output)
        return [first, *(t.transpose(0, 1) if self.states else t for t in rest)]

    def __repr__(self) -> str:
        """Show the call."""
        given_ = [*map(repr, self.arguments), *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"{self.kind.__name__}({', '.join(given_)}) of rows {self.rows}"


sizes = st.integers(1, 9)
extras = st.sampled_from([(), (1,), (4,), (2, 3), (0,)])


@st.composite
def linears(draw: st.DrawFn) -> Layer:
    inputs, outputs = draw(sizes | st.sampled_from([17, 33, 64])), draw(sizes | st.just(65))
    options = {"bias": draw(st.booleans())}
    return Layer(nn.Linear, (inputs, outputs), options, ((*draw(extras), inputs),))


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool = False) -> Layer:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    name = f"Conv{'Transpose' * transposed}{dims}d"
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    largest = 3 if dims < 3 else 2
    kernel = tuple(draw(st.integers(1, largest)) for _ in range(dims))
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "dilation": tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    reach = [d * (k - 1) + 1 for d, k in zip(options["dilation"], kernel, strict=True)]
    if transposed:
        # The output must have a positive size, whatever the input's.
        options["padding"] = tuple(draw(st.integers(0, (r - 1) // 2)) for r in reach)
        most = [max(s, d) - 1 for s, d in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, m)) for m in most)
        image = [draw(st.integers(1, 4)) for _ in range(dims)]
    else:
        image = [r + draw(st.integers(0, 3)) for r in reach]
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
        )
        if options["stride"] == (1,) * dims and draw(st.booleans()):
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
            image = [n + r for n, r in zip(image, reach, strict=True)]  # room to reflect
        else:
            options["padding"] = tuple(draw(st.integers(0, min(2, n - 1))) for n in image)
    return Layer(getattr(nn, name), (inputs, outputs, kernel), options, ((inputs, *image),))


@st.composite
def norms(draw: st.DrawFn) -> Layer:
    groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channels, image = groups * width, draw(st.sampled_from([(2,), (3, 2), (2, 1, 3)]))
    tokens = draw(st.sampled_from([(), (4,), (2, 3)]))
    bias = {"bias": draw(st.booleans())}
    return draw(
        st.sampled_from(
            [
                Layer(Affine, (channels,), bias, ((*tokens, channels),)),
                Layer(nn.LayerNorm, (channels,), bias, ((*tokens, channels),)),
                Layer(nn.LayerNorm, ((2, channels),), {}, ((*tokens, 2, channels),)),
                Layer(nn.RMSNorm, (channels,), {}, ((*tokens, channels),)),
                Layer(nn.GroupNorm, (groups, 2 * channels), {}, ((2 * channels, *image),)),
                Layer(nn.BatchNorm1d, (channels,), {}, ((channels, *tokens[:1]),)),
                Layer(nn.BatchNorm2d, (channels,), {}, ((channels, 2, 3),)),
                Layer(nn.BatchNorm3d, (channels,), {}, ((channels, 2, 1, 3),)),
            ]
        )
    )


@st.composite
def embeddings(draw: st.DrawFn) -> Layer:
    count, width = draw(st.integers(1, 11)), draw(sizes)
    padding = draw(st.none() | st.integers(0, count - 1))
    return Layer(nn.Embedding, (count, width), {"padding_idx": padding}, (draw(extras),), ids=count)


@st.composite
def attentions(draw: st.DrawFn) -> Layer:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 3))
    options = {
        "batch_first": True,
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "kdim": draw(st.none() | st.integers(1, 5)),
        "vdim": draw(st.none() | st.integers(1, 5)),
    }
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = ((queries, width), (keys, options["kdim"] or width), (keys, options["vdim"] or width))
    return Layer(nn.MultiheadAttention, (width, heads), options, rows)


@st.composite
def recurrents(draw: st.DrawFn) -> Layer:
    inputs, hidden = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    options = {
        "batch_first": True,
        "bias": draw(st.booleans()),
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
    }
    if kind is nn.LSTM and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, hidden - 1))
    rows = ((draw(st.integers(1, 4)), inputs),)
    return Layer(kind, (inputs, hidden), options, rows, states=True)


@st.composite
def cells(draw: st.DrawFn) -> Layer:
    inputs, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from([nn.RNNCell, nn.GRUCell]))
    rows = ((inputs,), (hidden,))[: draw(st.integers(1, 2))]
    return Layer(kind, (inputs, hidden), {"bias": draw(st.booleans())}, rows)


LAYERS: dict[str, st.SearchStrategy[Layer]] = {
    "linear": linears(),
    "convolution": convolutions(),
    "transposed": convolutions(transposed=True),
    "norm": norms(),
    "embedding": embeddings(),
    "attention": attentions(),
    "recurrent": recurrents(),
    "cell": cells(),
}

# ---- layouts of rows -----------------------------------------------------------------------------


def _padded(x: Tensor) -> Tensor:
    """The middle of a larger tensor."""
    wide = x.new_zeros([n + 3 for n in x.shape])
    middle = wide[tuple(slice(1, n + 1) for n in x.shape)]
    return middle.copy_(x)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


# What holds the same numbers in another way, or other numbers with rows that share memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "reversed": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "padded": _padded,
    "every_other": lambda x: x.repeat_interleave(2, 0)[::2],
    "features_apart": lambda x: x.repeat_interleave(3, -1)[..., ::3],
    "channels_last": _channels_last,
    "expanded_rows": lambda x: x[:1].expand_as(x) if len(x) else x,
    "expanded_features": lambda x: x[..., :1].expand_as(x),
}

# ---- cases ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer with noise and a batch of it; see `population` and `batch`."""

    layer: Layer
    noise: NoiseFamily
    directions: int
    repeats: int
    antithetic: bool | None
    layout: str
    seed: int
    dtype: torch.dtype = torch.float64

    @property
    def rows(self) -> int:
        return self.repeats * self.directions

    @property
    def negated(self) -> bool:
        """Whether the second half of the repeats is."""
        if self.antithetic is None:
            return self.repeats > 1
        return self.antithetic

    def sign(self, b: int) -> int:
        """s_b, from the definition."""
        return -1 if self.negated and b // self.directions >= self.repeats / 2 else 1

    def population(self) -> tuple[nn.Module, PerturbedModel]:
        """Make the layer in a model and its population, with noise drawn.

        Raises:
            ValueError: a family that the layer's sizes do not admit.
        """
        torch.manual_seed(self.seed)
        net = nn.Sequential(self.layer.kind(*self.layer.arguments, **self.layer.options)).eval()
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.2, 1.0)  # neither zeros nor ones, as norms start with
        net.to(self.dtype)
        perturbed.convert(net, self.directions, self.noise)
        pm = PerturbedModel(net[0], self.directions, self.antithetic, SIGMA, seed=self.seed)
        pm.set_noise()
        return net, pm

    def batch(self, rows: int | None = None) -> tuple[Tensor, ...]:
        """Random arguments of the layer, with `rows` rows or its own number."""
        return tuple(
            self._argument(self.rows if rows is None else rows, s) for s in self.layer.rows
        )

    def _argument(self, rows: int, shape: tuple[int, ...]) -> Tensor:
        if self.layer.ids:
            x = torch.randint(self.layer.ids, (rows, *shape))
        else:
            x = torch.randn(rows, *shape).to(self.dtype)
        return LAYOUTS[self.layout](x)


DOUBLE = st.just(torch.float64)


@st.composite
def cases(
    draw: st.DrawFn,
    layers: st.SearchStrategy[Layer],
    dtypes: st.SearchStrategy[torch.dtype] = DOUBLE,
    noises: st.SearchStrategy[NoiseFamily] = families,
) -> Case:
    """A layer, a family, D, R and the rest, of which some families may not fit the layer."""
    repeats = draw(st.sampled_from([0, 1, 2, 2, 3, 4, 6, 25]))
    odd = repeats % 2 == 1
    antithetic = draw(st.sampled_from([False] if odd and repeats > 1 else [None, False]))
    if not odd and repeats and draw(st.booleans()):
        antithetic = True
    return Case(
        draw(layers),
        draw(noises),
        draw(st.integers(1, 7) | st.just(17)) if repeats < 25 else draw(st.integers(1, 3)),
        repeats,
        antithetic,
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.integers(0, 2**16)),
        draw(dtypes),
    )
