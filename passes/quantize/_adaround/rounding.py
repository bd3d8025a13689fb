"""A weight between its two nearest grid points: the rectified sigmoid of AdaRound."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fxcompress.nn import FakeQuantize

__all__ = ["SoftRounding"]

# The sigmoid is stretched to [γ, ζ], so that its clamp reaches 0 and 1 (arXiv:2004.10568, eq. 23).
_ZETA: Final = 1.1
_GAMMA: Final = -0.1


class SoftRounding:
    """The rounding of one weight, learned through `v`, of the weight's shape.

    Args:
        fake: The weight's quantizer.
        value: The float weight.
    """

    def __init__(self, fake: FakeQuantize, value: Tensor) -> None:
        self.fake, self.dtype = fake, value.dtype
        value = value.float()
        self.nearest = fake.quantize(value)
        below = fake.dequantize(self.nearest) > value
        self.floor = (self.nearest - below.int()).float()
        step = fake.dequantize(self.floor + 1) - fake.dequantize(self.floor)
        part = ((value - fake.dequantize(self.floor)) / step).clamp(0, 1)
        # Weights that are 0 stay so, as pruning left them.
        self.fixed = value == 0
        share = ((part - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)
        self.v = torch.logit(share).requires_grad_()

    def up(self) -> Tensor:
        """Return h(V), how far above the lower grid point each weight is, 0 to 1."""
        h = (torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        return torch.where(self.fixed, self.nearest - self.floor, h)

    def soft(self) -> Tensor:
        """Return the weight at h(V), with gradients."""
        level = (self.floor + self.up()).clamp(self.fake.qmin, self.fake.qmax)
        return self.fake.dequantize(level, self.dtype)

    def penalty(self, beta: float) -> Tensor:
        """Return Σ(1 − |2h − 1|^β), which is least where every h is 0 or 1 (eq. 24)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def integers(self) -> Tensor:
        """Return the integers that h(V) is nearest to, int32."""
        level = self.floor + (self.up() >= 0.5)
        return level.clamp(self.fake.qmin, self.fake.qmax).to(torch.int32)

    def rounded(self, integers: Tensor) -> Tensor:
        """Return what integers stand for, in the weight's dtype."""
        return self.fake.dequantize(integers, self.dtype)
