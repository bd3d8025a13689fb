"""Search for thresholds: one for all exits first, then each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from passes.depth._exits.calibrate import Judge

__all__ = ["Setting", "best_within", "cheapest_within", "sweep"]

_COMMON: Final = 64
_SINGLE: Final = 24
_ROUNDS: Final = 2


@dataclass(frozen=True)
class Setting:
    """Thresholds, and what they give: the mean share of compute, and the metric if there is one."""

    thresholds: tuple[float, ...]
    compute: float
    metric: float | None


def sweep(scores: Tensor, judge: Judge) -> list[Setting]:
    """Return what one threshold for all exits gives, from never to always.

    Args:
        scores: How unsure each exit is, `[exits, samples]`.
        judge: Tells what thresholds give.
    """
    return [judge((each,) * len(scores)) for each in _candidates(scores, _COMMON)]


def best_within(points: Sequence[Setting], compute: float) -> Setting:
    """Return the setting with the lowest thresholds whose compute is within a share."""
    fitting = [point for point in points if point.compute <= compute]
    return min(fitting or points, key=lambda p: p.thresholds if fitting else (p.compute,))


def cheapest_within(
    scores: Tensor, judge: Judge, points: Sequence[Setting], drop: float
) -> Setting:
    """Return the setting with the least compute whose metric is worse by `drop` at most.

    The best common threshold is refined exit by exit: each is moved to where the compute is least
    while the metric still holds.
    """

    def holds(point: Setting) -> bool:
        assert point.metric is not None, "the caller checked that there is a metric"
        lost = judge.whole - point.metric if judge.upwards else point.metric - judge.whole
        return lost <= drop + 1e-12

    # Never to exit holds in any case.
    found = min(filter(holds, points), key=lambda point: point.compute)
    for _ in range(_ROUNDS):
        before = found
        for place in range(len(scores)):
            for each in _candidates(scores[place], _SINGLE):
                moved = list(found.thresholds)
                moved[place] = each
                tried = judge(moved)
                if tried.compute < found.compute and holds(tried):
                    found = tried
        if found is before:
            break
    return found


def _candidates(scores: Tensor, count: int) -> list[float]:
    """Return thresholds that part the scores into equal shares: 0 first, one above all last."""
    shares = torch.linspace(0, 1, count, dtype=torch.float64)
    # `torch.quantile` takes 16 million values at most.
    ordered = scores.double().flatten().sort().values
    at = (shares * (len(ordered) - 1)).long()
    above = torch.nextafter(ordered[at].float(), torch.tensor(torch.inf))
    return [0.0, *dict.fromkeys(above.tolist())]
