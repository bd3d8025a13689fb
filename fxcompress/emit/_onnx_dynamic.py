"""ONNX spellings of the operators of `_dynamic_ops`, as onnxruntime runs them in integers.

Per tensor: DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Add, which onnxruntime fuses. Per token
there is no such operator: the range is written out, and rows are quantised with an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy

from fxcompress.emit._dynamic_ops import dynamic_ops

__all__ = ["dynamic_translations"]

_FLOAT = 1
# The least normal float32; below, division is slow and inexact.
_LEAST = 2.0**-126


def dynamic_translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return the rows for the exporter's table."""
    ops = dynamic_ops()
    return {
        ops.dynamic_quantize.default: _quantize,
        ops.dynamic_linear.default: _linear,
        ops.dynamic_conv.default: _conv,
        ops.stored_recurrence.default: _recurrence,
    }


def _quantize(x: Any, bits: int, per_token: bool, symmetric: bool) -> Any:
    op = _opset()

    if bits == 8 and not per_token and not symmetric:
        return op.DynamicQuantizeLinear(x)
    if per_token:
        # QuantizeLinear has one axis of scales: rows.
        rows = op.Flatten(x, axis=-1)
        levels, middle, scale, points = _range(op, rows, bits, symmetric, [-1])
        q = op.Reshape(op.QuantizeLinear(rows, scale, points, axis=0), op.Shape(x))
        column = op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[1]), axis=0)
        scale, points = (op.Reshape(each, column) for each in (scale, points))
    else:
        levels, middle, scale, points = _range(op, x, bits, symmetric, None)
        q = op.QuantizeLinear(x, scale, points)
    lowest = 0 if middle is None else middle - levels
    highest = levels if middle is None else middle + levels
    if highest < 255:
        # QuantizeLinear saturates at the whole type only.
        q = op.Clip(q, _u8(op, lowest), _u8(op, highest))
    return q, scale, points


def _range(
    op: Any, x: Any, bits: int, symmetric: bool, axes: list[int] | None
) -> tuple[int, int | None, Any, Any]:
    """Return the largest level, the zero point where it is constant, scales and zero points.

    One of each along `axes`. What has no values but 0 gets the least scale that is normal.
    """
    along = () if axes is None else (op.Constant(value_ints=axes),)
    least = op.Constant(value_float=_LEAST)
    if symmetric:
        levels, middle = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        high = op.ReduceMax(op.Abs(x), *along, keepdims=0)
        scale = op.Max(op.Div(high, op.Constant(value_float=float(levels))), least)
        return levels, middle, scale, op.Expand(_u8(op, middle), op.Shape(scale))
    levels, zero = 2**bits - 1, op.Constant(value_float=0.0)
    high = op.Max(op.ReduceMax(x, *along, keepdims=0), zero)
    low = op.Min(op.ReduceMin(x, *along, keepdims=0), zero)
    scale = op.Max(op.Div(op.Sub(high, low), op.Constant(value_float=float(levels))), least)
    # It divides, rounds and casts in one kernel.
    options = {} if axes is None else {"axis": 0}
    return levels, None, scale, op.QuantizeLinear(op.Neg(low), scale, **options)


def _linear(q: Any, scale: Any, zero_point: Any, weight: Any, weight_scale: Any, bias: Any) -> Any:
    op = _opset()

    product = op.Cast(op.MatMulInteger(q, weight, zero_point), to=_FLOAT)
    result = op.Mul(product, op.Mul(scale, weight_scale))
    return result if bias is None else op.Add(result, bias)


def _conv(
    q: Any,
    scale: Any,
    zero_point: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    op = _opset()

    product = op.ConvInteger(
        q,
        weight,
        zero_point,
        _u8(op, 128),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    result = op.Mul(op.Cast(product, to=_FLOAT), op.Mul(scale, weight_scale))
    return result if bias is None else op.Add(result, bias)


def _recurrence(
    q: Any,
    scale: Any,
    zero_point: Any,
    h: Any,
    w: Any,
    r: Any,
    bias: Any,
    w_scale: Any,
    r_scale: Any,
    kind: str,
) -> Any:
    op = _opset()

    directions, hidden = int(h.shape[0]), int(h.shape[2])
    operands = [op.DequantizeLinear(q, scale, zero_point)]
    for matrix, scales in ((w, w_scale), (r, r_scale)):
        rows, columns = int(matrix.shape[1]), int(matrix.shape[2])
        flat = op.Reshape(matrix, op.Constant(value_ints=[directions * rows, columns]))
        each = op.Reshape(scales, op.Constant(value_ints=[-1]))
        floats = op.DequantizeLinear(flat, each, _zeros(op, [directions * rows]), axis=0)
        operands.append(op.Reshape(floats, op.Constant(value_ints=[directions, rows, columns])))
    direction = "bidirectional" if directions == 2 else "forward"
    if kind == "GRU":
        return op.GRU(
            *operands, bias, None, h, direction=direction, hidden_size=hidden, linear_before_reset=1
        )
    activations = ["Relu" if kind == "RNN_relu" else "Tanh"] * directions
    return op.RNN(
        *operands, bias, None, h, direction=direction, hidden_size=hidden, activations=activations
    )


def _opset() -> Any:
    from onnxscript import opset18

    return opset18


def _u8(op: Any, value: int) -> Any:
    return _constant(op, numpy.array(value, dtype=numpy.uint8))


def _zeros(op: Any, shape: list[int]) -> Any:
    return _constant(op, numpy.zeros(shape, dtype=numpy.int8))


def _constant(op: Any, array: Any) -> Any:
    import onnx_ir

    return op.Constant(value=onnx_ir.tensor(array))
