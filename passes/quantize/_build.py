"""Quantizers as modules, from what a decision says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

from fxcompress.nn import FakeQuantize, FloatQuantize
from fxcompress.nn.float_quantize import Float8

if TYPE_CHECKING:
    from passes.quantize._targets import Numbers
    from passes.quantize.static import ActivationEntry, WeightEntry

__all__ = ["Quantizer", "activation_quantizer", "float_format", "weight_quantizer"]

Quantizer: TypeAlias = FakeQuantize | FloatQuantize


def float_format(dtype: Numbers) -> Float8:
    """Return what `FloatQuantize` calls the 8-bit float of an option."""
    return cast(Float8, dtype.removeprefix("float8_"))


def activation_quantizer(entry: ActivationEntry) -> Quantizer:
    """Return the quantizer of an entry; a pending scale is 1."""
    if entry.dtype != "int":
        floats = FloatQuantize(float_format(entry.dtype))
        if entry.scale is not None:
            floats.scale.fill_(entry.scale)
        return floats
    integers = FakeQuantize(entry.bits, signed=entry.signed, symmetric=entry.symmetric)
    if entry.scale is not None and entry.zero_point is not None:
        integers.scale.fill_(entry.scale)
        integers.zero_point.fill_(entry.zero_point)
    return integers


def weight_quantizer(entry: WeightEntry) -> Quantizer:
    """Return the quantizer of an entry, its scale 1."""
    if entry.dtype != "int":
        return FloatQuantize(float_format(entry.dtype), axis=entry.axis, shape=entry.shape)
    return FakeQuantize(entry.bits, narrow=True, axis=entry.axis, shape=entry.shape)
