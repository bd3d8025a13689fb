"""Modules that stand in an exported graph for what a lowering did without quantized operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.nn import FakeQuantize

__all__ = ["IntegerWeight", "Rounding"]


class IntegerWeight(nn.Module):
    """A weight stored as integers, given back as `(weight - zero_point) · scale`.

    `scale` has the shape that broadcasts against `weight` (with `group`, against
    `[channels, elements / group, group]`); `zero_point` is None where it is 0.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    axis: int | None

    def __init__(self, quantizer: FakeQuantize, weight: Tensor) -> None:
        super().__init__()
        self.axis, self.group = quantizer.axis, quantizer.group
        self.qmin, self.qmax, self.dtype = quantizer.qmin, quantizer.qmax, weight.dtype
        with torch.no_grad():
            self.register_buffer("weight", quantizer.quantize(weight).to(quantizer.dtype))
        scale, zero_point = quantizer._parameters_for(weight)
        self.register_buffer("scale", scale.detach().clone())
        has_zero_point = bool(zero_point.any())
        self.register_buffer("zero_point", zero_point.detach().clone() if has_zero_point else None)

    def forward(self) -> Tensor:
        """Return the weight as floats."""
        weight = self.weight.float()
        if self.group is not None:
            weight = weight.reshape(weight.shape[0], -1, self.group)
        if self.zero_point is not None:
            weight = weight - self.zero_point
        shape = self.weight.shape
        return (weight * self.scale).reshape(shape).to(self.dtype)


class Rounding(nn.Module):
    """A fake-quantize of activations with one scale, in the fewest operations.

    `round(x / scale)` is clamped to the integers less the zero point, which then never occurs.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        zero_point = int(quantizer.zero_point)
        self.scale = float(quantizer.scale)
        self.low, self.high = quantizer.qmin - zero_point, quantizer.qmax - zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded; half precision is divided as float, which rounds once only."""
        levels = (x.float() / self.scale).round().clamp(self.low, self.high)
        return (levels * self.scale).to(x.dtype)
