"""How many indices each axis keeps, and which: by ratio, by number, or by a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Axis, Polynomial
from fxcompress.errors import NumericsError, UsageError
from passes.prune._budget.cost import CostArrays
from passes.prune._budget.knapsack import Blocks, Bound, solve
from passes.prune._budget.limits import Limits, nearest, without

__all__ = ["Goal", "check_scores", "keep_best", "spend", "spend_evenly"]

Scores = Mapping[Axis, NDArray[np.float64]]
Keep = dict[Axis, NDArray[np.int64]]


@dataclass(frozen=True)
class Goal:
    """A cost and what it may be.

    Attributes:
        name: `macs`, `parameters`, `bytes`, or `indices` for the number of indices itself.
        cost: The polynomial, over all free axes.
        limit: The most that it may be.
        whole: What limits are a share of; the cost before anything is removed.
        text: The limit as it was written, for messages.
    """

    name: str
    cost: Polynomial
    limit: float
    whole: float
    text: str = ""


def check_scores(scores: Scores) -> None:
    """Refuse scores that have no order.

    Raises:
        NumericsError: A score is NaN or infinite.
    """
    for axis, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise NumericsError(
                f"the score of index {bad[0]} of {axis} is {values[bad[0]]}",
                reason=f"{len(bad)} of {axis.size} scores are not finite",
                hint="check the weights and the data, or choose another criterion",
                where=axis.name or None,
            )


def keep_best(scores: Scores, sizes: Mapping[Axis, int]) -> Keep:
    """Return the kept indices of each axis, ascending; of equal scores the first ones go."""
    return {
        axis: np.sort(np.argsort(scores[axis], kind="stable")[axis.size - size :]).astype(np.int64)
        for axis, size in sizes.items()
    }


def spend(
    axes: Sequence[Axis],
    scores: Scores,
    goals: Sequence[Goal],
    limits: Limits,
    fixed: Mapping[int, int],
    *,
    relative: bool = False,
) -> dict[Axis, int]:
    """Return sizes that meet every goal at the least loss.

    The loss is the sum of the scores removed, which must be in one unit for that. Where they are
    not, `relative` takes Σ wₐ · removedₐ / keptₐ over the axes a: the noise over the signal that an
    axis is left with, times the part wₐ of the cost that it takes part in.

    Args:
        axes: The axes that may shrink.
        scores: The score of each of their indices; higher ones stay.
        goals: What must hold.
        limits: What bounds the sizes.
        fixed: Id -> size of all axes, those that stay whole included.
        relative: Whether scores can be compared only within an axis.

    Raises:
        UsageError: A goal cannot be met; says what can be reached.
    """
    allowed = [limits.allowed(axis) for axis in axes]
    bounds = _bounds(axes, goals, fixed)
    least = np.array([sizes[-1] for sizes in allowed], dtype=np.float64)
    _check_reachable(goals, bounds, least, limits)
    whole = np.array([axis.size for axis in axes], dtype=np.float64)
    weights = _parts(goals, bounds, whole) if relative else None
    blocks = Blocks.of([scores[axis] for axis in axes], allowed, weights)
    left = whole - blocks.removed(solve(blocks, whole, bounds))
    return dict(zip(axes, map(round, left.tolist()), strict=True))


def spend_evenly(
    axes: Sequence[Axis], goals: Sequence[Goal], limits: Limits, fixed: Mapping[int, int]
) -> dict[Axis, int]:
    """Return sizes that meet every goal with the same ratio taken from every axis.

    Raises:
        UsageError: A goal cannot be met; says what can be reached.
    """
    evenly = _Evenly(axes, limits)
    bounds = _bounds(axes, goals, fixed)
    _check_reachable(goals, bounds, evenly.at(limits.max_ratio), limits)
    low, high = 0.0, limits.max_ratio
    # No axis has 2^24 indices, so that no two ratios this close differ.
    for _ in range(24):
        middle = (low + high) / 2
        sizes = evenly.at(middle)
        if all(bound.cost.at(sizes) <= bound.limit + bound.slack for bound in bounds):
            high = middle
        else:
            low = middle
    return dict(zip(axes, map(round, evenly.at(high).tolist()), strict=True))


class _Evenly:
    """Sizes of many axes at one ratio; axes that are alike are looked at once."""

    def __init__(self, axes: Sequence[Axis], limits: Limits) -> None:
        self.limits = limits
        alike: dict[tuple[int, int], int] = {}
        keys = [(axis.size, limits.multiple(axis)) for axis in axes]
        self.first: list[Axis] = []
        for axis, key in zip(axes, keys, strict=True):
            if key not in alike:
                alike[key] = len(self.first)
                self.first.append(axis)
        self.group = np.array([alike[key] for key in keys], dtype=np.int64)
        self.allowed = [limits.allowed(axis) for axis in self.first]

    def at(self, ratio: float) -> NDArray[np.float64]:
        """Return the size of each axis."""
        sizes = [
            nearest(allowed, max(without(axis.size, ratio), self.limits.least(axis)))
            for axis, allowed in zip(self.first, self.allowed, strict=True)
        ]
        return np.array(sizes, dtype=np.float64)[self.group]


def _bounds(axes: Sequence[Axis], goals: Sequence[Goal], fixed: Mapping[int, int]) -> list[Bound]:
    order = [axis.id for axis in axes]
    return [Bound(CostArrays(goal.cost, order, fixed), goal.limit) for goal in goals]


def _parts(
    goals: Sequence[Goal], bounds: Sequence[Bound], sizes: NDArray[np.float64]
) -> list[float]:
    """Return the part of the costs that each axis takes part in: n · (∂C/∂n) / C."""
    found = np.zeros(len(sizes))
    for goal, bound in zip(goals, bounds, strict=True):
        found += sizes * bound.cost.gradient(sizes) / max(goal.whole, 1.0)
    return [float(part) for part in found]


def _check_reachable(
    goals: Sequence[Goal],
    bounds: Sequence[Bound],
    least: NDArray[np.float64],
    limits: Limits,
) -> None:
    for goal, bound in zip(goals, bounds, strict=True):
        reachable = bound.cost.at(least)
        if reachable <= goal.limit + bound.slack:
            continue
        share = f" ({reachable / goal.whole:.1%} of the original)" if goal.whole else ""
        raise UsageError(
            f"a budget of {goal.text or f'{goal.limit:,.0f}'} {goal.name} cannot be met",
            reason=f"the smallest reachable is {reachable:,.0f}{share}, with every selected axis "
            f"cut as far as max_ratio {limits.max_ratio:g}"
            + (f" and min_keep {limits.min_keep}" if limits.min_keep else "")
            + " allow",
            hint=f"raise `max_ratio`, select more axes, or give at least {reachable:,.0f}",
        )
