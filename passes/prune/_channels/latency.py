"""Meet a latency: search the MAC budget whose result is measured to be that quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Axis
from fxcompress.errors import UsageError
from passes.prune._budget.spend import keep_best
from passes.prune._channels.shrink import shrunk
from passes.prune._channels.stopwatch import Stopwatch

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from fxcompress.spec.units import Amount
    from passes.prune._channels.task import Task

__all__ = ["Timed", "meet", "search"]

TOLERANCE: Final = 0.05
"""How far below the target a measurement may be, as a part of it."""

TRIES: Final = 12
"""Short measurements of one search."""

LONG_TRIES: Final = 6
"""Long measurements of one search, once short ones were found to be off."""

Scores = Mapping[Axis, NDArray[np.float64]]
Sizes = dict[Axis, int]


class Timed(NamedTuple):
    """A candidate: its share of the MACs, and the share of the time that was measured."""

    share: float
    ratio: float


_WHOLE: Final = Timed(1.0, 1.0)


def meet(task: Task, target: Amount, scores: Scores, context: Context) -> Sizes:
    """Return sizes of axes with which the Program is measured to be as quick as asked.

    Candidates are built and timed in turns with the Program as it is, so that a drift of the
    machine hits both. The one that wins is timed again, for longer, before it is taken.

    Raises:
        UsageError: The target cannot be reached, or is reached already.
    """
    watch = Stopwatch(task.program)
    whole = watch.seconds
    wanted = target.value if target.relative else target.value / whole
    if wanted >= 1:
        raise UsageError(
            f"a latency of {target} is met already",
            reason=f"one call takes {whole * 1e3:.3g} ms",
            hint="ask for less, or take the pass out",
        )
    low, least = _least(task)
    found: dict[float, Sizes] = {low: least}
    measured = 0

    def ratio(share: float, *, longer: bool) -> float:
        nonlocal measured
        measured += 1
        context.progress("measuring latency", min(measured, TRIES), TRIES)
        if share not in found:
            found[share] = task.sizes_for([task.macs_goal(share)], scores)
        made = shrunk(task.program, task.analysis, keep_best(scores, found[share]))
        return watch.ratio(made, longer=longer)

    best = search(wanted, low, partial(ratio, longer=False), partial(ratio, longer=True))
    after = best.ratio * watch.seconds
    if best.ratio > wanted:
        raise UsageError(
            f"a latency of {target} cannot be met",
            reason=f"the least that was measured is {after * 1e3:.3g} ms, {best.ratio:.1%} of the "
            f"time, with {best.share:.1%} of the MACs: the rest is the overhead of the calls, and "
            "what `max_ratio` keeps",
            hint=f"raise `max_ratio`, select more axes, or give at least {after * 1e3:.3g} ms",
        )
    context.measured["latency_ms"] = (watch.seconds * 1e3, after * 1e3)
    return found[best.share]


def _least(task: Task) -> tuple[float, Sizes]:
    """Return the smallest sizes that are allowed, and their share of the MACs."""
    least = {axis: int(task.limits.allowed(axis)[-1]) for axis in task.axes}
    sizes = task.analysis.sizes
    after = {**sizes, **{axis.id: size for axis, size in least.items()}}
    return task.analysis.macs.at(after) / task.analysis.macs.at(sizes), least


def search(
    wanted: float,
    low: float,
    measure: Callable[[float], float],
    confirm: Callable[[float], float],
    tries: int = TRIES,
) -> Timed:
    """Return the candidate closest below what is wanted, its time confirmed.

    The one that wins is measured again by `confirm`. If that says otherwise (too slow, or that
    there is room), short measurements were off, and the search goes on with long ones: below the
    candidate or above it.

    Args:
        wanted: Share of the time, below 1.
        low: The least share of the MACs.
        measure: Share of the MACs -> share of the time.
        confirm: The same, measured for longer.
        tries: How many short measurements.

    Returns:
        What `confirm` said of the winner; slower than wanted only if the least share is.
    """
    winner = _bracketed(wanted, Timed(low, measure(low)), _WHOLE, measure, tries - 1)
    sure = Timed(winner.share, confirm(winner.share))
    if sure.ratio > wanted:
        least = sure if sure.share == low else Timed(low, confirm(low))
        return _bracketed(wanted, least, sure, confirm, LONG_TRIES)
    if _is_near(sure, wanted) or not _is_near(winner, wanted):
        return sure
    return _bracketed(wanted, sure, _WHOLE, confirm, LONG_TRIES)


def _bracketed(
    wanted: float, below: Timed, above: Timed, measure: Callable[[float], float], tries: int
) -> Timed:
    """Return the quick one of two candidates after moving both towards what is wanted.

    Time rises with MACs, but not in proportion, and is noisy: the next share is where a line
    between the two meets the middle of the tolerance, kept inside the bracket.
    """
    aim = wanted * (1 - TOLERANCE / 2)
    for _ in range(tries):
        if _is_near(below, wanted) or above.share - below.share < 1e-3:
            break
        part = (aim - below.ratio) / max(above.ratio - below.ratio, 1e-9)
        share = below.share + (above.share - below.share) * min(max(part, 0.1), 0.9)
        timed = Timed(share, measure(share))
        if timed.ratio <= wanted:
            below = timed
        else:
            above = timed
    return below


def _is_near(timed: Timed, wanted: float) -> bool:
    """Whether a time is within the tolerance of what is wanted, or above."""
    return timed.ratio >= wanted * (1 - TOLERANCE)
