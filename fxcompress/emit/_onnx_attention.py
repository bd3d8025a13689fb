"""Attention in ONNX before opset 23, in half the nodes that the exporter writes.

It transposes keys by two reshapes around a transposition, with seven nodes for their shapes, and
looks for NaN in every map of probabilities. Here a rank is known, so one transposition does; and
what may see nothing is known from the mask, once for all layers that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

__all__ = ["attention_translations"]

_ATTENTION: Final = 23
"""The first opset with an operator of its own for attention, which the exporter writes."""


def attention_translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return the rows for the exporter's table; none where ONNX has an operator.

    Args:
        opset: Version of the ONNX operator set.
    """
    if opset >= _ATTENTION:
        return {}
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Write `softmax(scale · Q · Kᵀ + mask) · V`; a query that may see no key reads 0, as in torch.

    Shapes: query `[…, L, E]`, key `[…, S, E]`, value `[…, S, F]`, mask broadcast to `[…, L, S]`.
    """
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    width = query.shape[-1]
    grouped = enable_gqa and query.shape[1] != key.shape[1]
    if dropout_p or grouped or (scale is None and not isinstance(width, int)):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    factor = width**-0.5 if scale is None else scale
    order = list(range(len(key.shape)))
    order[-2:] = order[:-3:-1]
    scores = op.MatMul(op.Mul(query, _number(op, factor, query)), op.Transpose(key, perm=order))
    mask = _causal(op, query, key) if is_causal else attn_mask
    if mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    if not _is_bool(mask):
        return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value)
    nothing, hidden = _number(op, 0.0, query), _number(op, float(query.dtype.min), query)
    weights = op.Softmax(op.Add(scores, op.Where(mask, nothing, hidden)), axis=-1)
    read = op.MatMul(weights, value)
    return read if is_causal else op.Mul(read, _seeing(op, mask, query))


def _seeing(op: Any, mask: Any, query: Any) -> Any:
    """Return 1 for each query that may see a key and 0 for others, `[…, L, 1]`.

    Softmax makes equal probabilities of a row in which all is hidden.
    """
    floats = op.Cast(mask, to=int(query.dtype))
    return op.ReduceMax(floats, op.Constant(value_ints=[-1]), keepdims=1)


def _causal(op: Any, query: Any, key: Any) -> Any:
    """Return the mask `[L, S]` by which a query sees the keys up to its own place."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    rows, columns = (
        op.Range(zero, op.Squeeze(op.Shape(each, start=-2, end=-1)), one) for each in (query, key)
    )
    return op.GreaterOrEqual(op.Unsqueeze(rows, op.Constant(value_ints=[1])), columns)


def _is_bool(mask: Any) -> bool:
    import onnx_ir

    return bool(getattr(mask, "dtype", None) in (onnx_ir.DataType.BOOL, None))


def _number(op: Any, number: float, like: Any) -> Any:
    import onnx_ir

    return op.Constant(value=onnx_ir.tensor(number, dtype=like.dtype))
