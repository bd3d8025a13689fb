"""DynamicQuantize: fake quantization of activations with ranges found at run time."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn._affine import StraightThrough, to_integers, wide

__all__ = ["DynamicQuantize", "Per", "dynamic_parameters", "integer_range"]

Per = Literal["token", "tensor"]


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return the lowest and the highest integer: 0…255, or -127…127 when symmetric."""
    highest = int(2 ** (bits - 1)) - 1
    return (-highest, highest) if symmetric else (0, int(2**bits) - 1)


def dynamic_parameters(
    x: Tensor, *, bits: int, per: Per, symmetric: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return scale and zero point (as floats) that cover `x` and 0, and the range of integers.

    In float32, in the order of ONNX's DynamicQuantizeLinear, so that a runtime finds the same:

        affine:     scale = (max - min) / (2^bits - 1)      zero_point = round(-min / scale)
        symmetric:  scale = max|x| / (2^(bits-1) - 1)       zero_point = 0

    with min ≤ 0 ≤ max, so that 0 is exact and entries of 0 change nothing. Where all is 0 the
    scale is 1.

    Args:
        x: `[..., features]`, or any shape per tensor.
        bits: Width of the integers.
        per: `token`: a scale for each run along the last dimension, shaped `[..., 1]`; `tensor`:
            one, shaped `[]`.
        symmetric: Zero point 0 in signed integers.
    """
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    values = wide(x.detach())
    token = per == "token"
    # Without a dim, an extreme of all values is not in the operators that exporters translate.
    values = values if token else values.reshape(-1)
    low = values.amin(-1, keepdim=token).clamp(max=0)
    high = values.amax(-1, keepdim=token).clamp(min=0)
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / qmax
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(qmin, qmax)
    return scale, zero_point, (qmin, qmax)


class DynamicQuantize(nn.Module):
    """Round an activation to the values of `bits`-wide integers, the range its own.

    It has no state: scale and zero point are computed from the tensor each time (see
    `dynamic_parameters`). A lowering replaces it by the runtime's own dynamic quantization.

    Args:
        bits: Width of the integers, 2 to 8.
        per: `token`: each run along the last dimension has a range; `tensor`: one for all.
        symmetric: Signed integers around 0; else unsigned with a zero point.

    Raises:
        UsageError: No such width, or no such granularity.
    """

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(self, bits: int = 8, *, per: Per = "token", symmetric: bool = False) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise UsageError(
                f"activations of {bits} bits cannot be quantised at run time",
                reason="integers of 2 to 8 bits are supported",
            )
        if per not in ("token", "tensor"):
            raise UsageError(
                f"there are no ranges per {per!r}", reason="they are per token or per tensor"
            )
        self.bits, self.per, self.symmetric = bits, per, symmetric

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the integers would give it back: same shape, same dtype.

        The gradient passes straight through (Bengio et al., 2013, arXiv:1308.3432).
        """
        scale, zero_point, (qmin, qmax) = dynamic_parameters(
            x, bits=self.bits, per=self.per, symmetric=self.symmetric
        )
        if torch.is_grad_enabled() and x.requires_grad:
            through: Any = StraightThrough.apply
            return cast(Tensor, through(x, scale, zero_point, qmin, qmax, None))
        return ((to_integers(x, scale, zero_point, qmin, qmax) - zero_point) * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"bits={self.bits}, per={self.per!r}" + ", symmetric=True" * self.symmetric
