"""The arithmetic that all quantizers on a grid of integers share.

A real number x becomes q = clamp(round(x / scale) + zero_point, qmin, qmax), read back as
y = (q - zero_point) · scale, with `round` to the nearest even number (Jacob et al., 2018,
arXiv:1712.05877, eq. 1).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LearnedStep",
    "StraightThrough",
    "affine_parameters",
    "grouped",
    "in_place_of",
    "to_integers",
    "ungrouped",
    "wide",
]

_SMALLEST_SCALE = 1e-30


def affine_parameters(
    low: Tensor, high: Tensor, *, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point with which integers qmin…qmax cover [low, high] and 0.

    0 is always exactly representable, because padding and ReLU make many exact zeros. A range of
    nothing but zeros (a dead channel, all-zero weights) gets scale 1, which reads back as zeros.

    Args:
        low: Lowest values, float.
        high: Highest values, same shape.
        qmin: Lowest integer.
        qmax: Highest integer.
        symmetric: Put the zero point in the middle of the integers.

    Returns:
        scale (float32, above 0) and zero point (int32), of the shape of `low`.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        scale = torch.maximum(-low / (middle - qmin), high / (qmax - middle))
    else:
        scale = (high - low) / (qmax - qmin)
    scale = torch.where(scale > _SMALLEST_SCALE, scale, 1.0).float()
    if symmetric:
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    zero_point = (qmin - low / scale.double()).round().clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def grouped(x: Tensor, group: int | None) -> Tensor:
    """Return `x` as `[channels, groups, group]`, the last one filled up with 0, or as it is."""
    if group is None:
        return x
    missing = -(x.numel() // max(x.shape[0], 1)) % group
    if missing:
        x = F.pad(x.reshape(x.shape[0], -1), (0, missing))
    return x.reshape(x.shape[0], -1, group)


def ungrouped(y: Tensor, shape: torch.Size, group: int | None) -> Tensor:
    """Return what `grouped` made of a tensor of that shape in this shape again."""
    if group is not None and y.numel() != shape.numel():
        y = y.flatten(1)[:, : shape.numel() // shape[0]]
    return y.reshape(shape)


def wide(x: Tensor) -> Tensor:
    """Return half precision as float: quotients would round twice, and 2049 is no float16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def to_integers(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return q as floats; the parameters broadcast against `x`."""
    return ((wide(x) / scale).round() + zero_point).clamp(qmin, qmax)


class StraightThrough(torch.autograd.Function):
    """Fake quantization with the gradient of clamp (Bengio et al., 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        group: int | None,
    ) -> Tensor:
        """Return the rounded `x`; keep where it was in range."""
        level = (wide(grouped(x, group)) / scale).round() + zero_point
        ctx.save_for_backward(ungrouped((level >= qmin) & (level <= qmax), x.shape, group))
        y = (level.clamp(qmin, qmax) - zero_point) * scale
        return ungrouped(y, x.shape, group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the incoming gradient where `x` was in range."""
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None, None


class LearnedStep(torch.autograd.Function):
    """Fake quantization that also has gradients for its scale and zero point.

    With v = x / s (Esser et al., 2020, arXiv:1902.08153, eq. 3; Bhalgat et al., 2020,
    arXiv:2004.09576, eq. 4 to 6, for the offset):

        ∂y/∂s = round(v) - v in range, else q_bound - z        ∂y/∂z = 0 in range, else -s

    both times 1 / sqrt(N · qmax), N being the number of elements that share a scale (section 2.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        group: int | None,
    ) -> Tensor:
        """Return the rounded `x`; the parameters broadcast against grouped `x`, z is whole."""
        ratio = wide(grouped(x, group)) / scale
        level = ratio.round() + zero_point
        ctx.save_for_backward(ratio, level, scale, zero_point)
        ctx.limits = qmin, qmax, group
        y = (level.clamp(qmin, qmax) - zero_point) * scale
        return ungrouped(y, x.shape, group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients for `x`, the scale and the zero point."""
        ratio, level, scale, zero_point = ctx.saved_tensors
        qmin, qmax, group = ctx.limits
        incoming = wide(grouped(grads[0], group))
        inside = (level >= qmin) & (level <= qmax)
        step = torch.where(inside, ratio.round() - ratio, level.clamp(qmin, qmax) - zero_point)
        factor = (max(qmax, 1) * ratio.numel() / scale.numel()) ** -0.5
        to_scale = (incoming * step * factor).sum_to_size(scale.shape)
        to_zero = torch.where(inside, 0.0, -scale * incoming * factor).sum_to_size(zero_point.shape)
        to_x = ungrouped(incoming * inside, grads[0].shape, group).to(grads[0].dtype)
        return to_x, to_scale, to_zero, None, None, None


class _InPlaceOf(torch.autograd.Function):
    """Use one value in place of another that gets its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, used: Tensor) -> Tensor:
        """Return `used`, bit for bit."""
        return used.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient for `value`."""
        return grads[0], None


def in_place_of(value: Tensor, used: Tensor) -> Tensor:
    """Return `used` with the gradient going to `value`."""
    through: Any = _InPlaceOf.apply
    return cast(Tensor, through(value, used)) if value.requires_grad else used
