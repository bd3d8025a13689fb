"""Which entries become zero, from their scores: exact counts, ties broken by place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["check_scores", "count_of", "lowest", "lowest_of_all", "lowest_of_groups"]


def count_of(ratio: float, entries: int) -> int:
    """Return `ratio · entries`, rounded down, but not for a rounding error of the product."""
    return int(ratio * entries + 1e-9)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` lowest scores along the last dimension.

    Of equal scores the first are taken, so that the count is exact and the same everywhere.

    Args:
        scores: `[..., entries]`, without NaN.
        count: From 0 to `entries`.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=-1, keepdim=True).values
    below = scores < limit
    ties = scores == limit
    missing = count - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1) <= missing))


def lowest_of_groups(scores: Tensor, keep: int, size: int) -> Tensor:
    """Return a mask of all but the `keep` highest of every `size` consecutive scores.

    Args:
        scores: `[..., entries]`, the last dimension a multiple of `size`.
        keep: N of N:M.
        size: M of N:M.
    """
    return lowest(torch.unflatten(scores, -1, (-1, size)), size - keep).flatten(-2)


def lowest_of_all(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Return a mask per tensor of the lowest scores among all tensors together."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    chosen = lowest(flat, count_of(ratio, flat.numel()))
    parts = torch.split(chosen, [each.numel() for each in scores.values()])
    return {
        name: part.reshape(each.shape)
        for (name, each), part in zip(scores.items(), parts, strict=True)
    }


def check_scores(scores: Tensor, tensor: str) -> None:
    """Check that scores can be ranked.

    Raises:
        NumericsError: One is NaN or infinite.
    """
    if not bool(scores.isfinite().all()):
        raise NumericsError(
            f"the scores of {tensor} hold a NaN or an infinity",
            reason="a weight, or an input that it is multiplied with, is not a finite number",
            hint="check the weights that the model was given, and the calibration data",
            where=tensor,
        )
