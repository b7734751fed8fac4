"""Explicit members: what each row of the batch sees are tensors that the caller holds."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import KINDS, D, Kind, same

import perturbed
from perturbed import Explicit, PerturbedModel

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def particles(net: nn.Module, directions: int = D, flat: bool = False) -> dict[str, torch.Tensor]:
    """Random members of what can be perturbed; as columns of one (D, N) matrix if ``flat``."""
    parameters = {
        name: p
        for layer_name, layer in net.named_modules()
        if isinstance(layer, perturbed.nn.PerturbedLayer)
        for name, p in layer.named_parameters(layer_name, recurse=False)
        if p.requires_grad
    }
    # A tied parameter has the first of its names.
    names = {id(p): name for name, p in reversed([*net.named_parameters()])}
    parameters = {name: p for name, p in parameters.items() if names[id(p)] == name}
    sizes = [p.numel() for p in parameters.values()]
    like = next(iter(parameters.values()))
    matrix = torch.randn(directions, sum(sizes) + 3, dtype=torch.float64).to(like.dtype)
    parts = matrix[:, 2:-1].split(sizes, 1)
    views = {
        n: q.view(directions, *p.shape) for (n, p), q in zip(parameters.items(), parts, strict=True)
    }
    return views if flat else {name: view.clone() for name, view in views.items()}


def swarm(net: nn.Module, directions: int = D, **options) -> tuple[PerturbedModel, dict]:
    """Wrap a converted model and give it random members."""
    pm = PerturbedModel(net, directions)
    members = particles(net, directions, **options)
    pm.set_members(members)
    return pm, members


def population(kind: str = "mlp", **options) -> tuple[nn.Module, PerturbedModel, dict]:
    """Convert a model of the zoo and give it random members."""
    net = perturbed.convert(KINDS[kind].make().double().eval(), D, Explicit())
    return net, *swarm(net, **options)


def one_row(arguments, b, rows):
    """Row b of every tensor that has rows."""

    def cut(leaf):
        return leaf[b : b + 1] if isinstance(leaf, torch.Tensor) and len(leaf) == rows else leaf

    return tree_map(cut, arguments)


def check_rows(pm: PerturbedModel, arguments, call=lambda model, args: model(*args)) -> None:
    """Assert that every row is what the plain module of its member makes of it."""
    rows = max(len(a) for a in tree_flatten(arguments)[0] if isinstance(a, torch.Tensor))
    together, layout = tree_flatten(call(pm, arguments))
    plain = [pm.member(d) for d in range(pm.directions)]
    for b in range(rows):
        alone, own = tree_flatten(call(plain[b % pm.directions], one_row(arguments, b, rows)))
        assert own == layout
        for row, one in zip(together, alone, strict=True):
            same(row[b], one[0])


# ---- members are the networks that their rows see ----------------------------------------------


@each_kind
@pytest.mark.parametrize(("repeats", "flat", "grad"), [(1, True, False), (5, False, True)])
def test_a_member_is_the_network_that_its_rows_see(kind: Kind, repeats, flat, grad):
    net = perturbed.convert(kind.make().double().eval(), D, Explicit())
    pm, _ = swarm(net, flat=flat)
    args, kwargs = kind.arguments(repeats * D)
    with torch.set_grad_enabled(grad):
        check_rows(pm, (args, kwargs), lambda model, a: kind.call(model, *a))
