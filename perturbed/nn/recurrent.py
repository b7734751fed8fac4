"""Perturbed recurrent layers: RNN, GRU and LSTM, whole sequences and single cells.

The input products of all steps are one product, in which every direction's noise is drawn once. The
hidden product is made step by step, and draws its noise again in every step: with dense noise that
is most of the work. :class:`~perturbed.LowRank` draws little, and ``Dense(storage="stored")`` draws
once per ``set_noise``.

``torch.compile`` takes them, as it does torch's, with ``torch._dynamo.config.allow_rnn`` alone, and
unrolls the steps. A PackedSequence that was packed with ``enforce_sorted=True`` does not say how
many rows it has: ``pm(packed)`` refuses it, ``with pm.perturbed(): model(packed)`` and models that
pack inside are fine.
"""

from __future__ import annotations

import torch
from torch import nn

from ..noise import NoiseFamily
from .recurrence import PerturbedRecurrence


class PerturbedRNN(PerturbedRecurrence, nn.RNN):
    """An Elman network (1990) that evaluates a population: every row has its own weights.

    Row b runs through ``h_t = tanh((W + s E_d) x_t + (V + s F_d) h_{t-1} + biases)`` with noise of
    its own in every weight and bias, the same in all steps. Without noise it is ``nn.RNN``.

    Dense noise of the hidden product is drawn again in every step; see the module's docstring.

    Args:
        input_size: features of a step.
        hidden_size: H.
        directions: D.
        num_layers, nonlinearity, bias, batch_first, dropout, bidirectional: as in nn.RNN; dropout
            takes torch's random numbers.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.RNN.

    Shapes:
        input (B, T, input_size) if ``batch_first``, else (T, B, input_size); B = R * D rows. Or a
        PackedSequence of B sequences. hx (layers, B, H), layers counting both directions.
        output as the input, with H features per direction; hidden state as hx.

    Raises:
        ValueError: a family whose options do not fit a weight; in the forward, input without a row
            dimension, features or hx that do not fit, rows that are no multiple of D.
        TypeError: an input that is not floating point, an hx that is no tensor.

    Example:
        >>> import torch
        >>> from perturbed import LowRank, PerturbedModel, PerturbedRNN
        >>> layer = PerturbedRNN(8, 4, directions=16, batch_first=True, noise=LowRank(1))
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> output, hidden = pm(torch.ones(32, 5, 8))
        >>> output.shape, hidden.shape
        (torch.Size([32, 5, 4]), torch.Size([1, 32, 4]))
    """

    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.RNN does; the noise comes with the model that wraps it."""
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.init_noise(directions, noise)


class PerturbedGRU(PerturbedRecurrence, nn.GRU):
    """A GRU (Cho et al., 2014) that evaluates a population: every row has its own weights.

    Without noise it is ``nn.GRU``. Dense noise of the hidden product is drawn again in every step;
    see the module's docstring.

    Args:
        input_size: features of a step.
        hidden_size: H.
        directions: D.
        num_layers, bias, batch_first, dropout, bidirectional: as in nn.GRU.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.GRU.

    Shapes:
        as :class:`PerturbedRNN`.

    Raises:
        as :class:`PerturbedRNN`.

    Example:
        >>> import torch
        >>> from perturbed import Dense, PerturbedGRU, PerturbedModel
        >>> layer = PerturbedGRU(8, 4, directions=16, noise=Dense(storage="stored"))
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> with pm.perturbed():  # time steps come first, which pm(...) takes for the rows
        ...     output, hidden = layer(torch.ones(5, 32, 8))
        >>> output.shape, hidden.shape
        (torch.Size([5, 32, 4]), torch.Size([1, 32, 4]))
    """

    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.GRU does; the noise comes with the model that wraps it."""
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.init_noise(directions, noise)


class PerturbedLSTM(PerturbedRecurrence, nn.LSTM):
    """An LSTM (Hochreiter and Schmidhuber, 1997) in which every row has its own weights.

    Without noise it is ``nn.LSTM``. Dense noise of the hidden product is drawn again in every step;
    see the module's docstring.

    Args:
        input_size: features of a step.
        hidden_size: H.
        directions: D.
        num_layers, bias, batch_first, dropout, bidirectional, proj_size: as in nn.LSTM.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.LSTM.

    Shapes:
        as :class:`PerturbedRNN`; hx is a pair (h_0, c_0) of (layers, B, H) tensors, and so is the
        state that is returned. Where ``proj_size`` is given, h and the output have that many
        features instead of H.

    Raises:
        as :class:`PerturbedRNN`.

    Example:
        >>> import torch
        >>> from perturbed import LowRank, PerturbedLSTM, PerturbedModel
        >>> layer = PerturbedLSTM(8, 4, directions=16, batch_first=True, noise=LowRank(1))
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> output, (hidden, cell) = pm(torch.ones(32, 5, 8))
        >>> output.shape, cell.shape
        (torch.Size([32, 5, 4]), torch.Size([1, 32, 4]))
    """

    torch_class = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.LSTM does; the noise comes with the model that wraps it."""
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        self.init_noise(directions, noise)
