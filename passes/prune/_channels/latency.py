"""Meet a latency: search the MAC budget whose result is measured to be that quick."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Axis
from fxcompress.errors import UsageError
from passes._latency import TRIES, Stopwatch, search
from passes.prune._budget.spend import keep_best
from passes.prune._channels.shrink import shrunk

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from fxcompress.spec.units import Amount
    from passes.prune._channels.task import Task

__all__ = ["meet"]

Scores = Mapping[Axis, NDArray[np.float64]]
Sizes = dict[Axis, int]


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
