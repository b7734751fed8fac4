"""Which modules of a model can have noise, and why the others cannot."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import PerturbedLayer
from .select import Tree
from .twins import find_twin, why_no_twin

LEFT_OUT = "left out by include, exclude or noise"

# Modules that read the weights of these children and never call them.
READERS: dict[type[nn.Module], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}


class Survey:
    """What each module of a model could become.

    Attributes:
        tree: the modules of the model.
        trials: id of a module that can be converted -> an instance of its perturbed twin that has
            its parameters, made to ask it; the module knows nothing of it.
        why: id -> why a module that has parameters stays as it is.
    """

    def __init__(self, tree: Tree, left_out: Collection[int] = ()) -> None:
        """Look at every module; ``left_out`` are ids of those that are to stay as they are."""
        self.tree = tree
        self.trials: dict[int, PerturbedLayer] = {}
        self.why: dict[int, str] = {}
        for key, (_, module) in tree.modules.items():
            # Without parameters too, batch statistics would mix the members.
            if isinstance(module, PerturbedLayer) or not (
                own_parameters(module) or isinstance(module, _BatchNorm)
            ):
                continue
            self._look_at(module, key in left_out)
        self._keep_readers_whole()
        self._keep_ties_whole()

    def layers(self) -> Iterator[tuple[nn.Module, PerturbedLayer]]:
        """Iterate over modules that have noise or can have it, each with its perturbed form."""
        for key, (_, module) in self.tree.modules.items():
            if isinstance(module, PerturbedLayer):
                yield module, module
            elif key in self.trials:
                yield module, self.trials[key]

    def _look_at(self, module: nn.Module, left_out: bool) -> None:
        twin = find_twin(type(module))
        why: str | None
        if left_out:
            why = LEFT_OUT
        elif twin is None:
            why = why_no_twin(type(module))
        elif "forward" in module.__dict__:
            # It would go past the perturbed class's forward, and stay unperturbed unnoticed.
            why = "its forward was replaced on the instance"
        else:
            why = twin.why_not_convertible(module)
            if why is None:
                trial = as_twin(module, twin)
                computed = [n for n in slot_names(trial) if n not in module._parameters]
                if not computed:
                    self.trials[id(module)] = trial
                    return
                why = f"a hook or parametrization computes its {computed[0]}"
        self.why[id(module)] = why

    def _drop(self, module: nn.Module, why: str) -> None:
        del self.trials[id(module)]
        self.why[id(module)] = why

    def _stays(self, module: nn.Module) -> bool:
        return id(module) not in self.trials and not isinstance(module, PerturbedLayer)

    def _keep_readers_whole(self) -> None:
        """Leave alone what a module reads that stays as it is: the noise would be ignored."""
        for _, module in self.tree.modules.values():
            names = (n for kind, ns in READERS.items() if isinstance(module, kind) for n in ns)
            for name in names:
                child = module._modules.get(name)
                if child is not None and self._stays(module) and id(child) in self.trials:
                    self._drop(child, f"{self._describe(module)}, unperturbed, reads its weight")

    def _keep_ties_whole(self) -> None:
        """Leave alone what shares a parameter with a module that stays as it is.

        One use of the parameter would see the noise and the other not, unlike any member. A module
        that registers a parameter of a layer inside it is taken to hold it, not to use it.
        """
        users: dict[int, list[nn.Module]] = {}
        for _, module in self.tree.modules.values():
            for parameter in own_parameters(module).values():
                users.setdefault(id(parameter), []).append(module)

        def partner(module: nn.Module, trial: PerturbedLayer) -> tuple[str, nn.Module] | None:
            for name in slot_names(trial):
                for user in users.get(id(module._parameters[name]), ()):
                    if self._stays(user) and not any(m is module for m in user.modules()):
                        return name, user
            return None

        found = True
        while found:  # what is left alone may itself share another parameter
            found = False
            for key, trial in list(self.trials.items()):
                module = self.tree.modules[key][1]
                tie = partner(module, trial)
                if tie is not None:
                    self._drop(
                        module, f"shares its {tie[0]} with {self._describe(tie[1])}, unperturbed"
                    )
                    found = True

    def _describe(self, module: nn.Module) -> str:
        return f"{self.tree.label(module)} ({type(module).__name__})"


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are the module's own, not those of modules in it."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def slot_names(layer: PerturbedLayer) -> list[str]:
    """Return the names of the parameters that a layer can perturb."""
    return [name for slot in layer.slots() for name in slot if name is not None]


def slot_parameters(layer: PerturbedLayer) -> dict[str, nn.Parameter]:
    """Return the parameters that a layer can perturb, frozen ones too."""
    own = own_parameters(layer)
    return {name: own[name] for name in slot_names(layer) if name in own}


def count_fresh(parameters: Iterable[nn.Parameter], seen: set[int]) -> int:
    """Count the elements of parameters that are not in ``seen``, ids, and add them to it."""
    fresh = {id(p): p for p in parameters if id(p) not in seen}
    seen.update(fresh)
    return sum(p.numel() for p in fresh.values())


def as_twin(module: nn.Module, twin: type[PerturbedLayer]) -> PerturbedLayer:
    """Return an instance of ``twin`` with the attributes and parameters of ``module``."""
    trial = twin.__new__(twin)
    trial.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        trial.__dict__[name] = copy.copy(module.__dict__[name])
    return trial
