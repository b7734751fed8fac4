"""What all perturbed layers share: a family, a number of directions, and a place in a draw."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..noise import Dense, NoiseFamily, NoiseState
from ..noise.base import STREAM_BIAS, STREAM_WEIGHT, LayerNoise, matrix_shape, stream_word
from ..noise.state import check_directions
from ..replicate import Replicated

# A weight and the bias that goes with it, by the names of the parameters; None if there is none.
# A vector that goes with no weight, or with several, is a bias without one.
Slot = tuple[str | None, str | None]


class PerturbedLayer(nn.Module):
    """Mixin of a torch layer whose rows can each see their own weights.

    Outside :meth:`perturbed.PerturbedModel.perturbed` such a layer is its torch parent, with the
    same parameters, initialisation, ``state_dict`` and hooks.

    Attributes:
        directions: D, the number of independent noise draws.
        noise: the noise family.
        sites: where the noise of each slot lives; given by the :class:`~perturbed.PerturbedModel`
            that wraps the layer, empty until then.
        torch_class: the torch layer that it perturbs (class attribute).
        original_class: the class that ``convert`` found; None if the layer was made perturbed.
        noise_attributes: what ``init_noise`` adds to an instance and ``revert`` removes (class
            attribute).
    """

    torch_class: ClassVar[type[nn.Module]]
    noise_attributes: ClassVar[tuple[str, ...]] = ("directions", "noise", "sites", "original_class")
    original_class: type[nn.Module] | None = None
    directions: int
    noise: NoiseFamily
    sites: list[LayerNoise]

    def init_noise(self, directions: int, noise: NoiseFamily | None) -> None:
        """Check and store the layer's own settings; the weights are untouched."""
        directions, noise = check_directions(directions), self.layer_family(check_family(noise))
        self.check_noise(directions, noise)
        self.directions = directions
        self.noise = noise
        self.sites = []

    # ---- what a kind of layer may override -----------------------------------------------------

    @classmethod
    def why_not_convertible(cls, module: nn.Module) -> str | None:
        """Say why ``module``, of the torch class, cannot be converted; None if it can."""
        return None

    def slots(self) -> list[Slot]:
        """Return the layer's weights with their biases; each slot has an id in the contract."""
        return [("weight", "bias")]

    def fixed_row(self, name: str) -> int | None:
        """Return a row of a weight that has no noise for all that this layer needs, if any.

        Where all layers that use the weight agree, their ``site.fixed_row`` says so.
        """
        return None

    @classmethod
    def layer_family(cls, noise: NoiseFamily) -> NoiseFamily:
        """Return the family that this kind of layer uses where ``noise`` is asked for."""
        return noise

    def make_site(self, state: NoiseState, slot: Slot) -> LayerNoise:
        """Return an empty place in a draw; convolutions say how their columns are made up."""
        return LayerNoise(state)

    # ---- the draw ------------------------------------------------------------------------------

    def check_noise(self, directions: int, noise: NoiseFamily) -> None:
        """Raise ValueError if the family does not fit the size of a weight."""
        for name, _ in self.slots():
            if name is not None:
                noise.check(*matrix_shape(getattr(self, name)), directions)

    def attach(self, state: NoiseState, ids: list[tuple[int | None, int | None]]) -> None:
        """Join a draw with the ids of each slot's weight and bias; None leaves it unperturbed."""
        if not self.sites or self.sites[0].state is not state:
            self.release()
            self.sites = [self.make_site(state, slot) for slot in self.slots()]
        for site, (weight_id, bias_id) in zip(self.sites, ids, strict=True):
            site.weight = -1 if weight_id is None else stream_word(weight_id, STREAM_WEIGHT)
            site.bias = -1 if bias_id is None else stream_word(bias_id, STREAM_BIAS)

    def release(self) -> None:
        """Leave the draw, if any, and mark it as one that a layer has left."""
        if self.sites:
            self.sites[0].state.released = True
        self.sites = []

    @property
    def site(self) -> LayerNoise:
        """Where the noise of the first slot lives."""
        return self.sites[0]

    @property
    def is_perturbed(self) -> bool:
        """Whether the next forward adds noise."""
        return bool(self.sites) and self.sites[0].state.active

    def enter(self, input: Tensor) -> tuple[Tensor, Replicated | None]:
        """Check the input of a perturbed forward, (B, ...), and take the short form of replicates.

        An input of one row in a forward of B rows, such as the positions of a transformer, is the
        same for all members and stands for B rows.

        Returns:
            The rows to work on, and the Replicated they came from if they are its N rows.
        """
        state = self.site.state
        short = input if isinstance(input, Replicated) else None
        if short is not None and short.directions == state.population != state.directions:
            raise ValueError(
                f"the rows were replicated for D = {state.population} directions, but this forward "
                f"evaluates {state.directions} of them: call pm.replicate where pm is called, "
                "inside the closure"
            )
        batch = state.rows_of(input.shape[0])
        if batch != input.shape[0]:
            input = input.expand(batch, *input.shape[1:])
            short = input if isinstance(input, Replicated) else None
        state.enter_layer(batch)
        if short is not None and short.directions != state.directions:
            return short.full(), None
        return (input if short is None else short.source), short

    # ---- parameters ----------------------------------------------------------------------------

    def perturbed_parameters(self) -> dict[str, tuple[nn.Parameter, int]]:
        """Name -> (parameter, counter word) of the parameters that this layer perturbs."""
        found: dict[str, tuple[nn.Parameter, int]] = {}
        for (weight, bias), site in zip(self.slots(), self.sites, strict=False):
            for name, stream in ((weight, site.weight), (bias, site.bias)):
                if name is not None and stream >= 0:
                    found[name] = getattr(self, name), stream
        return found

    def place_of(self, name: str) -> tuple[LayerNoise, int]:
        """Where the noise of a parameter lives, and its counter word; -1 if it has none."""
        for (weight, bias), site in zip(self.slots(), self.sites, strict=True):
            if name == weight:
                return site, site.weight
            if name == bias:
                return site, site.bias
        raise KeyError(name)

    def parameter_noise(self, name: str, first: int, count: int) -> Tensor:
        """E_d of a parameter without sigma, for ``count`` directions: (count, *parameter.shape)."""
        site, stream = self.place_of(name)
        parameter = getattr(self, name)
        rows, cols = matrix_shape(parameter)
        noise = self.noise.materialise(site, stream, first, count, rows, cols, parameter.detach())
        return noise.view(count, *parameter.shape)

    def member_matrices(self, name: str, members: Tensor) -> Tensor:
        """View members' values of a parameter, (D, *parameter.shape), as (D, rows, cols) matrices.

        Raises:
            RuntimeError: strides within a member that no such view has.
        """
        return members.view(len(members), *matrix_shape(getattr(self, name)))

    def add_estimate(self, name: str, grad: Tensor, weights: Tensor, accumulate: bool) -> None:
        """Write or add ``sum_d weights[d] E_d`` to a contiguous gradient of a parameter."""
        site, stream = self.place_of(name)
        matrix = grad.view(matrix_shape(grad))
        self.noise.estimate_(matrix, weights, site, stream, accumulate)

    # ---- memory --------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Hold what the family holds between draws, if anything."""
        for (weight, _), site in zip(self.slots(), self.sites, strict=False):
            if weight is not None:
                self.noise.allocate(getattr(self, weight).detach(), site)

    def held_bytes(self) -> int:
        """Bytes of noise held for this layer."""
        return sum(self.noise.held_bytes(site) for site in self.sites)

    def extra_repr(self) -> str:
        """Append directions and family to the torch layer's description."""
        parts = [super().extra_repr(), f"directions={self.directions}", f"noise={self.noise}"]
        return ", ".join(part for part in parts if part)


def check_family(noise: NoiseFamily | None) -> NoiseFamily:
    """Return ``noise`` if it is a noise family, the default one for None."""
    if noise is not None and not isinstance(noise, NoiseFamily):
        raise TypeError(f"noise must be a noise family such as Dense(), got {noise!r}")
    return Dense() if noise is None else noise


def check_float(input: Tensor) -> None:
    """Raise TypeError for an input that is not floating point."""
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
