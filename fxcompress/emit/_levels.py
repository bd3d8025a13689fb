"""Modules that stand in an exported graph for signs, weights of one bit and 8-bit floats."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from fxcompress.emit._float8_ops import float8_ops
from fxcompress.emit._integers import PackedWeight
from fxcompress.nn import Binarize, Codebook, FloatQuantize
from fxcompress.nn.binarize import signs
from fxcompress.nn.packing import pack, unpack

__all__ = [
    "BinaryWeight",
    "CodebookWeight",
    "Float8Pair",
    "Float8Rounding",
    "Float8Weight",
    "Signs",
]


class BinaryWeight(PackedWeight):
    """A weight of ±α, a bit each: `(bit - 1/2) · scale`, where `scale` is 2α."""

    def __init__(self, quantizer: Binarize, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.bits, self.shape, self.dtype = 1, tuple(weight.shape), weight.dtype
        self.grouped, self.padding, self.zero = self.shape, 0, 0.5
        self.register_buffer("weight", pack(quantizer.quantize(weight), 1))
        self.register_buffer("scale", 2 * quantizer.scale_for(weight).detach())
        self.register_buffer("zero_point", None)


class CodebookWeight(nn.Module):
    """A weight stored as indices into a codebook, packed in bytes, in the order of the weight.

    Not `packed`, they take a byte each, and the dimension that is cut into groups comes first. What
    is `exported` to ONNX passes them through a dequantisation of scale 1: `_onnx_codebooks.py`.
    """

    weight: Tensor
    codebook: Tensor

    def __init__(
        self, found: Codebook, weight: Tensor, *, packed: bool, exported: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = found.bits, tuple(weight.shape), weight.dtype
        self.axis, self.rows = found.axis, found.rows
        self.packed, self.exported = packed, exported and not packed
        with torch.no_grad():
            indices = found.indices(weight)
            if packed:
                self.register_buffer("weight", pack(indices, self.bits))
            else:
                self.register_buffer("weight", indices.movedim(self.axis or 0, 0).flatten())
            self.register_buffer("codebook", found.table().detach().clone())
        if self.exported:
            import_module("torch.ao.quantization.fx._decomposed")  # registers its operators

    def forward(self) -> Tensor:
        """Return the weight as floats."""
        axis, indices = self.axis or 0, self.weight
        moved = [self.shape[axis], *self.shape[:axis], *self.shape[axis + 1 :]]
        if self.packed:
            unpacked = unpack(indices, self.bits, torch.Size(self.shape).numel())
            indices = unpacked.reshape(self.shape).movedim(axis, 0).flatten()
        if self.exported:
            ops = torch.ops.quantized_decomposed
            indices = ops.dequantize_per_tensor(indices, 1.0, 0, 0, 255, torch.uint8)
        places = indices.int()
        if self.axis is not None:
            # One table for all groups: an index is counted on by the entries of those before.
            first = torch.arange(moved[0], dtype=torch.int32) // self.rows * self.codebook.shape[1]
            places = (places.reshape(moved[0], -1) + first.unsqueeze(1)).flatten()
        found = self.codebook.flatten().index_select(0, places)
        return found.reshape(moved).movedim(0, axis).to(self.dtype)


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
