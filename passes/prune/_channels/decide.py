"""What `prune.channels` decides: axes, scores, sizes, and the indices that stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Analysis, Axis, Frozen, analyze
from fxcompress.axes.terms import axes_of
from fxcompress.errors import UsageError
from fxcompress.pipeline.proofs import has_values
from fxcompress.rewrite.edits import Declined
from passes.prune._budget.amounts import Start
from passes.prune._budget.spend import check_scores, keep_best
from passes.prune._channels.shrink import VALUE
from passes.prune._channels.task import Task
from passes.prune._criteria.score import score, unscorable
from passes.prune._targets import Chosen, choose
from passes.prune.channels import ChannelsDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune.channels import ChannelsOptions

__all__ = ["decide"]

Scores = dict[Axis, NDArray[np.float64]]


def decide(program: Program, options: ChannelsOptions, context: Context) -> ChannelsDecision:
    """Return the decision of `prune.channels`."""
    analysis = analyze(program, signature=options.signature)
    free, frozen = _without_inputs(analysis)
    chosen = _scorable(program, choose(free, frozen, options), options)
    start = Start.of(context, analysis)
    task = Task(program, analysis, chosen.axes, options, start)
    unread = context.planning and (options.criterion.needs_data or not has_values(program))
    if unread:
        sizes = task.guess()
        what = "after calibration" if options.criterion.needs_data else "after reading weights"
        pending: tuple[str, ...] = (f"which indices stay: known {what}",)
        if options.is_global:
            pending += (f"how many of each axis stay: known {what}; shown as the same part of all",)
        keep = {axis: np.arange(size, dtype=np.int64) for axis, size in sizes.items()}
        return task.decision(sizes, {}, keep, chosen.declined, (*pending, *task.later))
    scores = score(program, analysis, chosen.axes, options.criterion, context)
    check_scores(scores)
    if options.budget is not None and options.budget.latency is not None:
        if context.planning:
            sizes = task.guess()
            pending = ("how many indices stay: known after measuring latency", *task.later)
            return task.decision(sizes, scores, keep_best(scores, sizes), chosen.declined, pending)
        from passes.prune._channels.latency import meet

        sizes = meet(task, options.budget.latency, scores, context)
    else:
        sizes = task.sizes(scores)
    keep = keep_best(scores, sizes)
    if context.planning:
        return task.decision(sizes, scores, keep, chosen.declined, task.later)
    made = task.compensated(keep, context)
    decision = task.decision(sizes, scores, keep, (*chosen.declined, *made.declined))
    values = {f"{VALUE}{name}": value for name, value in made.values.items()}
    arrays = {**decision.arrays, **values}
    return decision.model_copy(update={"arrays": arrays, "ridges": made.ridges})


def _without_inputs(analysis: Analysis) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Return the free and the frozen axes, sizes of inputs among the frozen ones.

    Callers make the inputs; a pass cannot make them give fewer.
    """
    tied: dict[Axis, Frozen] = {}
    for node in analysis.program.graph.find_nodes(op="placeholder"):
        frozen = Frozen("it is a size of the model's input", str(node.target), "input")
        for term in analysis.terms(node) or ():
            tied.update(dict.fromkeys(axes_of(term), frozen))
    stuck = [replace(axis, frozen=tied[axis]) for axis in analysis.axes if axis in tied]
    return tuple(a for a in analysis.axes if a not in tied), (*analysis.frozen, *stuck)


def _scorable(program: Program, chosen: Chosen, options: ChannelsOptions) -> Chosen:
    """Return the axes that the criterion applies to; the others are declined.

    Raises:
        UsageError: It applies to none.
    """
    without = unscorable(program, chosen.axes, options.criterion)
    axes = tuple(axis for axis in chosen.axes if axis not in without)
    if not axes:
        raise UsageError(
            f"the criterion {options.criterion.label} applies to none of the selected axes",
            reason="; ".join(f"{axis}: {reason}" for axis, reason in list(without.items())[:3]),
            hint="choose another criterion, or other axes",
        )
    more = (Declined(node=axis.name, reason=reason) for axis, reason in without.items())
    return Chosen(axes, (*chosen.declined, *more))
