"""What a conversion will do, decided and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..noise import NoiseFamily
from ..noise.state import check_directions
from .base import PerturbedLayer
from .select import Chooser, NoiseChoice, Selector, Tree
from .survey import Survey, count_fresh, own_parameters, slot_parameters
from .twins import is_quantised

# What the kernels compute with.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Plan:
    """The changes of one conversion.

    Attributes:
        tree: the modules of the model.
        directions: D.
        changes: layers to convert, in the order of ``named_modules()``, each with its twin and the
            family that was chosen for it.
        missed: modules with trainable parameters that stay without noise, though nobody left them
            out, and the number of elements of these parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: int,
        noise: NoiseChoice = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
    ) -> None:
        """Decide on every module, and raise what there is to raise."""
        self.tree = Tree(model)
        self.directions = check_directions(directions)
        chooser = Chooser(self.tree, noise, include, exclude)
        families: dict[int, NoiseFamily] = {}
        for key, (_, module) in self.tree.modules.items():
            family = chooser.family(module)
            if family is not None:
                check_readable(self.tree.label(module), module)
                families[key] = family
        left_out = self.tree.modules.keys() - families.keys()
        survey = Survey(self.tree, left_out)
        layers = list(survey.layers())
        if not layers:
            raise ValueError(_nothing_to_convert(model, survey))
        self.changes: list[tuple[nn.Module, type[PerturbedLayer], NoiseFamily]] = []
        for key, trial in survey.trials.items():
            module = self.tree.modules[key][1]
            try:
                trial.init_noise(directions, families[key])
            except ValueError as error:
                raise ValueError(f"{self.tree.label(module)}: {error}") from None
            self.changes.append((module, type(trial), families[key]))
        self._check_alike(layers)
        self._check_ties(layers)
        noisy = {id(p) for _, layer in layers for p in slot_parameters(layer).values()}
        self.missed = self._find_missed(left_out, noisy)

    def _check_alike(self, layers: list[tuple[nn.Module, PerturbedLayer]]) -> None:
        """Refuse parameters on several devices, and matrices of several dtypes.

        Vectors, such as the weights of norms, may be wider than the rest.
        """
        first: tuple[str, nn.Parameter] | None = None
        first_matrix = first
        for module, layer in layers:
            for name, parameter in slot_parameters(layer).items():
                here = f"{self.tree.label(module)}.{name}", parameter
                if parameter.dtype not in DTYPES:
                    raise ValueError(
                        f"{here[0]} must be float32, float64, bfloat16 or float16, got "
                        f"{parameter.dtype}; convert the model or exclude this module"
                    )
                first = first or here
                _check_same("device", first, here)
                if parameter.dim() > 1:
                    first_matrix = first_matrix or here
                    _check_same("dtype", first_matrix, here)

    def _check_ties(self, layers: list[tuple[nn.Module, PerturbedLayer]]) -> None:
        """Refuse other noise for layers that share a parameter."""
        first: dict[int, tuple[str, NoiseFamily]] = {}
        for module, layer in layers:
            for name, parameter in slot_parameters(layer).items():
                here = f"{self.tree.label(module)}.{name}"
                other, noise = first.setdefault(id(parameter), (here, layer.noise))
                if noise != layer.noise:
                    raise ValueError(
                        f"noise must be the same for {other} and {here}, which are one parameter, "
                        f"got {noise} and {layer.noise}"
                    )

    def _find_missed(self, left_out: set[int], noisy: set[int]) -> list[tuple[nn.Module, int]]:
        found = []
        seen = set(noisy)
        for key, (_, module) in self.tree.modules.items():
            parameters = {} if key in left_out else own_parameters(module)
            count = count_fresh((p for p in parameters.values() if p.requires_grad), seen)
            if count > 0:
                found.append((module, count))
        return found


def check_readable(label: str, module: nn.Module) -> None:
    """Raise ValueError for a module whose weights are not there yet, or packed."""
    for name, parameter in module._parameters.items():
        if parameter is not None and is_lazy(parameter):
            raise ValueError(
                f"model must have its parameters, but {label}.{name} is lazy; run one forward "
                "first or exclude it"
            )
    if is_quantised(module):
        raise ValueError(
            f"{label} ({type(module).__name__}) is quantised: its weights cannot have noise; "
            "convert the model before quantising it, or exclude this module"
        )


def _check_same(what: str, first: tuple[str, nn.Parameter], here: tuple[str, nn.Parameter]) -> None:
    a, b = getattr(first[1], what), getattr(here[1], what)
    if a != b:
        raise ValueError(
            f"model must be on one device and its matrices of one dtype, got {first[0]} with {a} "
            f"and {here[0]} with {b}; move the model or exclude one of them"
        )


def _nothing_to_convert(model: nn.Module, survey: Survey) -> str:
    reasons = [
        f"{survey.tree.label(survey.tree.modules[key][1])}: {why}"
        for key, why in survey.why.items()
    ]
    listed = "; ".join(reasons[:4]) + ("; ..." if len(reasons) > 4 else "")
    return (
        f"model has no layer that can be perturbed: {type(model).__name__} "
        f"({listed or 'no parameters'})"
    )
