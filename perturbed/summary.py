"""The table of :meth:`perturbed.PerturbedModel.summary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .nn.base import PerturbedLayer
from .nn.cost import count_multiply_adds, multiply_adds
from .nn.report import conversion_report, format_table
from .noise.state import NoiseState


def summarise(model: nn.Module, state: NoiseState, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Say layer by layer what of ``model`` has noise, what it costs, and what has none.

    Args:
        model: the base model.
        state: the draw of its layers.
        args: example inputs of ``model``; without any, each weight is taken to be used once.
        kwargs: the same.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, PerturbedLayer)]
    if args or kwargs:
        cost = count_multiply_adds(model, args, kwargs)
    else:
        cost = {id(layer): multiply_adds(layer) for _, layer in layers}
    total = max(1, sum(cost.values()))
    rows = [("layer", "noise", "parameters", "noise bytes held", "cost")]
    sizes = {}  # of every perturbed parameter, tied ones once
    for name, layer in layers:
        own = {id(p): p.numel() for p, _ in layer.perturbed_parameters().values()}
        sizes.update(own)
        share = f"{cost[id(layer)] / total:.1%}" if id(layer) in cost else "not called"
        cells = repr(layer.noise), f"{sum(own.values()):,}", f"{layer.held_bytes():,}", share
        rows.append((name or type(layer).__name__, *cells))
    for entry in conversion_report(model).unperturbed:
        name = f"{entry.name}: {', '.join(entry.names)}"
        rows.append((name, f"none: {entry.why}", f"{entry.parameters:,}", "0", ""))
    held = sum(t.nbytes for t in (*state.held.values(), *state.members.values()))
    rows.append(("perturbed", "", f"{sum(sizes.values()):,}", f"{held:,}", ""))
    return format_table(rows)
