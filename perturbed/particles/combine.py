"""Linear combinations of lists of tensors, kept as coefficients and computed in as few passes.

A pass over memory is what particle arithmetic costs. ``(1 - a) * p + a * q`` written operator by
operator takes three passes and three new sets of parameters; as two coefficients it is one
``torch._foreach_lerp_`` into the parameters of ``p``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A combination of more lists is computed at once: it would keep all of them alive.
MOST_TERMS = 16


class Term(NamedTuple):
    """A list of tensors times a number; ``versions`` says what they held when it was written."""

    weight: float
    tensors: list[Tensor]
    versions: list[int]


class Combination(NamedTuple):
    """``sum of terms + shift``; a number is a combination without terms."""

    terms: tuple[Term, ...]
    shift: float

    def scaled(self, factor: float) -> Combination:
        """Return the combination times a number."""
        terms = tuple([Term(t.weight * factor, t.tensors, t.versions) for t in self.terms])
        return Combination(terms, self.shift * factor)

    def plus(self, other: Combination) -> Combination:
        """Return the sum of two combinations; terms of the same tensors become one."""
        terms = list(self.terms)
        for term in other.terms:
            for i, own in enumerate(terms):
                if _same(own.tensors, term.tensors) and own.versions == term.versions:
                    terms[i] = own._replace(weight=own.weight + term.weight)
                    break
            else:
                terms.append(term)
        return Combination(tuple(terms), self.shift + other.shift)

    def check_current(self, names: Sequence[str]) -> None:
        """Raise RuntimeError if a tensor has changed since the combination was written.

        Its value was meant then; computing it now would give another one.
        """
        for term in self.terms:
            now = versions_of(term.tensors)
            if now != term.versions:
                at = [a == b for a, b in zip(now, term.versions, strict=True)].index(False)
                raise RuntimeError(
                    f"{names[at]} has changed since this combination was written, so its value is "
                    "lost; write .clone() after a combination that is to outlive a change of its "
                    "particles"
                )


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was written to; -1 where torch does not count.

    It counts in-place operations, those of optimizers included, but not what goes through
    ``.data``.
    """
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # inference tensors
        return [-1 if t.is_inference() else t._version for t in tensors]


def leaf(tensors: list[Tensor]) -> Combination:
    """Return the combination that is these tensors as they are now."""
    return Combination((Term(1.0, tensors, versions_of(tensors)),), 0.0)


def compute(combination: Combination) -> list[Tensor]:
    """Return the value of a combination of at least one term in memory of its own."""
    (first, *rest), shift = combination
    if len(rest) == 1 and not shift and _is_lerp(first.weight, rest[0].weight):
        return list(torch._foreach_lerp(first.tensors, rest[0].tensors, rest[0].weight))
    if first.weight == 1.0 and rest:
        term = rest.pop(0)
        result = list(torch._foreach_add(first.tensors, term.tensors, alpha=term.weight))
    elif first.weight == 1.0:
        result = [torch.clone(t) for t in first.tensors]
    else:
        result = list(torch._foreach_mul(first.tensors, first.weight))
    _add(result, rest, shift)
    return result


def compute_into(target: list[Tensor], combination: Combination) -> None:
    """Write the value of a combination into tensors of its shapes, dtypes and devices.

    Args:
        target: often one of the combination's own lists; then it is updated where it is.
        combination: what to write.
    """
    (*terms,), shift = combination
    own = next((i for i, t in enumerate(terms) if _same(t.tensors, target)), None)
    weight = None if own is None else terms.pop(own).weight
    if any(overlap(target, t.tensors) for t in terms):
        # Another list lies in the target's memory in other places: a tied or shared part.
        torch._foreach_copy_(target, compute(combination))
        return
    if weight is None:
        first = terms.pop(0)
        torch._foreach_copy_(target, first.tensors)
        weight = first.weight
    if len(terms) == 1 and not shift and _is_lerp(weight, terms[0].weight):
        torch._foreach_lerp_(target, terms[0].tensors, terms[0].weight)
        return
    if weight != 1.0:
        torch._foreach_mul_(target, weight)
    _add(target, terms, shift)


def overlap(target: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether the lists share memory; parts of one storage that do not overlap count, too."""
    own = {t.untyped_storage()._cdata for t in target}
    return not own.isdisjoint([t.untyped_storage()._cdata for t in tensors])


def _add(result: list[Tensor], terms: Sequence[Term], shift: float) -> None:
    for term in terms:
        torch._foreach_add_(result, term.tensors, alpha=term.weight)
    if shift:
        torch._foreach_add_(result, shift)


def _is_lerp(first: float, second: float) -> bool:
    """Whether weights are 1 - a and a, of which the first was rounded."""
    return abs(first + second - 1.0) <= 2.0**-52


def _same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    if left is right:
        return True
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
