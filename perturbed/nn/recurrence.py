"""How perturbed recurrent layers evaluate their rows, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..noise.base import LayerNoise
from ..replicate import Replicated
from .base import PerturbedLayer, Slot, check_float

# Hidden state, and cell state of an LSTM.
State = tuple[Tensor, ...]


def advance(mode: str, gates: Tensor, recurrent: Tensor, state: State) -> State:
    """Return the next state of a recurrent layer, before an LSTM's projection.

    Args:
        mode: "RNN_TANH", "RNN_RELU", "GRU" or "LSTM", as in torch's layers.
        gates: (B, G) the input product with its bias; G = 4 H in an LSTM (input, forget, cell,
            output), 3 H in a GRU (reset, update, new), H in others.
        recurrent: (B, G) the hidden product with its bias.
        state: of the step before, (B, H) each.
    """
    if mode == "GRU":
        # Half the passes over memory of one operation at a time, which took a quarter of a step
        # (2,048 rows, 64 inputs, H = 192, LowRank(1), one thread of a CPU).
        size = state[0].shape[-1]
        both = (gates[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid_()
        reset, update = both.chunk(2, -1)
        new = torch.addcmul(gates[..., 2 * size :], reset, recurrent[..., 2 * size :]).tanh_()
        return (torch.lerp(new, state[0], update),)
    total = gates + recurrent
    if mode == "LSTM":
        enter, forget, fresh, leave = total.chunk(4, -1)
        cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(fresh)
        return torch.sigmoid(leave) * torch.tanh(cell), cell
    return (torch.tanh(total) if mode == "RNN_TANH" else torch.relu(total),)


def check_state(
    state: Any, shapes: Sequence[tuple[int, ...]], like: Tensor, one_for_all: bool
) -> State:
    r"""Return ``hx`` as a tuple of tensors of these shapes, zeros for None.

    Args:
        state: a tensor, or a pair of them where two shapes are given.
        shapes: of each, (\*, B, features).
        like: a tensor of the input's dtype and device.
        one_for_all: whether one row may stand for all B.
    """
    if state is None:
        return tuple(like.new_zeros(shape) for shape in shapes)
    tensors = state if isinstance(state, (tuple, list)) else (state,)
    if len(tensors) != len(shapes) or not all(isinstance(t, Tensor) for t in tensors):
        kind = "a tensor" if len(shapes) == 1 else "a pair of tensors (h_0, c_0)"
        raise TypeError(f"hx must be {kind} or None, got {type(state).__name__} {state!r:.60}")
    for tensor, shape in zip(tensors, shapes, strict=True):
        alike = one_for_all and tuple(tensor.shape) == (*shape[:-2], 1, shape[-1])
        if tuple(tensor.shape) != shape and not alike:
            raise ValueError(f"hx must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise ValueError(f"hx must have the input's dtype {like.dtype}, got {tensor.dtype}")
    full = (t.full() if isinstance(t, Replicated) else t for t in tensors)
    return tuple(t.expand(shape) for t, shape in zip(full, shapes, strict=True))


class PerturbedRecurrence(PerturbedLayer, nn.RNNBase):
    """What the perturbed RNN, GRU and LSTM share: the layers, directions and steps."""

    def slots(self) -> list[Slot]:
        """Return each layer's weights, in torch's order. See :meth:`PerturbedLayer.slots`."""
        slots: list[Slot] = []
        for names in self._all_weights:
            weights = [name for name in names if name.startswith("weight")]
            biases = [name for name in names if name.startswith("bias")]
            slots += [(w, biases[i] if i < len(biases) else None) for i, w in enumerate(weights)]
        return slots

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        batch = 0 if self.batch_first else 1
        check_float(input)
        if input.dim() != 3 or input.shape[2] != self.input_size:
            layout = "(B, T, {})" if self.batch_first else "(T, B, {})"
            raise ValueError(
                f"input must be {layout.format(self.input_size)} with B = R * D rows, got "
                f"{tuple(input.shape)}; give a single row its dimension by "
                f"input.unsqueeze({batch})"
            )
        output, state = self._evaluate(input if self.batch_first else input.transpose(0, 1), hx)
        return output if self.batch_first else output.transpose(0, 1), state

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Unpack, so that rows are in their order; sequences that have ended keep their state."""
        order = packed.sorted_indices
        input, lengths = pad_packed_sequence(packed, batch_first=True)
        check_float(input)
        steps = torch.arange(input.shape[1])
        live = (steps < lengths[:, None]).to(input.device)
        output, state = self._evaluate(input, hx, live)
        if order is not None:  # the very order of the packed input, for whoever reads its data
            output, lengths = output[order], lengths[order.to(lengths.device)]
        data, sizes = pack_padded_sequence(output, lengths, batch_first=True)[:2]
        return PackedSequence(data, sizes, order, packed.unsorted_indices), state

    def _evaluate(
        self, input: Tensor, hx: Any, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor | State]:
        """Evaluate (B, T, in) rows; ``live`` (B, T) says which steps there are, None for all.

        Returns:
            (B, T, directions * H) output, and the final state as torch returns it.
        """
        x, short = self.enter(input)
        self.allocate()
        batch = (x if short is None else short).shape[0]
        sides = 2 if self.bidirectional else 1
        shapes = [(self.num_layers * sides, batch, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            shapes.append((self.num_layers * sides, batch, self.hidden_size))
        first = check_state(hx, shapes, x, self.site.state.rows_of(1) == batch)
        chains = self._chains()
        finals: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for side in range(sides):
                state = tuple(s[len(finals)] for s in first)
                y, state = self._run(x, short, next(chains), state, live, side == 1)
                outputs.append(y)
                finals.append(state)
            x, short = torch.cat(outputs, -1) if sides == 2 else outputs[0], None
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        stacked = tuple(torch.stack(states) for states in zip(*finals, strict=True))
        return x, stacked if self.mode == "LSTM" else stacked[0]

    def _chains(self) -> Iterator[list[tuple[Tensor, Tensor | None, LayerNoise]]]:
        """Yield (weight, bias, site) of input, hidden and projection, layer by layer."""
        places = [
            (getattr(self, weight), getattr(self, bias) if bias else None, site)
            for (weight, bias), site in zip(self.slots(), self.sites, strict=True)
            if weight is not None
        ]
        each = 3 if self.proj_size > 0 else 2
        yield from (places[i : i + each] for i in range(0, len(places), each))

    def _run(
        self,
        x: Tensor,
        short: Replicated | None,
        chain: list[tuple[Tensor, Tensor | None, LayerNoise]],
        state: State,
        live: Tensor | None,
        backwards: bool,
    ) -> tuple[Tensor, State]:
        """Run one direction of one layer over (B, T, in); return its output and final state."""
        (w_input, b_input, input_site), (w_hidden, b_hidden, hidden_site) = chain[:2]
        gates = self.noise.linear(x, w_input, b_input, input_site, short)
        state = tuple(s.to(gates.dtype) for s in state)  # autocast
        steps = range(gates.shape[1])
        outputs = []
        for t in reversed(steps) if backwards else steps:
            recurrent = self.noise.linear(state[0], w_hidden, b_hidden, hidden_site)
            after = advance(self.mode, gates[:, t], recurrent, state)
            for weight, bias, site in chain[2:]:  # an LSTM's projection
                after = (self.noise.linear(after[0], weight, bias, site), *after[1:])
            if live is not None:
                here = live[:, t, None]
                after = tuple(torch.where(here, a, s) for a, s in zip(after, state, strict=True))
            state = after
            outputs.append(state[0])
        if not outputs:
            return gates.new_empty(gates.shape[0], 0, state[0].shape[1]), state
        return torch.stack(outputs[::-1] if backwards else outputs, 1), state
