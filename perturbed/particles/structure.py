"""Which parameters of a module a product is about, and whether two modules agree in them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_flag

Predicate = Callable[[str], bool]


class Structure:
    """The chosen parameters of a module, and where they are registered.

    Attributes:
        module: the module.
        names: of the chosen parameters, as in ``module.named_parameters()``: a tied parameter once.
        every: the names of all of its parameters.
        parameters: the chosen ones.
        kinds: shape, dtype and device of each.
    """

    def __init__(self, module: nn.Module, chosen: Callable[[str, nn.Parameter], bool]) -> None:
        """Look at the module.

        Args:
            module: any module.
            chosen: whether a parameter takes part.

        Raises:
            TypeError: no module; a chosen parameter that holds integers.
            ValueError: a parameter without a shape yet, or none that is chosen.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        self.module = module
        found: list[tuple[str, dict, str, nn.Parameter]] = []
        _find(module, "", set(), set(), found)
        self.every = tuple([entry[0] for entry in found])
        found = [entry for entry in found if chosen(entry[0], entry[3])]
        if not found:
            raise ValueError(
                f"module has no parameter to compute with: of its {len(self.every)} each is frozen "
                "(requires_grad=False; frozen=True takes them) or left out by where"
            )
        self.names = tuple([entry[0] for entry in found])
        self.parameters: list[nn.Parameter] = [entry[3] for entry in found]
        self._places = [(held, key) for _, held, key, _ in found]
        for name, p in zip(self.names, self.parameters, strict=True):
            if type(p) is not nn.Parameter and is_lazy(p):
                raise ValueError(f"{name} has no shape yet: run a forward of the module first")
            if not (p.dtype.is_floating_point or p.dtype.is_complex):
                raise TypeError(f"{name} must be floating-point or complex, got {p.dtype}")
        self.kinds = kinds_of(self.parameters)

    def check_current(self) -> None:
        """Raise RuntimeError if the module has other parameters in these places by now."""
        now = [held.get(key) for held, key in self._places]
        known = list(map(operator.is_, now, self.parameters))
        if not all(known):
            raise RuntimeError(
                f"{self.names[known.index(False)]} of the module was replaced after product() "
                "looked at it; call product() again"
            )

    def of(self, module: nn.Module) -> Structure:
        """Return the structure of another module with the same choice of parameters.

        Raises:
            ValueError: the modules have parameters of other names, naming the first.
        """
        wanted = set(self.names)
        other = Structure(module, lambda name, _: name in wanted)
        _check_names(self.every, other.every)
        return other

    def __getstate__(self) -> tuple:
        return self.module, self.names

    def __setstate__(self, state: tuple) -> None:
        module, names = state
        wanted = set(names)
        Structure.__init__(self, module, lambda name, _: name in wanted)


def _find(
    module: nn.Module, prefix: str, modules: set[int], parameters: set[int], found: list
) -> None:
    """List parameters in the order and under the names of ``named_parameters()``, at half its cost.

    With each goes the dictionary and the key it is registered under.
    """
    modules.add(id(module))
    held = module._parameters
    for key, parameter in held.items():
        if parameter is not None and id(parameter) not in parameters:
            parameters.add(id(parameter))
            found.append((prefix + key, held, key, parameter))
    for key, child in module._modules.items():
        if child is not None and id(child) not in modules:
            _find(child, f"{prefix}{key}.", modules, parameters, found)


def choose(where: Predicate | None, frozen: bool) -> Callable[[str, nn.Parameter], bool]:
    """Return the choice that the arguments of ``product`` describe."""
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of a name, got {type(where).__name__}")
    check_flag("frozen", frozen)
    if where is None:
        return lambda name, parameter: frozen or parameter.requires_grad
    return lambda name, parameter: (frozen or parameter.requires_grad) and bool(where(name))


def kinds_of(tensors: Sequence[Tensor]) -> list[tuple]:
    """Return shape, dtype and device of each tensor."""
    return [(t.shape, t.dtype, t.device) for t in tensors]


def check_same(left: Structure, right: Structure, shapes_only: bool = False) -> None:
    """Raise ValueError, naming the first parameter that differs, if particles do not fit.

    Args:
        left: the structure of one particle.
        right: that of the other.
        shapes_only: whether dtypes and devices may differ, as in a copy.
    """
    if left is right:
        return
    _check_names(left.names, right.names)
    if left.kinds == right.kinds:
        return
    for name, mine, theirs in zip(left.names, left.kinds, right.kinds, strict=True):
        for what, a, b in zip(("shape", "dtype", "device"), mine, theirs, strict=True):
            if a != b and (what == "shape" or not shapes_only):
                shown = (tuple(a), tuple(b)) if what == "shape" else (a, b)
                raise ValueError(
                    f"particles must have the same parameters: {name} has {what} {shown[0]} on the "
                    f"left and {shown[1]} on the right"
                )


def _check_names(left: tuple[str, ...], right: tuple[str, ...]) -> None:
    if left == right:
        return
    for names, others, side in ((left, right, "left"), (right, left, "right")):
        missing = [name for name in names if name not in set(others)]
        if missing:
            raise ValueError(
                f"particles must have the same parameters: {missing[0]} is one of the {side} "
                "particle only (is it frozen, tied or left out in the other?)"
            )
    at = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
    raise ValueError(
        "particles must have the same parameters in the same order: parameter "
        f"{at} is {left[at]} on the left and {right[at]} on the right"
    )
