"""Modules that stand in an exported graph for signs, weights of one bit and 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.emit._float8_ops import float8_ops
from fxcompress.emit._integers import PackedWeight
from fxcompress.nn import Binarize, FloatQuantize
from fxcompress.nn.binarize import signs
from fxcompress.nn.packing import pack

__all__ = ["BinaryWeight", "Float8Pair", "Float8Rounding", "Float8Weight", "Signs"]


class BinaryWeight(PackedWeight):
    """A weight of ±α, a bit each: `(bit - 1/2) · scale`, where `scale` is 2α."""

    def __init__(self, quantizer: Binarize, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.bits, self.shape, self.dtype = 1, tuple(weight.shape), weight.dtype
        self.grouped, self.padding, self.zero = self.shape, 0, 0.5
        self.register_buffer("weight", pack(quantizer.quantize(weight), 1))
        self.register_buffer("scale", 2 * quantizer.scale_for(weight).detach())
        self.register_buffer("zero_point", None)


class Float8Weight(nn.Module):
    """A weight stored as 8-bit floats: `weight · scale`; `scale` broadcasts against it."""

    weight: Tensor
    scale: Tensor

    def __init__(self, quantizer: FloatQuantize, weight: Tensor) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.register_buffer("weight", quantizer.quantize(weight))
        self.register_buffer("scale", quantizer.scale_for(weight).detach().clone())

    def forward(self) -> Tensor:
        """Return the weight as floats."""
        return (self.weight.float() * self.scale).to(self.dtype)


class Float8Rounding(nn.Module):
    """An activation rounded to 8-bit floats: `scale`, one number or per axis, broadcasts to it."""

    scale: Tensor

    def __init__(self, quantizer: FloatQuantize, like: Tensor) -> None:
        super().__init__()
        self.stored, self.largest = quantizer.dtype, quantizer.largest
        self.register_buffer("scale", quantizer.scale_for(like).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded, as floats of its own type."""
        q = (x.float() / self.scale).clamp(-self.largest, self.largest).to(self.stored)
        return (q.float() * self.scale).to(x.dtype)


class Float8Pair(nn.Module):
    """A number as 8-bit floats and back, in operators that a translation knows.

    With a `weight` it is given back, as it is stored; otherwise the operand is rounded.
    """

    scale: Tensor
    weight: Tensor | None

    def __init__(self, quantizer: FloatQuantize, weight: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.axis, self.dtype = quantizer.dtype, quantizer.axis, dtype
        self.register_buffer("scale", quantizer.scale.detach().clone())
        stored = None if weight is None else quantizer.quantize(weight)
        self.register_buffer("weight", stored)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return the operand, or the weight, as floats."""
        ops, axis = float8_ops(), 1 if self.axis is None else self.axis
        q = self.weight
        if q is None:
            assert x is not None, "without a weight it rounds an activation"
            e5m2 = self.stored is torch.float8_e5m2
            q = ops.float8_quantize(x.float(), self.scale, axis, e5m2)
        floats: Tensor = ops.float8_dequantize(q, self.scale, axis)
        return floats.to(self.dtype)


class Signs(nn.Module):
    """The signs of an activation, ±1; that of 0 is +1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return +1 where `x` is at least 0, else -1."""
        return signs(x)

    @staticmethod
    def fit(quantizer: Binarize) -> bool:
        """Whether a quantizer gives plain signs."""
        scale = quantizer.scale
        return scale is not None and bool(torch.all(scale == 1))
