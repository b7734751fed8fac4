"""What of a model is perturbed and what is not: the report after a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..noise import NoiseFamily
from .base import PerturbedLayer
from .select import Tree
from .survey import Survey, count_fresh, own_parameters, slot_parameters

NOT_CONVERTED = "left out of the conversion, or joined later"
NOT_IN_SLOTS = "its layer gives it none"
FROZEN = "frozen (requires_grad=False)"


@dataclass(frozen=True)
class ReportEntry:
    """One module in a :class:`ConversionReport`.

    Attributes:
        name: of the module, as in ``named_modules()``.
        type: name of its class.
        names: of the parameters that the entry is about.
        parameters: their elements; a shared parameter counts where it comes first.
        noise: the layer's family; None if the parameters have no noise.
        why: why they have none; "" if they have.
    """

    name: str
    type: str
    names: tuple[str, ...]
    parameters: int
    noise: NoiseFamily | None = None
    why: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What has noise in a model and what has parameters but no noise; ``print`` it for a table.

    Attributes:
        converted: the perturbed layers.
        unperturbed: the modules with parameters that get no noise, and why.
    """

    converted: tuple[ReportEntry, ...]
    unperturbed: tuple[ReportEntry, ...]

    def __str__(self) -> str:
        """Return a table."""
        rows = [("module", "type", "parameters", "noise")]
        for entry in (*self.converted, *self.unperturbed):
            noise = f"none: {entry.why}" if entry.noise is None else repr(entry.noise)
            rows.append((entry.name, entry.type, f"{entry.parameters:,}", noise))
        counts = [sum(e.parameters for e in es) for es in (self.converted, self.unperturbed)]
        total = f"{counts[0]:,} parameters have noise, {counts[1]:,} have none"
        return f"{format_table(rows)}\n{total}"


def conversion_report(model: nn.Module) -> ConversionReport:
    """List what of a model is perturbed, and what has parameters but no noise, with the reason.

    It reads the model as it is now, converted or not; of frozen parameters
    (``requires_grad=False``) it says so.

    Args:
        model: any module.

    Returns:
        The report; printed, a table.

    Raises:
        TypeError: no module.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), 4, exclude="1")
        >>> print(perturbed.conversion_report(net))
        module  type             parameters  noise
        0       PerturbedLinear  36          Dense('normal')
        1       Linear           10          none: left out of the conversion, or joined later
        36 parameters have noise, 10 have none
    """
    survey = Survey(Tree(model))
    layers = {id(m): m for m in model.modules() if isinstance(m, PerturbedLayer)}
    noisy = {id(p) for m in layers.values() for p in slot_parameters(m).values() if p.requires_grad}
    seen: set[int] = set()
    converted, unperturbed = [], []
    for key, (_, module) in survey.tree.modules.items():
        about = survey.tree.label(module), type(module).__name__
        own = own_parameters(module)
        mine = {n: p for n, p in own.items() if key in layers and id(p) in noisy}
        rest = {n: p for n, p in own.items() if id(p) not in noisy}
        if mine:
            count = count_fresh(mine.values(), seen)
            converted.append(ReportEntry(*about, tuple(mine), count, layers[key].noise))
        if rest:
            why = survey.why.get(key, NOT_IN_SLOTS if key in layers else NOT_CONVERTED)
            if not any(p.requires_grad for p in rest.values()):
                why = FROZEN
            count = count_fresh(rest.values(), seen)
            unperturbed.append(ReportEntry(*about, tuple(rest), count, None, why))
    return ConversionReport(tuple(converted), tuple(unperturbed))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )
