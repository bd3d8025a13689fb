"""Recurrent layers whose matrices are integers, for export: to ONNX, and to plain torch."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from fxcompress.emit._dynamic_ops import dynamic_ops
from fxcompress.nn import OperandGRU, OperandLSTM, OperandRNN

__all__ = ["RECURRENT", "FloatRecurrent", "IntegerRecurrent", "ScannedLSTM"]

RECURRENT: Final = (OperandLSTM, OperandGRU, OperandRNN)

# Where ONNX has the gates that torch stacks: i f g o -> i o f g, r z n -> z r n.
_GATES: Final = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


class IntegerRecurrent(nn.Module):
    """A recurrent layer with its matrices as int8, in the layout of ONNX.

    Args:
        layer: The operand layer.
        stored: Integers and scales (one per row) of each matrix, in the order of the operands.
        rounded: Round the inputs too, as onnxruntime's kernel does; else an operator of ONNX reads
            them as they are, and what the integers stand for.
    """

    def __init__(
        self, layer: Any, stored: list[tuple[Tensor, Tensor]], *, rounded: bool = True
    ) -> None:
        super().__init__()
        self.rounded = rounded
        kind = type(layer).__name__.removeprefix("Operand")
        self.kind = f"{kind}_{layer.nonlinearity}" if kind == "RNN" else kind
        self.layers, self.hidden = layer.num_layers, layer.hidden_size
        self.directions = 2 if layer.bidirectional else 1
        self.batch_first = layer.batch_first
        self.order = _GATES[kind]
        for i in range(self.layers):
            here = stored[2 * i * self.directions : 2 * (i + 1) * self.directions]
            for name, matrices in (("w", here[::2]), ("r", here[1::2])):
                integers = torch.stack([self._gates(each) for each, _ in matrices])
                # The kernel of the LSTM multiplies from the left.
                integers = integers.transpose(1, 2) if kind == "LSTM" and rounded else integers
                self.register_buffer(f"{name}{i}", integers.contiguous())
                scales = torch.stack([self._gates(scale) for _, scale in matrices])
                self.register_buffer(f"{name}{i}_scale", scales)
            biases = layer._biases(i)
            pairs = [
                torch.cat([self._gates(b.detach().float()) for b in biases[2 * d : 2 * d + 2]])
                for d in range(self.directions if biases else 0)
            ]
            self.register_buffer(f"bias{i}", torch.stack(pairs) if pairs else None)

    def _gates(self, rows: Tensor) -> Tensor:
        """Return stacked gates in the order of ONNX."""
        parts = rows.chunk(len(self.order))
        return torch.cat([parts[gate] for gate in self.order])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return output and last state, as the operand layer does."""
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        states = self._initial(x, hx, batched)
        lasts = []
        for i in range(self.layers):
            here = slice(i * self.directions, (i + 1) * self.directions)
            y, *last = self._layer(i, x, [state[here] for state in states])
            # [time, directions, batch, hidden] -> [time, batch, directions · hidden]
            x = y.squeeze(1) if self.directions == 1 else y.transpose(1, 2).flatten(2)
            lasts.append(last)
        final = [torch.cat(parts) for parts in zip(*lasts, strict=True)]
        if not batched:
            x, final = x.squeeze(1), [state.squeeze(1) for state in final]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, tuple(final) if len(final) > 1 else final[0]

    def _initial(self, x: Tensor, hx: Any, batched: bool) -> list[Tensor]:
        count = 2 if self.kind == "LSTM" else 1
        if hx is None:
            zeros = x.new_zeros(self.layers * self.directions, x.shape[1], self.hidden)
            return [zeros] * count
        states = list(hx) if count == 2 else [hx]
        return states if batched else [state.unsqueeze(1) for state in states]

    def _layer(self, i: int, x: Tensor, states: list[Tensor]) -> Any:
        names = (f"w{i}", f"r{i}", f"bias{i}", f"w{i}_scale", f"r{i}_scale")
        tensors = [getattr(self, name) for name in names]
        if not self.rounded:
            return self._in_float(x, states, *tensors)
        if self.kind == "LSTM":
            return self._lstm(x, *states, *tensors)
        rounded = dynamic_ops().dynamic_quantize(x, 8, False, False)
        return dynamic_ops().stored_recurrence(*rounded, *states, *tensors, self.kind)

    def _lstm(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        w: Tensor,
        r: Tensor,
        bias: Tensor | None,
        w_scale: Tensor,
        r_scale: Tensor,
    ) -> Any:
        zeros = torch.zeros_like(w_scale, dtype=torch.int8)
        return torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::DynamicQuantizeLSTM",
            [x, w, r, bias, None, h, c, None, w_scale, zeros, r_scale, zeros],
            {
                "direction": "bidirectional" if self.directions == 2 else "forward",
                "hidden_size": self.hidden,
            },
            dtypes=(torch.float32,) * 3,
            shapes=([x.shape[0], self.directions, x.shape[1], self.hidden], h.shape, c.shape),
            version=1,
        )

    def _in_float(
        self,
        x: Tensor,
        states: list[Tensor],
        w: Tensor,
        r: Tensor,
        bias: Tensor | None,
        w_scale: Tensor,
        r_scale: Tensor,
    ) -> Any:
        name, _, nonlinearity = self.kind.partition("_")
        attributes: dict[str, Any] = {
            "direction": "bidirectional" if self.directions == 2 else "forward",
            "hidden_size": self.hidden,
        }
        if name == "GRU":
            attributes["linear_before_reset"] = 1
        if name == "RNN":
            attributes["activations"] = [nonlinearity.capitalize()] * self.directions
        matrices = [m.float() * s.unsqueeze(-1) for m, s in ((w, w_scale), (r, r_scale))]
        return torch.onnx.ops.symbolic_multi_out(
            name,
            [x, *matrices, bias, None, *states],
            attributes,
            dtypes=(torch.float32,) * (1 + len(states)),
            shapes=(
                [x.shape[0], self.directions, x.shape[1], self.hidden],
                *(state.shape for state in states),
            ),
            version=14,
        )


class FloatRecurrent(nn.Module):
    """An operand layer in torch's own operator, its input not rounded: for any length and batch."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # The graph reads the matrices where they are: at the path of the layer.
        self._parameters = dict(layer._parameters)
        self.kind, self.hidden = layer.mode, layer.hidden_size
        self.layers, self.directions = layer.num_layers, 2 if layer.bidirectional else 1
        self.batch_first, self.biased = layer.batch_first, layer.bias
        names = [name for name in layer._flat_weights_names if name.startswith("bias")]
        self.biases = names

    def forward(self, input: Tensor, hx: Any = None, *weights: Tensor) -> Any:
        """Return output and last state, as the operand layer does."""
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        first = batched and self.batch_first
        count = 2 if self.kind == "LSTM" else 1
        if hx is None:
            batch = x.shape[0 if first else 1]
            states = [x.new_zeros(self.layers * self.directions, batch, self.hidden)] * count
        else:
            states = list(hx) if count == 2 else [hx]
            states = states if batched else [state.unsqueeze(1) for state in states]
        biases = [getattr(self, name) for name in self.biases]
        flat = [
            tensor
            for i in range(0, len(weights), 2)
            for tensor in (*weights[i : i + 2], *biases[i : i + 2])
        ]
        function = getattr(torch._VF, self.kind.lower())
        settings = (self.biased, self.layers, 0.0, False, self.directions == 2, first)
        y, *last = function(x, states if count == 2 else states[0], flat, *settings)
        if not batched:
            y, last = y.squeeze(1), [state.squeeze(1) for state in last]
        return y, tuple(last) if count == 2 else last[0]


class ScannedLSTM(OperandLSTM):
    """An OperandLSTM whose steps are a `scan`, which torch.export keeps for any length."""

    @staticmethod
    def of(layer: OperandLSTM) -> ScannedLSTM:
        """Return the same layer; tensors are shared."""
        made = ScannedLSTM.__new__(ScannedLSTM)
        made.__dict__ = {
            key: value.copy() if isinstance(value, (dict, set, list)) else value
            for key, value in layer.__dict__.items()
        }
        return made

    def _recur(
        self, gates: Tensor, h: Tensor, c: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from torch._higher_order_ops.scan import scan

        def step(carry: tuple[Tensor, Tensor], gate: Tensor) -> Any:
            new = self._step(gate, *carry, weight)
            # What is carried on and what is stacked must not be one tensor.
            return new, new[0].clone()

        (last, cell), outputs = scan(step, (h, c), gates, dim=0)
        return cast(Tensor, outputs), last, cell
