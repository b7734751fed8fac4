"""Perturbed recurrent cells: one step of an RNN, a GRU or an LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..noise import NoiseFamily
from .base import PerturbedLayer, Slot, check_float
from .recurrence import State, advance, check_state


class PerturbedCell(PerturbedLayer, nn.RNNCellBase):
    """What the perturbed RNN, GRU and LSTM cells share: one step of (B, in) rows."""

    def slots(self) -> list[Slot]:
        """Return the input and the hidden weight. See :meth:`PerturbedLayer.slots`."""
        return [("weight_ih", "bias_ih"), ("weight_hh", "bias_hh")]

    def mode(self) -> str:
        """Return the name that torch's layers have for what the cell does with its products."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Apply the cell, perturbed if its model says so."""
        if not self.is_perturbed:
            return super().forward(input, hx)
        state = self._step(input, hx)
        return state if len(state) > 1 else state[0]

    def _step(self, input: Tensor, hx: Any) -> State:
        check_float(input)
        if input.dim() != 2 or input.shape[1] != self.input_size:
            raise ValueError(
                f"input must be (B, {self.input_size}) with B = R * D rows, got "
                f"{tuple(input.shape)}; give a single row its dimension by input.unsqueeze(0)"
            )
        rows, short = self.enter(input)
        self.allocate()
        input_site, hidden_site = self.sites
        gates = self.noise.linear(rows, self.weight_ih, self.bias_ih, input_site, short)
        shape, mode = (gates.shape[0], self.hidden_size), self.mode()
        one_for_all = self.site.state.rows_of(1) == shape[0]
        state = check_state(hx, [shape] * (2 if mode == "LSTM" else 1), rows, one_for_all)
        state = tuple(s.to(gates.dtype) for s in state)  # autocast
        recurrent = self.noise.linear(state[0], self.weight_hh, self.bias_hh, hidden_site)
        return advance(mode, gates, recurrent, state)


class PerturbedRNNCell(PerturbedCell, nn.RNNCell):
    """One step of an Elman network (1990) in which every row has its own weights.

    Row b computes ``tanh((W + s E_d) x + (V + s F_d) h + biases)``. Without noise it is
    ``nn.RNNCell``.

    Args:
        input_size: features of the input.
        hidden_size: H.
        directions: D.
        bias, nonlinearity: as in nn.RNNCell.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.RNNCell.

    Shapes:
        input (B, input_size), hx (B, H), output (B, H); B = R * D rows.

    Raises:
        ValueError: a family whose options do not fit a weight; in the forward, input without a row
            dimension, features or hx that do not fit, rows that are no multiple of D.
        TypeError: an input that is not floating point, an hx that is no tensor.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedModel, PerturbedRNNCell
        >>> pm = PerturbedModel(PerturbedRNNCell(8, 4, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 8)).shape
        torch.Size([32, 4])
    """

    torch_class = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.RNNCell does; the noise comes with the model that wraps it."""
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.mode()
        self.init_noise(directions, noise)

    def mode(self) -> str:
        """See :meth:`PerturbedCell.mode`."""
        if self.nonlinearity not in ("tanh", "relu"):  # torch's cell says so at its first call
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")
        return f"RNN_{self.nonlinearity.upper()}"


class PerturbedGRUCell(PerturbedCell, nn.GRUCell):
    """One step of a GRU (Cho et al., 2014) in which every row has its own weights.

    Without noise it is ``nn.GRUCell``.

    Args:
        input_size: features of the input.
        hidden_size: H.
        directions: D.
        bias: as in nn.GRUCell.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.GRUCell.

    Shapes:
        as :class:`PerturbedRNNCell`.

    Raises:
        as :class:`PerturbedRNNCell`.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedGRUCell, PerturbedModel
        >>> pm = PerturbedModel(PerturbedGRUCell(8, 4, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 8), torch.zeros(32, 4)).shape
        torch.Size([32, 4])
    """

    torch_class = nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        bias: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.GRUCell does; the noise comes with the model that wraps it."""
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.init_noise(directions, noise)

    def mode(self) -> str:
        """See :meth:`PerturbedCell.mode`."""
        return "GRU"


class PerturbedLSTMCell(PerturbedCell, nn.LSTMCell):
    """One step of an LSTM (Hochreiter and Schmidhuber, 1997) with each row's own weights.

    Without noise it is ``nn.LSTMCell``.

    Args:
        input_size: features of the input.
        hidden_size: H.
        directions: D.
        bias: as in nn.LSTMCell.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.LSTMCell.

    Shapes:
        as :class:`PerturbedRNNCell`; hx and the output are pairs (h, c) of (B, H) tensors.

    Raises:
        as :class:`PerturbedRNNCell`.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedLSTMCell, PerturbedModel
        >>> pm = PerturbedModel(PerturbedLSTMCell(8, 4, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> hidden, cell = pm(torch.ones(32, 8))
        >>> hidden.shape, cell.shape
        (torch.Size([32, 4]), torch.Size([32, 4]))
    """

    torch_class = nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        bias: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.LSTMCell does; the noise comes with the model that wraps it."""
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.init_noise(directions, noise)

    def mode(self) -> str:
        """See :meth:`PerturbedCell.mode`."""
        return "LSTM"
