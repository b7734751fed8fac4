"""Which perturbed layer stands for which torch layer: the table that ``convert`` reads."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .affine import Affine, PerturbedAffine
from .attention import PerturbedMultiheadAttention
from .base import PerturbedLayer
from .cells import PerturbedGRUCell, PerturbedLSTMCell, PerturbedRNNCell
from .conv import PerturbedConv1d, PerturbedConv2d, PerturbedConv3d
from .conv_transpose import (
    PerturbedConvTranspose1d,
    PerturbedConvTranspose2d,
    PerturbedConvTranspose3d,
)
from .embedding import PerturbedEmbedding
from .library import PerturbedLibraryNorm, PerturbedTransposedLinear
from .linear import PerturbedLinear
from .norm import (
    PerturbedBatchNorm1d,
    PerturbedBatchNorm2d,
    PerturbedBatchNorm3d,
    PerturbedGroupNorm,
    PerturbedLayerNorm,
    PerturbedRMSNorm,
)
from .recurrent import PerturbedGRU, PerturbedLSTM, PerturbedRNN

# torch layer -> perturbed twin. A class counts for itself alone, not for its subclasses, whose
# forward may do anything. A string names classes of libraries that need not be installed: a
# pattern (fnmatch) of "module.QualifiedName". Classes go before strings, then the first match.
TWINS: dict[type[nn.Module] | str, type[PerturbedLayer]] = {
    nn.Linear: PerturbedLinear,
    nn.Conv1d: PerturbedConv1d,
    nn.Conv2d: PerturbedConv2d,
    nn.Conv3d: PerturbedConv3d,
    nn.ConvTranspose1d: PerturbedConvTranspose1d,
    nn.ConvTranspose2d: PerturbedConvTranspose2d,
    nn.ConvTranspose3d: PerturbedConvTranspose3d,
    nn.Embedding: PerturbedEmbedding,
    Affine: PerturbedAffine,
    nn.LayerNorm: PerturbedLayerNorm,
    nn.RMSNorm: PerturbedRMSNorm,
    nn.GroupNorm: PerturbedGroupNorm,
    nn.BatchNorm1d: PerturbedBatchNorm1d,
    nn.BatchNorm2d: PerturbedBatchNorm2d,
    nn.BatchNorm3d: PerturbedBatchNorm3d,
    nn.MultiheadAttention: PerturbedMultiheadAttention,
    NonDynamicallyQuantizableLinear: PerturbedLinear,  # the attention's out_proj
    nn.RNN: PerturbedRNN,
    nn.GRU: PerturbedGRU,
    nn.LSTM: PerturbedLSTM,
    nn.RNNCell: PerturbedRNNCell,
    nn.GRUCell: PerturbedGRUCell,
    nn.LSTMCell: PerturbedLSTMCell,
    "transformers.pytorch_utils.Conv1D": PerturbedTransposedLinear,
    "*RMSNorm": PerturbedLibraryNorm,
    "transformers.*T5LayerNorm": PerturbedLibraryNorm,
}


def register_twin(
    torch_class: type[nn.Module] | str, perturbed_class: type[PerturbedLayer]
) -> None:
    """Teach :func:`perturbed.convert` a class of layers, or replace what it knows of one.

    Conversion changes an instance's class to ``perturbed_class`` and calls its ``init_noise``;
    ``revert`` restores the class that it had. Register a subclass of a torch layer whose forward
    is the torch layer's with that layer's own twin.

    Args:
        torch_class: the class, for exactly its instances; or a pattern of
            "module.QualifiedName", for classes of a library that need not be installed.
        perturbed_class: a :class:`~perturbed.nn.PerturbedLayer` that works with the attributes
            of ``torch_class``.

    Raises:
        TypeError: no module class or pattern, or no class of perturbed layers.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> class Dense(nn.Linear):
        ...     "A Linear under another name."
        >>> perturbed.register_twin(Dense, perturbed.PerturbedLinear)
        >>> net = perturbed.convert(nn.Sequential(Dense(8, 4)), directions=16)
        >>> type(net[0]).__name__, type(perturbed.revert(net)[0]).__name__
        ('PerturbedLinear', 'Dense')
    """
    if not isinstance(torch_class, str):
        if not isinstance(torch_class, type) or not issubclass(torch_class, nn.Module):
            raise TypeError(
                f"torch_class must be an nn.Module class or a name, got {torch_class!r}"
            )
        if issubclass(torch_class, PerturbedLayer):
            raise TypeError(
                f"torch_class must not be perturbed already, got {torch_class.__name__}"
            )
    if not isinstance(perturbed_class, type) or not issubclass(perturbed_class, PerturbedLayer):
        raise TypeError(f"perturbed_class must be a PerturbedLayer class, got {perturbed_class!r}")
    TWINS[torch_class] = perturbed_class


def qualified_name(cls: type) -> str:
    """Return "module.QualifiedName" of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_twin(cls: type[nn.Module]) -> type[PerturbedLayer] | None:
    """Return the perturbed twin of a class of modules, None if it has none."""
    if cls in TWINS:
        return TWINS[cls]
    name = qualified_name(cls)
    patterns = ((key, twin) for key, twin in TWINS.items() if isinstance(key, str))
    return next((twin for key, twin in patterns if fnmatchcase(name, key)), None)


def why_no_twin(cls: type[nn.Module]) -> str:
    """Say why a class without a twin has none."""
    for parent in cls.__mro__[1:]:
        twin = find_twin(parent)
        if twin is not None:
            return f"subclass of {parent.__name__}; see register_twin"
    return "no perturbed version"


def is_quantised(module: nn.Module) -> bool:
    """Whether a module keeps its weights packed or as integers."""
    names = [qualified_name(cls) for cls in type(module).__mro__]
    if any(n.startswith("torch.ao.nn.") and ".quantized." in n for n in names):
        return True
    related = any(find_twin(cls) for cls in type(module).__mro__ if issubclass(cls, nn.Module))
    return related and any(
        not (p.is_floating_point() or p.is_complex())
        for p in module._parameters.values()
        if p is not None
    )
