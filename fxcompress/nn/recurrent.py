"""Recurrent layers of `torch.nn` whose weights are operands, activations rounded at run time.

In `lstm(x, hx, w_ih, w_hh, …)` the matrices come from the graph, two for each layer and direction
in the order of the parameters (`weight_ih_l0`, `weight_hh_l0`, `weight_ih_l0_reverse`, …). The
layer keeps its parameters under their own names, as the operand layers of `fxcompress.nn.operand`.

What a matrix multiplies is rounded inside the layer, as onnxruntime's DynamicQuantizeLSTM does it
in one thread: the input of each stacked layer with one range over batch and time, the hidden state
of an LSTM anew at each step with one range over the batch. The cell state and the functions of the
gates stay in float. No runtime computes the recurrence of a GRU or a plain RNN in integers: their
hidden state stays in float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn.dynamic_quantize import DynamicQuantize

__all__ = ["OperandGRU", "OperandLSTM", "OperandRNN", "take_weights_as_operands"]

_States = tuple[Tensor, ...]


class _OperandRecurrent(nn.RNNBase, ABC):
    """What the three share: layouts, layers and initial states.

    Attributes:
        bits: Width of the integers that activations are rounded to.
    """

    bits: int

    def forward(self, input: Tensor, hx: Any = None, *weights: Tensor) -> Any:
        """Return what the stock layer would for these weights: output and last state.

        Args:
            input: `[time, batch, features]`, `[batch, time, features]` with `batch_first`, or
                `[time, features]`.
            hx: The initial state, `[layers × directions, batch, hidden]`, with the cell state for
                an LSTM; zeros when None.
            weights: Input and hidden matrix of each layer and direction.
        """
        batched = input.dim() == 3
        time_first = not batched or not self.batch_first
        x = input if batched else input.unsqueeze(1)
        x = x if time_first else x.transpose(0, 1)
        states = self._initial(x, hx, batched)
        lasts: list[_States] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            here = slice(layer * directions, (layer + 1) * directions)
            matrices = weights[2 * here.start : 2 * here.stop]
            x, last = self._layer(
                self._rounded(x), tuple(s[here] for s in states), matrices, self._biases(layer)
            )
            lasts.append(last)
        final = [torch.cat(parts) for parts in zip(*lasts, strict=True)]
        if not batched:
            x, final = x.squeeze(1), [state.squeeze(1) for state in final]
        elif not time_first:
            x = x.transpose(0, 1)
        return x, tuple(final) if len(final) > 1 else final[0]

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{super().extra_repr()}, bits={self.bits}"

    def _rounded(self, x: Tensor) -> Tensor:
        return cast(Tensor, DynamicQuantize(self.bits, per="tensor")(x))

    def _initial(self, x: Tensor, hx: Any, batched: bool) -> _States:
        count = 2 if self.mode == "LSTM" else 1
        if hx is None:
            depth = self.num_layers * (2 if self.bidirectional else 1)
            zeros = x.new_zeros(depth, x.shape[1], self.hidden_size)
            return (zeros,) * count
        states = tuple(hx) if count == 2 else (hx,)
        return states if batched else tuple(state.unsqueeze(1) for state in states)

    def _biases(self, layer: int) -> list[Tensor]:
        if not self.bias:
            return []
        suffixes = [f"l{layer}", f"l{layer}_reverse"][: 2 if self.bidirectional else 1]
        return [getattr(self, f"{name}_{s}") for s in suffixes for name in ("bias_ih", "bias_hh")]

    @abstractmethod
    def _layer(
        self, x: Tensor, states: _States, weights: tuple[Tensor, ...], biases: list[Tensor]
    ) -> tuple[Tensor, _States]:
        """Run one layer, all directions, on a rounded `[time, batch, features]`."""


class _Gated(_OperandRecurrent):
    """What LSTM and GRU share: their arguments.

    Args:
        input_size: Features of the input.
        hidden_size: Width of the state.
        num_layers: Stacked layers.
        bias: Whether gates have biases.
        batch_first: The input is `[batch, time, features]`.
        dropout: Between layers, in training.
        bidirectional: Also run backwards.
        bits: Width of the integers that activations are rounded to.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        bits: int = 8,
    ) -> None:
        # What comes next in line is nn.LSTM or nn.GRU, not the base that both extend.
        stock: Any = super().__init__
        stock(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        self.bits = bits


class OperandLSTM(_Gated, nn.LSTM):  # type: ignore[misc]
    """`nn.LSTM` with the matrices as operands; input and hidden state are rounded."""

    def _layer(
        self, x: Tensor, states: _States, weights: tuple[Tensor, ...], biases: list[Tensor]
    ) -> tuple[Tensor, _States]:
        outputs, hidden, cells = [], [], []
        for i in range(len(weights) // 2):
            bias = biases[2 * i] + biases[2 * i + 1] if biases else None
            gates = F.linear(x, weights[2 * i], bias)
            gates = gates.flip(0) if i else gates
            y, h, c = self._recur(gates, states[0][i], states[1][i], weights[2 * i + 1])
            outputs.append(y.flip(0) if i else y)
            hidden.append(h)
            cells.append(c)
        return torch.cat(outputs, -1), (torch.stack(hidden), torch.stack(cells))

    def _recur(
        self, gates: Tensor, h: Tensor, c: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all steps of one direction; `gates` is `[time, batch, 4 · hidden]`."""
        outputs = []
        for step in gates.unbind(0):
            h, c = self._step(step, h, c, weight)
            outputs.append(h)
        return torch.stack(outputs), h, c

    def _step(self, gates: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gates + F.linear(self._rounded(h), weight)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class OperandGRU(_Gated, nn.GRU):  # type: ignore[misc]
    """`nn.GRU` with the matrices as operands; the input of each layer is rounded."""

    def _layer(
        self, x: Tensor, states: _States, weights: tuple[Tensor, ...], biases: list[Tensor]
    ) -> tuple[Tensor, _States]:
        return _stock(torch._VF.gru, self, x, states, weights, biases)


class OperandRNN(_OperandRecurrent, nn.RNN):  # type: ignore[misc]
    """`nn.RNN` with the matrices as operands; the input of each layer is rounded.

    Args:
        input_size: Features of the input.
        hidden_size: Width of the state.
        num_layers: Stacked layers.
        nonlinearity: `tanh` or `relu`.
        bias: Whether there are biases.
        batch_first: The input is `[batch, time, features]`.
        dropout: Between layers, in training.
        bidirectional: Also run backwards.
        bits: Width of the integers that activations are rounded to.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        bits: int = 8,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional,
        )  # fmt: skip
        self.bits = bits

    def _layer(
        self, x: Tensor, states: _States, weights: tuple[Tensor, ...], biases: list[Tensor]
    ) -> tuple[Tensor, _States]:
        function = torch._VF.rnn_relu if self.nonlinearity == "relu" else torch._VF.rnn_tanh
        return _stock(function, self, x, states, weights, biases)


def _stock(
    function: Any,
    layer: _OperandRecurrent,
    x: Tensor,
    states: _States,
    weights: tuple[Tensor, ...],
    biases: list[Tensor],
) -> tuple[Tensor, _States]:
    """Run one layer by torch's own kernel."""
    flat: list[Tensor] = []
    for i in range(len(weights) // 2):
        flat += [*weights[2 * i : 2 * i + 2], *biases[2 * i : 2 * i + 2]]
    y, last = function(x, states[0], flat, bool(biases), 1, 0.0, False, layer.bidirectional, False)
    return y, (last,)


_FORMS: tuple[tuple[type[nn.RNNBase], type[_OperandRecurrent]], ...] = (
    (nn.LSTM, OperandLSTM),
    (nn.GRU, OperandGRU),
    (nn.RNN, OperandRNN),
)


def take_weights_as_operands(layer: nn.Module, bits: int = 8) -> _OperandRecurrent:
    """Return the operand form of a recurrent layer, with the same parameter objects and settings.

    Raises:
        UsageError: The layer has no such form.
    """
    made = next((form for stock, form in _FORMS if type(layer) is stock), None)
    if made is None:
        raise UsageError(
            f"{type(layer).__name__} cannot take its weights as operands",
            reason=f"the layers that can are {', '.join(s.__name__ for s, _ in _FORMS)}",
        )
    if getattr(layer, "proj_size", 0):
        raise UsageError(
            "an LSTM with projections cannot take its weights as operands",
            reason="no runtime has a kernel in integers for it",
        )
    found = made.__new__(made)
    found.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set, list)) else value
        for key, value in layer.__dict__.items()
    }
    found.bits = bits
    return found
