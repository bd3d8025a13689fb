"""FakeQuantize: the one form in which quantization stands in a graph.

A real number x is stored as the integer q and read back as y:

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        y = (q - zero_point) · scale

with `round` to the nearest even number (Jacob et al., 2018, arXiv:1712.05877, eq. 1). The module
computes y in floating point, so that the graph trains and is compared like any other. A lowering
replaces it by the runtime's own quantize and dequantize:

- on an activation: one quantize, and one dequantize for each consumer;
- on a parameter (its operand is a `get_attr`): `quantize()` once, stored as integers, and a
  dequantize. The layer that reads it is an `Operand…` layer of `fxcompress.nn.operand`.

Every tensor that flows between integer ops is the output of a FakeQuantize node. Where a scale
passes through an op that only moves values (max pooling, reshape, concatenation), the same module
is called again on the result; quantising twice with one scale is exact.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError

__all__ = ["FakeQuantize", "affine_parameters"]

_SMALLEST_SCALE = 1e-30


class FakeQuantize(nn.Module):
    """Round a tensor to the values that `bits`-wide integers can hold.

    Per tensor, `scale` has shape `[]`; per channel along `axis`, `[channels]`; with `group` too,
    `[channels, elements / group]`, where the elements are those of one channel (axis 0) in order.

    Args:
        bits: Width of the integers, 2 to 16.
        signed: Integers from -2^(bits-1); else from 0.
        symmetric: The zero point is the middle of the range: 0, or 2^(bits-1) when unsigned.
        narrow: Leave out the lowest integer, so that the range is symmetric around the middle.
        axis: The dimension with one scale per entry, or None for one scale.
        group: How many consecutive elements of a channel share a scale.
        shape: The shape of `scale` and `zero_point`.

    Raises:
        UsageError: The arguments contradict each other.
    """

    scale: Tensor
    zero_point: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = True,
        symmetric: bool = True,
        narrow: bool = False,
        axis: int | None = None,
        group: int | None = None,
        shape: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        expected = 0 if axis is None else 1 if group is None else 2
        if not 2 <= bits <= 16:
            raise UsageError(
                f"{bits} bits cannot be fake-quantised",
                reason="integers of 2 to 16 bits are supported",
            )
        if group is not None and (axis != 0 or group < 1):
            raise UsageError(
                f"groups of {group} along axis {axis} are not possible",
                reason="a group is a run of elements of a channel, and channels are axis 0",
            )
        if len(shape) != expected:
            raise UsageError(
                f"a scale of shape {list(shape)} does not fit axis={axis}, group={group}",
                reason=f"it needs {expected} dimensions",
            )
        self.bits, self.signed, self.symmetric, self.narrow = bits, signed, symmetric, narrow
        self.axis, self.group = axis, group
        middle = 0 if signed or not symmetric else 2 ** (bits - 1)
        self.register_buffer("scale", torch.ones(tuple(shape), device=device))
        self.register_buffer(
            "zero_point", torch.full(tuple(shape), middle, dtype=torch.int32, device=device)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `scale`, as it is now."""
        return tuple(self.scale.shape)

    @property
    def qmin(self) -> int:
        """The lowest integer."""
        return (-(2 ** (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest integer."""
        return int(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype of torch that holds the integers."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.uint16

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the integers would give it back: same shape, same dtype.

        The gradient passes straight through where `x` is in range, and is 0 where it is clamped
        (Bengio et al., 2013, arXiv:1308.3432).
        """
        scale, zero_point = self._parameters_for(x)
        if torch.is_grad_enabled() and x.requires_grad:
            limits = (self.qmin, self.qmax)
            through: Any = _StraightThrough.apply
            return cast(Tensor, through(x, scale, zero_point, *limits, self.group))
        q = _quantize(_grouped(x, self.group), scale, zero_point, self.qmin, self.qmax)
        return ((q - zero_point) * scale).reshape(x.shape).to(x.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers, as int32 of the shape of `x`."""
        scale, zero_point = self._parameters_for(x)
        q = _quantize(_grouped(x, self.group), scale, zero_point, self.qmin, self.qmax)
        return q.reshape(x.shape).to(torch.int32)

    def dequantize(self, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the integers `q` stand for."""
        scale, zero_point = self._parameters_for(q)
        y = (_grouped(q, self.group).float() - zero_point) * scale
        return y.reshape(q.shape).to(dtype)

    def fit(self, low: Tensor, high: Tensor) -> "FakeQuantize":
        """Set scale and zero point so that [`low`, `high`] and 0 are in range; return self."""
        scale, zero_point = affine_parameters(
            low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric
        )
        self.scale.copy_(scale.reshape(self.shape))
        self.zero_point.copy_(zero_point.reshape(self.shape))
        return self

    def extra_repr(self) -> str:
        """Return the non-default arguments."""
        parts = [f"bits={self.bits}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("signed", "symmetric")
                  if not getattr(self, name)]  # fmt: skip
        parts += ["narrow=True"] if self.narrow else []
        parts += [f"{name}={getattr(self, name)}" for name in ("axis", "group")
                  if getattr(self, name) is not None]  # fmt: skip
        return ", ".join(parts)

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (as floats), shaped to broadcast against grouped `x`."""
        if self.group is not None:
            shape: list[int] = [*self.shape, 1]
        elif self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
        else:
            shape = []
        return self.scale.reshape(shape), self.zero_point.float().reshape(shape)


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


def _grouped(x: Tensor, group: int | None) -> Tensor:
    return x if group is None else x.reshape(x.shape[0], -1, group)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    # Half-precision quotients would round twice; integers above 2048 do not fit float16.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return ((wide / scale).round() + zero_point).clamp(qmin, qmax)


class _StraightThrough(torch.autograd.Function):
    """Fake quantization with the gradient of clamp."""

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
        grouped = _grouped(x, group)
        wide = grouped.float() if x.dtype in (torch.float16, torch.bfloat16) else grouped
        level = (wide / scale).round() + zero_point
        ctx.save_for_backward(((level >= qmin) & (level <= qmax)).reshape(x.shape))
        y = (level.clamp(qmin, qmax) - zero_point) * scale
        return y.reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the incoming gradient where `x` was in range."""
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None, None
