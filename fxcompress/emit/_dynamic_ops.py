"""Operators that stand for a runtime's dynamic kernels while a program is exported.

They have shapes only: a translation table turns each into operators of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxcompress.emit._shape_ops import shape_ops

__all__ = ["dynamic_ops"]

_SCHEMAS = {
    # u8 integers, the scale (float) and the zero point (u8), `[]` or `[..., 1]` per token
    "dynamic_quantize": "(Tensor x, int bits, bool per_token, bool symmetric)"
    " -> (Tensor, Tensor, Tensor)",
    # The weight is `[in, out]`.
    "dynamic_linear": "(Tensor q, Tensor scale, Tensor zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? bias) -> Tensor",
    "dynamic_conv": "(Tensor q, Tensor scale, Tensor zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
    # `[time, batch, in]` -> `[time, directions, batch, hidden]` and the last state
    "stored_recurrence": "(Tensor q, Tensor scale, Tensor zero_point, Tensor h, Tensor w, Tensor r,"
    " Tensor? bias, Tensor w_scale, Tensor r_scale, str kind) -> (Tensor, Tensor)",
}


def dynamic_ops() -> Any:
    """Return `torch.ops.fxcompress`, its operators registered on the first call."""
    _library()
    return torch.ops.fxcompress


@cache
def _library() -> Any:
    shapes: dict[str, Callable[..., Any]] = {
        "dynamic_quantize": _quantize,
        "dynamic_linear": _linear,
        "dynamic_conv": _conv,
        "stored_recurrence": _recurrence,
    }
    return shape_ops({name: (schema, shapes[name]) for name, schema in _SCHEMAS.items()})


def _quantize(
    x: Tensor, bits: int, per_token: bool, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], 1) if per_token else ()
    scale = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scale, scale.to(torch.uint8)


def _linear(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return scale.new_empty((*q.shape[:-1], weight.shape[1]))


def _conv(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            q.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return scale.new_empty((q.shape[0], weight.shape[0], *sizes))


def _recurrence(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    h: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None,
    w_scale: Tensor,
    r_scale: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    y = scale.new_empty((q.shape[0], h.shape[0], q.shape[1], h.shape[2]))
    return y, torch.empty_like(h)
