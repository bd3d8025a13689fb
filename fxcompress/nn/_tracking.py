"""What a fake-quantizer does while it is trained without learning its step: follow the range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fxcompress.nn._affine import grouped

__all__ = ["Follow", "RangeTracker", "ternary_scale"]

Follow: TypeAlias = Literal["range", "mean", "kept"]

# Of the mean magnitude: what is below becomes 0 (Li & Liu, 2016, arXiv:1605.04711, eq. 6).
_THRESHOLD = 0.7


def ternary_scale(rows: Tensor, follow: Literal["mean", "kept"]) -> Tensor:
    """Return the scale α of weights that become -α, 0 and α, one for each row.

    - `mean`: α = mean|w| (Ma et al., 2024, arXiv:2402.17764, eq. 3).
    - `kept`: α = mean|w| over |w| > 0.7 · mean|w| (Li & Liu, 2016, arXiv:1605.04711, eq. 5 and 6).

    Args:
        rows: `[..., elements]`.
        follow: Which of the two.

    Returns:
        `[...]`; 0 for a row of zeros.
    """
    size = rows.abs()
    mean = size.mean(dim=-1, keepdim=True)
    if follow == "mean":
        return mean.squeeze(-1)
    kept = size > _THRESHOLD * mean
    return (size * kept).sum(dim=-1) / kept.sum(dim=-1).clamp_min(1)


class RangeTracker(nn.Module):
    """The range of a tensor while it is trained, and the wait before it is quantised.

    Args:
        momentum: Weight of what is seen against the average so far; 1 takes every step as it is, as
            is right for weights.
        delay: How many training steps pass before values are rounded (Krishnamoorthi, 2018,
            arXiv:1806.08342, section 3.2: activations settle first).
        clip: Clip the range to the mean ± this many standard deviations, or None.
        follow: What is followed: the `range`, or the scale of three levels (`ternary_scale`).
        shape: Shape of `low` and `high`: that of the quantizer's scale.
    """

    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(
        self,
        momentum: float,
        delay: int = 0,
        clip: float | None = None,
        *,
        follow: Follow = "range",
        shape: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.momentum, self.delay, self.clip, self.follow = momentum, delay, clip, follow
        self.register_buffer("low", torch.zeros(tuple(shape), device=device))
        self.register_buffer("high", torch.zeros(tuple(shape), device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def waiting(self) -> bool:
        """Whether values still pass unrounded in training."""
        return int(self.steps) < self.delay

    @torch.no_grad()
    def start(self, low: Tensor, high: Tensor) -> None:
        """Take a range that was found beforehand as the average so far."""
        self.low.copy_(low.reshape(self.low.shape))
        self.high.copy_(high.reshape(self.high.shape))

    @torch.no_grad()
    def update(self, x: Tensor, axis: int | None, group: int | None) -> tuple[Tensor, Tensor]:
        """Take one step's tensor in; return the range now, of the shape of the scale."""
        rows = _rows(x.detach().float(), axis, group)
        if self.follow == "range":
            low, high = rows.aminmax(dim=-1)
        else:
            high = ternary_scale(rows, self.follow)
            low = -high
        if self.clip is not None:
            mean, reach = rows.mean(-1), self.clip * rows.std(-1, correction=0)
            low, high = low.maximum(mean - reach), high.minimum(mean + reach)
        known = bool((self.high > self.low).any())
        weight = self.momentum if known else 1.0
        self.low.lerp_(low.reshape(self.low.shape), weight)
        self.high.lerp_(high.reshape(self.high.shape), weight)
        return self.low, self.high


def _rows(x: Tensor, axis: int | None, group: int | None) -> Tensor:
    """Return what shares a scale as rows."""
    if group is not None:
        return grouped(x, group)
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
