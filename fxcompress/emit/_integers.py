"""Modules that stand in an exported graph for what a lowering did without quantized operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.nn import FakeQuantize
from fxcompress.nn._affine import grouped, ungrouped
from fxcompress.nn.packing import pack, unpack

__all__ = ["IntegerWeight", "PackedWeight", "Rounding"]


class IntegerWeight(nn.Module):
    """A weight stored as integers, given back as `(weight - zero_point) · scale`.

    `scale` has the shape that broadcasts against `weight` (with `group`, against
    `[channels, groups, group]`, the last group filled up); `zero_point` is None where it is 0.
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
        weight = grouped(self.weight.float(), self.group)
        if self.zero_point is not None:
            weight = weight - self.zero_point
        return ungrouped(weight * self.scale, self.weight.shape, self.group).to(self.dtype)


class PackedWeight(nn.Module):
    """A weight stored as integers of `bits` bits, packed in bytes: `(integer - zero) · scale`.

    The integers start at 0. `scale` broadcasts against `[channels, groups, group]`, or without
    groups against the weight; `zero_point`, uint8, has its shape, and is None where all zero points
    are the number `zero`. `padding` elements are missing in the last group.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    zero: float

    def __init__(self, quantizer: FakeQuantize, weight: Tensor) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = quantizer.bits, tuple(weight.shape), weight.dtype
        with torch.no_grad():
            integers = quantizer.quantize(weight) - quantizer.qmin
            self.register_buffer("weight", pack(integers.to(torch.uint8), self.bits))
            scale, zero_point = quantizer._parameters_for(weight)
            zero_point = (zero_point - quantizer.qmin).to(torch.uint8)
        self.register_buffer("scale", scale.detach().clone())
        self.zero = int(zero_point.flatten()[0])
        same = bool((zero_point == self.zero).all())
        self.register_buffer("zero_point", None if same else zero_point)
        self.grouped, self.padding = self.shape, 0
        if quantizer.group is not None:
            self.grouped = (*scale.shape[:-1], -1)
            self.padding = -(weight.numel() // weight.shape[0]) % quantizer.group

    def forward(self) -> Tensor:
        """Return the weight as floats."""
        integers = unpack(self.weight, self.bits, torch.Size(self.shape).numel())
        zero_point = self.zero if self.zero_point is None else self.zero_point.float()
        values = integers.float()
        if self.padding:
            values = F.pad(values.reshape(self.shape[0], -1), (0, self.padding))
        values = (values.reshape(self.grouped) - zero_point) * self.scale
        if self.padding:
            values = values.flatten(1)[:, : -self.padding]
        return values.reshape(self.shape).to(self.dtype)


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
