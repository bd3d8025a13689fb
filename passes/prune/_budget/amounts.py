"""The sizes that a ratio or a number asks of each axis, counted from where pruning started."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fxcompress.axes import Analysis, Axis, Polynomial
from passes.prune._budget.limits import Limits, kept_by_number, kept_by_ratio
from passes.prune._budget.spend import Goal
from passes.prune._targets import amounts
from passes.prune.channels import ChannelsDecision, CostFigures

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context
    from passes.prune.channels import ChannelsOptions

__all__ = ["Start", "sizes_asked_for"]

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """What ratios and shares are of: the program as it is, or as the first round found it.

    Attributes:
        costs: Its costs.
        sizes: The size of each selected axis, by name; the present one where it is not there.
    """

    costs: CostFigures
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, context: Context, analysis: Analysis) -> Start:
        """Return the start of the rounds that this pass is one of, or of this pass alone."""
        if context.rounds:
            first = ChannelsDecision.model_validate_json(json.dumps(dict(context.rounds[0])))
            return cls(first.before, {entry.name: entry.size for entry in first.axes})
        sizes = analysis.sizes
        now = CostFigures(
            macs=analysis.macs.at(sizes),
            parameters=analysis.parameters.at(sizes),
            bytes=analysis.bytes.at(sizes),
        )
        return cls(now, {})

    def size(self, axis: Axis) -> int:
        """Return the size that an axis started with."""
        return self.sizes.get(axis.name, axis.size)

    def indices_goal(self, axes: Sequence[Axis], ratio: float) -> Goal:
        """Return the goal that a ratio of all indices of some axes goes."""
        whole = float(sum(map(self.size, axes)))
        count = Polynomial.total(Polynomial.size_of(axis.id) for axis in axes)
        return Goal("indices", count, (1 - ratio) * whole, whole, f"{1 - ratio:.0%}")


def sizes_asked_for(
    axes: Sequence[Axis], options: ChannelsOptions, limits: Limits, start: Start
) -> dict[Axis, int]:
    """Return the size of each axis by its ratio or number; the others stay whole.

    Raises:
        SelectorError: A glob fits no axis.
        UsageError: An axis cannot have such a size.
    """
    sizes = {axis: axis.size for axis in axes}
    if options.keep is not None:
        for axis, number in _each(options.keep, axes, "keep").items():
            whole = start.size(axis)
            gone = math.floor(options.reached * (whole - number) + 1e-9)
            sizes[axis] = kept_by_number(axis, max(number, whole - gone), limits)
    elif options.ratio is not None:
        for axis, ratio in _each(options.ratio, axes, "ratio").items():
            part = ratio * options.reached
            sizes[axis] = kept_by_ratio(axis, part, limits, start=start.size(axis))
    return sizes


def _each(value: T | Mapping[str, T], axes: Sequence[Axis], what: str) -> dict[Axis, T]:
    if isinstance(value, Mapping):
        return amounts(value, axes, what)
    return dict.fromkeys(axes, value)
