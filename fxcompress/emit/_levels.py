"""Modules that stand in an exported graph for signs, weights of one bit and 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.emit._integers import PackedWeight
from fxcompress.nn import Binarize, FloatQuantize
from fxcompress.nn.binarize import signs
from fxcompress.nn.packing import pack

__all__ = ["BinaryWeight", "Float8Weight", "Signs"]


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
