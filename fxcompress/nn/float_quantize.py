"""FloatQuantize: numbers in eight bits with an exponent, scaled.

A real number x is stored as the 8-bit float q and read back as y:

    q = round(clamp(x / scale, ±max))        y = q · scale

with `round` to the nearest number of the format, ties to even (Micikevicius et al., 2022,
arXiv:2209.05433): e4m3 has 4 bits of exponent, 3 of mantissa and ends at 448; e5m2 ends at 57344.
What is beyond saturates; infinities do not come up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn._affine import wide

__all__ = ["Float8", "FloatQuantize"]

Float8: TypeAlias = Literal["e4m3", "e5m2"]

_DTYPES: Final[dict[str, torch.dtype]] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SMALLEST_SCALE: Final = 1e-30


class _Through(torch.autograd.Function):
    """Rounding whose gradient is 1 where nothing saturates, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class FloatQuantize(nn.Module):
    """Round a tensor to the values of scaled 8-bit floats.

    Args:
        format: `e4m3` or `e5m2`.
        axis: The dimension with one scale per entry, or None for one scale.
        shape: The shape of `scale`: `[]` or `[channels]`.

    Raises:
        UsageError: There is no such format, or the shape does not fit.
    """

    scale: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(
        self,
        format: Float8 = "e4m3",
        *,
        axis: int | None = None,
        shape: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if format not in _DTYPES:
            raise UsageError(
                f"there is no 8-bit float {format!r}", reason=f"there are {', '.join(_DTYPES)}"
            )
        expected = 0 if axis is None else 1
        if len(shape) != expected:
            raise UsageError(
                f"a scale of shape {list(shape)} does not fit axis={axis}",
                reason=f"it needs {expected} dimensions",
            )
        self.format, self.axis = format, axis
        self.register_buffer("scale", torch.ones(tuple(shape), device=device))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `scale`, as it is now."""
        return tuple(self.scale.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is stored."""
        return _DTYPES[self.format]

    @property
    def largest(self) -> float:
        """The largest number of the format."""
        return torch.finfo(self.dtype).max

    @property
    def smallest(self) -> float:
        """The smallest number of the format in full precision."""
        return torch.finfo(self.dtype).smallest_normal

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the stored numbers would give it back: same shape, same dtype.

        The gradient passes straight through where `x` is in range (Bengio et al., 2013,
        arXiv:1308.3432).
        """
        y = self.dequantize(self.quantize(x.detach()), x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return y
        inside = wide(x.detach()).abs() <= self.largest * self.scale_for(x)
        through: Any = _Through.apply
        return cast(Tensor, through(x, y, inside))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the 8-bit floats, of the shape of `x`."""
        scaled = wide(x) / self.scale_for(x)
        return scaled.clamp(-self.largest, self.largest).to(self.dtype)

    def dequantize(self, q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the 8-bit floats `q` stand for."""
        return (q.float() * self.scale_for(q)).to(dtype)

    def fit(self, largest: Tensor) -> FloatQuantize:
        """Let magnitudes up to `largest`, of the shape of `scale`, be in range; return self.

        Zeros alone get scale 1.
        """
        scale = largest.float() / self.largest
        with torch.no_grad():
            self.scale.copy_(torch.where(scale > _SMALLEST_SCALE, scale, 1.0).reshape(self.shape))
        return self

    def scale_for(self, x: Tensor) -> Tensor:
        """Return `scale`, shaped to broadcast against `x`."""
        if self.axis is None:
            return self.scale
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    def extra_repr(self) -> str:
        """Return the format and the axis."""
        return f"{self.format!r}" + f", axis={self.axis}" * (self.axis is not None)
