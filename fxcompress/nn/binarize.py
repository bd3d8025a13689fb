"""Binarize: one bit a number, as XNOR-Net has it (Rastegari et al., 2016, arXiv:1603.05279).

    y = α · sign(x)        sign(0) = +1        α = mean|x| of an output channel (eq. 6 and 7)

- on a weight: α per channel, taken from the weight at every step while it is trained, then fixed;
- on an activation: α = 1. (The paper's scale of activations, its K of eq. 11, depends on a
  layer's windows: it is a product after the layer.)

Where a number is stored, it takes one bit. No runtime multiplies them as bits: they compute
with ±1 in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError

__all__ = ["Binarize", "signs"]


def signs(x: Tensor) -> Tensor:
    """Return +1 where `x` is at least 0, else -1: same shape, same dtype."""
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(x >= 0, one, -one)


class _SignThrough(torch.autograd.Function):
    """Signs whose gradient is 1 for |x| ≤ 1, else 0 (the same paper, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside


class Binarize(nn.Module):
    """Replace numbers by their signs times a scale.

    Args:
        axis: The dimension with one scale per entry, or None for one scale.
        shape: The shape of `scale`: `[]` or `[channels]`.
        tracking: The scale is mean|x| of what is read, each time, with its gradient; `freeze` ends
            this. Else it is `scale`, 1 at first.

    Attributes:
        scale: α, a buffer; None while `tracking`.

    Raises:
        UsageError: The arguments contradict each other.
    """

    scale: Tensor | None

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        *,
        axis: int | None = None,
        shape: Sequence[int] = (),
        tracking: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        expected = 0 if axis is None or tracking else 1
        if len(shape) != expected:
            raise UsageError(
                f"a scale of shape {list(shape)} does not fit axis={axis}, tracking={tracking}",
                reason=f"it needs {expected} dimensions",
            )
        self.axis = axis
        fixed = None if tracking else torch.ones(tuple(shape), device=device)
        self.register_buffer("scale", fixed)

    @property
    def tracking(self) -> bool:
        """Whether the scale is that of what is read."""
        return self.scale is None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `scale`, as it is now; `()` while `tracking`."""
        return () if self.scale is None else tuple(self.scale.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return `scale · sign(x)`: same shape, same dtype."""
        through: Any = _SignThrough.apply
        trains = torch.is_grad_enabled() and x.requires_grad
        sign = cast(Tensor, through(x)) if trains else signs(x)
        return (sign * self.scale_for(x)).to(x.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return 1 where `x` is at least 0, else 0: uint8 of the shape of `x`."""
        return (x >= 0).to(torch.uint8)

    def dequantize(self, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the bits `q` stand for; the scale must be fixed."""
        return ((2.0 * q - 1) * self.scale_for(q)).to(dtype)

    def scale_for(self, x: Tensor) -> Tensor:
        """Return α for `x`, shaped to broadcast against it."""
        if self.axis is None:
            return x.float().abs().mean() if self.scale is None else self.scale
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return (self.mean_of(x) if self.scale is None else self.scale).reshape(shape)

    def mean_of(self, x: Tensor) -> Tensor:
        """Return mean|x| of each channel, `[channels]`, or of all, `[]`."""
        size = x.float().abs()
        return size.mean() if self.axis is None else size.movedim(self.axis, 0).flatten(1).mean(1)

    def freeze(self, x: Tensor) -> Binarize:
        """Fix the scale as that of `x`, if it is not fixed yet; return self."""
        if self.scale is None:
            self.scale = self.mean_of(x.detach())
        return self

    def extra_repr(self) -> str:
        """Return the non-default arguments."""
        parts = [f"axis={self.axis}"] * (self.axis is not None) + ["tracking=True"] * self.tracking
        return ", ".join(parts)
