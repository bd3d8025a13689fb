"""ONNX spellings of the operators of the decomposed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch.export import ExportedProgram

from fxcompress.emit._float8_ops import onnx_translations as float8_translations
from fxcompress.emit._lower import register_decomposed
from fxcompress.emit._onnx_attention import attention_translations
from fxcompress.emit._onnx_dynamic import dynamic_translations

__all__ = ["translations"]

# onnx.TensorProto.INT32
_INT32 = 6
_RANGES = {"u8": (0, 255), "s8": (-128, 127)}


def translations(
    program: ExportedProgram, opset: int
) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return the table for `torch.onnx.export(custom_translation_table=…)`.

    Args:
        program: What is translated.
        opset: Version of the ONNX operator set.
    """
    ops = register_decomposed()
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        ops.quantize_per_tensor.default: _quantize_per_tensor,
        ops.dequantize_per_tensor.default: _dequantize_per_tensor,
        ops.dequantize_per_channel.default: _dequantize_per_channel,
        **dynamic_translations(),
        **float8_translations(),
        **attention_translations(opset),
    }
    pools = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.adaptive_avg_pool2d.default
    )
    # An entry takes every call of the op, so any other size must be left to torch.
    if pools and all(list(node.args[1]) == [1, 1] for node in pools):
        table[torch.ops.aten.adaptive_avg_pool2d.default] = _global_average_pool
    return table


def _global_average_pool(input: Any, output_size: Any) -> Any:
    """Pool to one value per channel; torch would make a ReduceMean, which has no integer kernel."""
    from onnxscript import opset18 as op

    return op.GlobalAveragePool(input)


def _quantize_per_tensor(
    input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    from onnxscript import opset18 as op

    floats = _to_float(op, input)
    integers = op.QuantizeLinear(floats, _float(op, scale), _integer(op, zero_point, dtype))
    if (quant_min, quant_max) in _RANGES.values():
        return integers
    # QuantizeLinear saturates at the whole type only.
    return op.Clip(integers, _integer(op, quant_min, dtype), _integer(op, quant_max, dtype))


def _dequantize_per_tensor(
    input: Any,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int | None = None,
) -> Any:
    from onnxscript import opset18 as op

    floats = op.DequantizeLinear(input, _float(op, scale), _integer(op, zero_point, dtype))
    return _cast(op, floats, out_dtype)


def _dequantize_per_channel(
    input: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int | None = None,
) -> Any:
    from onnxscript import opset18 as op

    if zero_points is not None:
        points = op.Cast(zero_points, to=dtype)
    elif dtype == _INT32:
        points = None
    else:
        # onnxruntime makes no integer Gemm of a weight whose zero point is left to the default.
        points = _integers(op, [0] * scales.shape[0], dtype)
    floats = op.DequantizeLinear(input, scales, points, axis=axis)
    return _cast(op, floats, out_dtype)


def _float(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def _integer(op: Any, value: int, dtype: int) -> Any:
    return _integers(op, value, dtype)


def _integers(op: Any, value: int | list[int], dtype: int) -> Any:
    import onnx_ir

    kind = onnx_ir.DataType(dtype)
    array = numpy.array(value, dtype=kind.numpy())
    return op.Constant(value=onnx_ir.tensor(array, dtype=kind))


def _to_float(op: Any, input: Any) -> Any:
    import onnx_ir

    return input if input.dtype == onnx_ir.DataType.FLOAT else op.Cast(input, to=1)


def _cast(op: Any, floats: Any, out_dtype: int | None) -> Any:
    return floats if out_dtype in (None, -1, 1) else op.Cast(floats, to=out_dtype)
