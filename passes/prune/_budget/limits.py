"""Which sizes an axis may shrink to, and the sizes that a ratio or a number asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Axis
from fxcompress.errors import UsageError

__all__ = ["Limits", "Sizes", "kept_by_number", "kept_by_ratio", "nearest", "without"]

Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What bounds the sizes of every axis.

    Attributes:
        round_to: Kept sizes are multiples of this, by kind of axis; `""` is for all others.
        min_keep: Fewest indices that stay; None for one.
        max_ratio: Largest part of an axis that may go.
    """

    round_to: Mapping[str, int]
    min_keep: int | None = None
    max_ratio: float = 0.5

    def multiple(self, axis: Axis) -> int:
        """Return the number whose multiples an axis may be cut to."""
        return self.round_to.get(axis.kind, self.round_to.get("", 1))

    def least(self, axis: Axis) -> int:
        """Return the fewest indices that an axis may keep, multiples aside."""
        capped = math.ceil(axis.size * (1 - self.max_ratio) - 1e-9)
        return min(axis.size, max(capped, self.min_keep or 1, 1))

    def allowed(self, axis: Axis) -> Sizes:
        """Return the sizes that an axis may have, from its own downwards.

        An axis whose size is no multiple stays whole or is cut to a multiple.

        Raises:
            UsageError: The multiple is larger than the axis.
        """
        step = self.multiple(axis)
        if step > axis.size:
            raise UsageError(
                f"round_to {step} is larger than {axis}, which has {axis.size}",
                reason="no multiple of it is left to keep",
                hint="give a smaller one for this kind (`round_to: "
                f"{{{axis.kind}: 1, default: {step}}}`), or exclude the axis",
                where=axis.name or None,
            )
        largest = (axis.size - 1) // step * step
        fewer = np.arange(largest, self.least(axis) - 1, -step, dtype=np.int64)
        return np.concatenate([np.array([axis.size], dtype=np.int64), fewer])


def kept_by_ratio(axis: Axis, ratio: float, limits: Limits, *, start: int | None = None) -> int:
    """Return how many indices stay when a ratio of an axis goes.

    A ratio never removes more than it says: 0.3 of 5 is one. The size is then rounded to the
    nearest that is allowed, to the larger of two.

    Args:
        axis: The axis.
        ratio: The part that goes.
        limits: What bounds the sizes.
        start: The size that the ratio is of; by default the axis's own.

    Raises:
        UsageError: Nothing would be left, or the ratio is above `max_ratio`.
    """
    whole = axis.size if start is None else start
    wanted = without(whole, ratio)
    if wanted < 1 and limits.min_keep is None:
        raise UsageError(
            f"a ratio of {ratio:g} empties {axis}, which has {axis.size}",
            hint="lower the ratio, exclude the axis, or give `min_keep`",
            where=axis.name or None,
        )
    floor = math.ceil(axis.size * (1 - limits.max_ratio) - 1e-9)
    if wanted < floor or (whole == axis.size and ratio > limits.max_ratio + 1e-9):
        raise _above_cap(axis, f"a ratio of {ratio:g} leaves {wanted}", floor, limits)
    return nearest(limits.allowed(axis), min(wanted, axis.size))


def kept_by_number(axis: Axis, keep: int, limits: Limits) -> int:
    """Return how many indices stay when `keep` are asked for; a smaller axis stays whole.

    Raises:
        UsageError: Fewer than `max_ratio` allows, or not a multiple of `round_to`.
    """
    if keep >= axis.size:
        return axis.size
    step = limits.multiple(axis)
    if keep % step:
        raise UsageError(
            f"keep {keep} is not a multiple of round_to {step}", where=axis.name or None
        )
    floor = math.ceil(axis.size * (1 - limits.max_ratio) - 1e-9)
    if keep < floor:
        raise _above_cap(axis, f"keep {keep}", floor, limits)
    return max(keep, limits.min_keep or 1)


def without(size: int, ratio: float) -> int:
    """Return how many of `size` stay when a ratio goes, which is never more than it says."""
    return size - math.floor(size * ratio + 1e-9)


def nearest(allowed: Sizes, wanted: int) -> int:
    """Return the size nearest to the wanted one; of two, the larger."""
    # `allowed` descends, so that argmin finds the larger one first.
    return int(allowed[int(np.argmin(np.abs(allowed - wanted)))])


def _above_cap(axis: Axis, what: str, floor: int, limits: Limits) -> UsageError:
    return UsageError(
        f"{what} of {axis.size} in {axis}, which is more than one step may take",
        reason=f"max_ratio {limits.max_ratio:g} leaves at least {floor}",
        hint="raise `max_ratio`, or ask for less",
        where=axis.name or None,
    )
