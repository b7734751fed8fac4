"""How a user names parts of a model: by pattern, by type, or by a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..noise import NoiseFamily
from .base import check_family

# Name pattern (fnmatch), module type, or predicate (name, module) -> bool.
Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
NoiseChoice = NoiseFamily | None | Mapping[Selector, NoiseFamily | None]


def check_model(model: object) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


class Tree:
    """The modules of a model with all their names, and what contains them."""

    def __init__(self, model: nn.Module) -> None:
        """Walk the model once; TypeError for what is no module."""
        check_model(model)
        # id -> (first name, module); the order is that of named_modules().
        self.modules: dict[int, tuple[str, nn.Module]] = {}
        self._names: dict[int, list[str]] = {}
        self._by_name: dict[str, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.modules.setdefault(id(module), (name, module))
            self._names.setdefault(id(module), []).append(name)
            self._by_name[name] = module

    def label(self, module: nn.Module) -> str:
        """First name of a module in errors and tables; the class's for the model itself."""
        return self.modules[id(module)][0] or type(module).__name__

    def matches(self, module: nn.Module, selector: Selector) -> bool:
        """Whether ``selector`` names the module or, but for a predicate, what contains it."""
        for name in self._names[id(module)]:
            if not isinstance(selector, (str, type)):
                if selector(name, module):
                    return True
                continue
            for holder in _prefixes(name):
                if isinstance(selector, str) and fnmatchcase(holder, selector):
                    return True
                if isinstance(selector, type) and isinstance(self._by_name[holder], selector):
                    return True
        return False

    def check(self, argument: str, selector: object) -> None:
        """Raise TypeError for what is no selector, ValueError for a pattern without a match."""
        if isinstance(selector, str):
            # A misspelt name would otherwise go unnoticed: the layer would get other noise or none.
            if not any(fnmatchcase(name, selector) for name in self._by_name):
                raise ValueError(f"{argument}: the model has no module named {selector!r}")
        elif isinstance(selector, type):
            if not issubclass(selector, nn.Module):
                raise TypeError(f"{argument}: {selector.__name__} is no nn.Module class")
        elif not callable(selector) or isinstance(selector, nn.Module):
            raise TypeError(
                f"{argument} must be name patterns, module types or predicates (name, module), "
                f"got {selector!r}"
            )


def _prefixes(name: str) -> Iterable[str]:
    """Names of a module and of all that contains it: "a.b" -> "", "a", "a.b"."""
    yield ""
    if name:
        parts = name.split(".")
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def as_selectors(
    tree: Tree, argument: str, value: Selector | Iterable[Selector] | None
) -> list[Selector] | None:
    """Return ``include`` or ``exclude`` as a checked list; None if it was not given."""
    if value is None:
        return None
    single = (str, type, nn.Module, Tensor)
    several = isinstance(value, Iterable) and not isinstance(value, single)
    selectors = list(value) if several else [value]  # type: ignore[arg-type]
    for selector in selectors:
        tree.check(argument, selector)
    return selectors  # type: ignore[return-value]


class Chooser:
    """Which family a module gets, by ``convert``'s arguments noise, include and exclude."""

    def __init__(
        self,
        tree: Tree,
        noise: NoiseChoice,
        include: Selector | Iterable[Selector] | None,
        exclude: Selector | Iterable[Selector] | None,
    ) -> None:
        """Check the arguments against the names of the model."""
        self.tree = tree
        self.include = as_selectors(tree, "include", include)
        self.exclude = as_selectors(tree, "exclude", exclude) or []
        self.rules: list[tuple[Selector, NoiseFamily | None]] = []
        self.default = check_family(None if isinstance(noise, Mapping) else noise)
        if isinstance(noise, Mapping):
            for selector, family in noise.items():
                tree.check("noise", selector)
                self.rules.append((selector, None if family is None else check_family(family)))

    def family(self, module: nn.Module) -> NoiseFamily | None:
        """Return the family of a module, None if it is to be left alone."""
        matches = self.tree.matches
        if self.include is not None and not any(matches(module, s) for s in self.include):
            return None
        if any(matches(module, s) for s in self.exclude):
            return None
        for selector, family in self.rules:
            if matches(module, selector):
                return family
        return self.default
