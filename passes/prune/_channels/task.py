"""One pruning of one Program by `prune.channels`: what sizes follow, and the decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Analysis, Axis
from fxcompress.axes.terms import axes_of, polynomial
from fxcompress.rewrite.edits import Declined
from passes.prune._budget.amounts import Start, sizes_asked_for
from passes.prune._budget.limits import Limits
from passes.prune._budget.spend import Goal, spend, spend_evenly
from passes.prune._channels.shrink import KEEP, shrunk
from passes.prune._compensate.refit import Compensated, compensate
from passes.prune.channels import AxisEntry, ChannelsDecision, CostFigures

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune.channels import ChannelsOptions

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """One pruning of one program: everything but the scores."""

    program: Program
    analysis: Analysis
    axes: tuple[Axis, ...]
    options: ChannelsOptions
    start: Start

    @property
    def limits(self) -> Limits:
        """What bounds the sizes."""
        given = self.options.round_to
        if isinstance(given, int):
            multiples = {"": given}
        else:
            multiples = {"" if kind == "default" else kind: n for kind, n in given.items()}
        return Limits(multiples, self.options.min_keep, self.options.max_ratio)

    def sizes(self, scores: Mapping[Axis, NDArray[np.float64]]) -> dict[Axis, int]:
        """Return the size of each axis that the options ask for, given scores.

        Raises:
            UsageError: They cannot be had.
        """
        if self.options.is_global:
            return self.sizes_for(self._goals(), scores)
        return self.guess()

    def sizes_for(
        self, goals: list[Goal], scores: Mapping[Axis, NDArray[np.float64]]
    ) -> dict[Axis, int]:
        """Return sizes that meet goals: by the scores of all axes, or the same part of each."""
        if not self.options.is_global:
            return self.evenly(goals)
        sizes, relative = self.analysis.sizes, self.options.criterion.relative
        return spend(self.axes, scores, goals, self.limits, sizes, relative=relative)

    def evenly(self, goals: list[Goal]) -> dict[Axis, int]:
        """Return sizes that meet goals, with the same part of each axis removed."""
        return spend_evenly(self.axes, goals, self.limits, self.analysis.sizes)

    def guess(self) -> dict[Axis, int]:
        """Return sizes that need no scores: exact where each axis is cut by itself."""
        options = self.options
        if options.budget is None and not options.is_global:
            return sizes_asked_for(self.axes, options, self.limits, self.start)
        if options.budget is not None and options.budget.latency is not None:
            latency = options.budget.latency
            return self.evenly([self.macs_goal(latency.value if latency.relative else 1.0)])
        return self.evenly(self._goals())

    @property
    def later(self) -> tuple[str, ...]:
        """What only a run can know of the compensation."""
        if self.options.compensation.method == "none":
            return ()
        return ("values of the layers that read what goes: known after calibration",)

    def compensated(self, keep: Mapping[Axis, NDArray[np.int64]], context: Context) -> Compensated:
        """Return the values that make up for what goes."""
        if self.options.compensation.method == "none":
            return Compensated()
        pruned = shrunk(self.program, self.analysis, keep)
        return compensate(
            self.program, pruned, self.analysis, keep, self.options.compensation, context
        )

    def macs_goal(self, share: float) -> Goal:
        """Return the goal of a share of the MACs."""
        whole = float(self.start.costs.macs)
        return Goal("macs", self.analysis.macs, share * whole, whole)

    def _goals(self) -> list[Goal]:
        budget = self.options.budget
        if budget is None:
            ratio = self.options.ratio
            assert isinstance(ratio, float), "the options allow no other amount"
            return [self.start.indices_goal(self.axes, ratio * self.options.reached)]
        goals = []
        for name, amount in budget.costs.items():
            whole = float(getattr(self.start.costs, name))
            cost = getattr(self.analysis, name)
            limit = whole - self.options.reached * (whole - amount.of(whole))
            goals.append(Goal(name, cost, limit, whole, str(amount)))
        return goals

    def decision(
        self,
        sizes: Mapping[Axis, int],
        scores: Mapping[Axis, NDArray[np.float64]],
        keep: Mapping[Axis, NDArray[np.int64]],
        declined: tuple[Declined, ...],
        pending: tuple[str, ...] = (),
    ) -> ChannelsDecision:
        """Return the decision that sizes and indices come to."""
        before = self.analysis.sizes
        after = {**before, **{axis.id: size for axis, size in sizes.items()}}
        cut = {axis: indices for axis, indices in keep.items() if len(indices) < axis.size}
        return ChannelsDecision(
            axes=tuple(
                AxisEntry(
                    name=axis.name,
                    kind=axis.kind,
                    size=axis.size,
                    kept=sizes[axis],
                    lost=_lost(scores.get(axis), keep[axis]),
                    statistics=axis.statistics,
                )
                for axis in self.axes
            ),
            before=_costs_at(self.analysis, before),
            after=_costs_at(self.analysis, after),
            unknown=dict(self.analysis.unknown),
            stuck={op: _stuck(self.analysis, op) for op in self.analysis.unknown},
            declined=declined,
            signature=self.options.signature,
            outputs=_outputs(self.analysis, sizes) if self.options.signature == "free" else (),
            pending=pending,
            arrays={f"{KEEP}{axis.name}": indices for axis, indices in cut.items()},
        )


def _stuck(analysis: Analysis, op: str) -> tuple[str, ...]:
    """Return the axes of parameters that an op without a rule freezes."""
    reasons = ((axis.name, axis.frozen.reason if axis.frozen else "") for axis in analysis.frozen)
    return tuple(name for name, reason in reasons if reason.startswith(f"{op} has no rule"))


def _costs_at(analysis: Analysis, sizes: Mapping[int, int]) -> CostFigures:
    """Return what a program costs at axis sizes."""
    return CostFigures(
        macs=analysis.macs.at(sizes),
        parameters=analysis.parameters.at(sizes),
        bytes=analysis.bytes.at(sizes),
    )


def _lost(scores: NDArray[np.float64] | None, kept: NDArray[np.int64]) -> float | None:
    """Return which part of the total score goes, rounded so that it reads and diffs well."""
    if scores is None:
        return None
    total = float(scores.sum())
    return round(1 - float(scores[kept].sum()) / total, 6) if total else 0.0


def _outputs(analysis: Analysis, sizes: Mapping[Axis, int]) -> tuple[str, ...]:
    """Return which sizes of the outputs change, a line each."""
    after = {**analysis.sizes, **{axis.id: size for axis, size in sizes.items()}}
    lines: list[str] = []
    (output,) = analysis.program.graph.find_nodes(op="output")
    for number, node in enumerate(output.all_input_nodes):
        for dim, term in enumerate(analysis.terms(node) or ()):
            cut = [axis for axis in axes_of(term) if sizes.get(axis, axis.size) < axis.size]
            if cut:
                old, new = (polynomial(term).at(each) for each in (analysis.sizes, after))
                names = ", ".join(axis.name for axis in dict.fromkeys(cut))
                lines.append(f"output {number}: size {dim} {old} → {new} ({names})")
    return tuple(lines)
