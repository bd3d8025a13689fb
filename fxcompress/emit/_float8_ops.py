"""Operators that stand for a pair of quantize and dequantize of 8-bit floats in an exported graph.

`onnx_translations` turns each into ONNX's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxcompress.emit._shape_ops import shape_ops

__all__ = ["float8_ops", "onnx_translations"]

# onnx.TensorProto
_E4M3, _E5M2 = 17, 19


def float8_ops() -> Any:
    """Return `torch.ops.fxcompress`, with these operators registered on the first call."""
    _library()
    return torch.ops.fxcompress


@cache
def _library() -> Any:
    rounds = "(Tensor x, Tensor scale, int axis, bool e5m2) -> Tensor"
    back = "(Tensor q, Tensor scale, int axis) -> Tensor"
    return shape_ops(
        {"float8_quantize": (rounds, _quantize), "float8_dequantize": (back, _dequantize)}
    )


def _quantize(x: Tensor, scale: Tensor, axis: int, e5m2: bool) -> Tensor:
    return x.to(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn)


def _dequantize(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return q.to(torch.float32)


def onnx_translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return what the operators are in ONNX."""
    ops = float8_ops()
    return {
        ops.float8_quantize.default: _onnx_quantize,
        ops.float8_dequantize.default: _onnx_dequantize,
    }


def _onnx_quantize(x: Any, scale: Any, axis: int, e5m2: bool) -> Any:
    from onnxscript import opset20 as op

    return op.QuantizeLinear(x, scale, _zero(op, scale, _E5M2 if e5m2 else _E4M3), axis=axis)


def _onnx_dequantize(q: Any, scale: Any, axis: int) -> Any:
    from onnxscript import opset20 as op

    return op.DequantizeLinear(q, scale, _zero(op, scale, int(q.dtype)), axis=axis)


def _zero(op: Any, scale: Any, dtype: int) -> Any:
    """Return the zero point, which says what the type is: as many zeros as there are scales."""
    import numpy
    import onnx_ir

    kind = onnx_ir.DataType(dtype)
    array = numpy.zeros(tuple(scale.shape), dtype=kind.numpy())
    return op.Constant(value=onnx_ir.tensor(array, dtype=kind))
