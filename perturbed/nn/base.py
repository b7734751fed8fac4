"""What all perturbed layers share: a family, a number of directions, and a place in a draw."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..noise import Dense, NoiseFamily, NoiseState
from ..noise.base import STREAM_BIAS, STREAM_WEIGHT, LayerNoise, matrix_shape, stream_word
from ..noise.state import check_directions


class PerturbedLayer(nn.Module):
    """Mixin of a torch layer whose rows can each see their own weights.

    Outside :meth:`perturbed.PerturbedModel.perturbed` such a layer is its torch parent, with the
    same parameters, initialisation, ``state_dict`` and hooks.

    Attributes:
        directions: D, the number of independent noise draws.
        noise: the noise family.
        site: where its noise lives; given by the :class:`~perturbed.PerturbedModel` that wraps it.
        torch_class: the torch layer that it perturbs (class attribute).
    """

    torch_class: ClassVar[type[nn.Module]]
    weight: Tensor
    directions: int
    noise: NoiseFamily
    site: LayerNoise | None

    def init_noise(self, directions: int, noise: NoiseFamily | None) -> None:
        """Check and store the layer's own settings; the weights are untouched."""
        directions, noise = check_directions(directions), check_family(noise)
        noise.check(*matrix_shape(self.weight), directions)
        self.directions = directions
        self.noise = noise
        self.site = None

    def attach(self, state: NoiseState, weight_id: int | None, bias_id: int | None) -> None:
        """Join a draw; an id of None leaves that parameter unperturbed."""
        if self.site is None or self.site.state is not state:
            self.release()
            self.site = LayerNoise(state)
        self.site.weight = -1 if weight_id is None else stream_word(weight_id, STREAM_WEIGHT)
        self.site.bias = -1 if bias_id is None else stream_word(bias_id, STREAM_BIAS)

    def release(self) -> None:
        """Leave the draw, if any, and mark it as one that a layer has left."""
        if self.site is not None:
            self.site.state.released = True
        self.site = None

    @property
    def is_perturbed(self) -> bool:
        """Whether the next forward adds noise."""
        return self.site is not None and self.site.state.active

    def perturbed_parameters(self) -> dict[str, tuple[nn.Parameter, int]]:
        """Name -> (parameter, counter word) of the parameters that this layer perturbs."""
        found: dict[str, tuple[nn.Parameter, int]] = {}
        if self.site is not None:
            for name, stream in (("weight", self.site.weight), ("bias", self.site.bias)):
                if stream >= 0:
                    found[name] = getattr(self, name), stream
        return found

    def parameter_noise(self, name: str, first: int, count: int) -> Tensor:
        """E_d of a parameter without sigma, for ``count`` directions: (count, *parameter.shape)."""
        assert self.site is not None
        parameter, stream = self.perturbed_parameters()[name]
        rows, cols = matrix_shape(parameter)
        noise = self.noise.materialise(
            self.site, stream, first, count, rows, cols, parameter.detach()
        )
        return noise.view(count, *parameter.shape)

    def add_estimate(self, name: str, grad: Tensor, weights: Tensor, accumulate: bool) -> None:
        """Write or add ``sum_d weights[d] E_d`` to a contiguous gradient of a parameter."""
        assert self.site is not None
        parameter, stream = self.perturbed_parameters()[name]
        matrix = grad.view(matrix_shape(parameter))
        self.noise.estimate_(matrix, weights, self.site, stream, accumulate)

    def extra_repr(self) -> str:
        """Append directions and family to the torch layer's description."""
        return f"{super().extra_repr()}, directions={self.directions}, noise={self.noise}"


def check_family(noise: NoiseFamily | None) -> NoiseFamily:
    """Return ``noise`` if it is a noise family, the default one for None."""
    if noise is not None and not isinstance(noise, NoiseFamily):
        raise TypeError(f"noise must be a noise family such as Dense(), got {noise!r}")
    return Dense() if noise is None else noise
