"""Populations with explicit members, for the tests of the family and of the model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import KINDS, D, same

import perturbed
from perturbed import Explicit, PerturbedModel

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def particles(pm: PerturbedModel, flat: bool = False, grad: bool = False) -> dict[str, Tensor]:
    """Random members of what is perturbed; as columns of one (D, N) matrix if ``flat``.

    With ``grad`` they, or that matrix, are leaves that require it.
    """
    used = {id(p) for layer in pm.layers() for p, _ in layer.perturbed_parameters().values()}
    parameters = {name: p for name, p in pm.model.named_parameters() if id(p) in used}
    sizes = [p.numel() for p in parameters.values()]
    matrix = torch.randn(pm.directions, sum(sizes) + 3, dtype=torch.float64)
    matrix = matrix.to(next(iter(parameters.values())).dtype).requires_grad_(grad and flat)
    # Slices: what `split` returns may not be stepped in place by way of the leaf.
    parts = [matrix[:, 2 + sum(sizes[:i]) :][:, :n] for i, n in enumerate(sizes)]
    views = {
        name: part.view(pm.directions, *p.shape)
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
    if flat:
        return views
    return {name: view.clone().requires_grad_(grad) for name, view in views.items()}


def swarm(net: nn.Module, directions: int = D, flat: bool = False) -> PerturbedModel:
    """Wrap a converted model and give it random members."""
    pm = PerturbedModel(net, directions)
    pm.set_members(particles(pm, flat))
    return pm


@pytest.mark.filterwarnings("ignore:convert left")
def population(kind: str = "mlp", **options) -> PerturbedModel:
    """Convert a model of the zoo and give it random members."""
    return swarm(perturbed.convert(KINDS[kind].make().double().eval(), D, Explicit()), **options)


def one_row(arguments, b, rows):
    """Row b of every tensor that has rows."""

    def cut(leaf):
        return leaf[b : b + 1] if isinstance(leaf, Tensor) and len(leaf) == rows else leaf

    return tree_map(cut, arguments)


def check_rows(
    pm: PerturbedModel, rows: int, *arguments, call: Callable = lambda model, *args: model(*args)
) -> None:
    """Assert that every row is what the plain module of its member makes of it."""
    together, layout = tree_flatten(call(pm, *arguments))
    members = [pm.member(d) for d in range(pm.directions)]
    for b in range(rows):
        alone, own = tree_flatten(call(members[b % pm.directions], *one_row(arguments, b, rows)))
        assert own == layout
        for row, one in zip(together, alone, strict=True):
            same(row[b], one[0])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)
