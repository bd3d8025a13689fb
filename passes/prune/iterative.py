"""Prune in small steps, with other passes after each: fine-tuning, most of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fxcompress.errors import FxCompressError
from fxcompress.pipeline.base import Options
from fxcompress.pipeline.rounds import Rounds
from fxcompress.pipeline.steps import Step
from fxcompress.spec.units import Drop, Percent
from passes.prune.channels import Budget, Channels, ChannelsOptions, PruneOptions

if TYPE_CHECKING:
    from fxcompress.train.metrics import Metric

__all__ = ["Iterative"]


class IterativeOptions(Options):
    """Options of `prune.iterative`: one of `ratio` and `budget` says where it ends."""

    prune: PruneOptions = Field(
        default=PruneOptions(), description="Options of prune.channels, the amount aside."
    )
    ratio: Percent | dict[str, Percent] | None = Field(
        default=None, description="Which part is gone in the end, as for prune.channels."
    )
    budget: Budget | None = Field(
        default=None, description="What the result may cost; latency is not for steps."
    )
    scope: Literal["global", "local"] | None = Field(
        default=None, description="As for prune.channels."
    )
    steps: int = Field(
        default=10, ge=1, le=100, description="Rounds; ten take 5 % each on the way to 50 %."
    )
    schedule: Literal["linear", "exponential", "cubic"] = Field(
        default="linear",
        description="How much each round takes: the same; the same part of what is left; or much "
        "at first and little in the end.",
    )
    passes: tuple[dict[str, Any], ...] = Field(
        default=(), description="Passes after each pruning, as in a spec: `use: train.fit` …"
    )
    metric_drop: Drop | None = Field(
        default=None,
        description="Stop before the metric falls by more: the round that makes it is undone.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.ratio is None) == (self.budget is None):
            raise ValueError("give exactly one of ratio and budget")
        if self.budget is not None and self.budget.latency is not None:
            raise ValueError("a latency budget cannot be split into steps: give one on macs")
        try:
            nested = _parsed(self.passes)
            self.amount(1.0)
        except FxCompressError as error:
            raise ValueError(f"passes: {error}") from error
        if any(isinstance(step.pass_, Rounds) for step in nested):
            raise ValueError("passes: rounds cannot hold rounds")
        if any(step.id == "prune" for step in nested):
            raise ValueError("passes: `prune` is the id of the pruning itself; choose another")
        return self

    def reached(self, round_: int) -> float:
        """Return which part of the way is gone after a round, from 1 to `steps`.

        Linear: k/n. Cubic: 1 − (1 − k/n)³. Exponential: every round leaves the same part of what it
        finds, (1 − r^(k/n)) / (1 − r) for r = 0.5 or, with one ratio, what that leaves.
        """
        part = round_ / self.steps
        if self.schedule == "linear":
            return part
        if self.schedule == "cubic":
            return 1 - (1 - part) ** 3
        left = max(1 - self.ratio, 1e-3) if isinstance(self.ratio, float) else 0.5
        if self.budget is not None:
            shares = [a.value for a in self.budget.costs.values() if a.relative and a.value < 1]
            left = max(min(shares, default=left), 1e-3)
        return (1 - left**part) / (1 - left) if left < 1 else part

    def amount(self, reached: float) -> ChannelsOptions:
        """Return the options of the pruning that goes so far."""
        same = {name: getattr(self.prune, name) for name in PruneOptions.model_fields}
        return ChannelsOptions(
            **same, ratio=self.ratio, budget=self.budget, scope=self.scope, reached=reached
        )


class Iterative(Rounds[IterativeOptions]):
    """Prune and recover, round after round, until an amount or a drop of the metric is reached.

    Round k of n removes up to the part f(k/n) of the whole amount, counted from where the first
    round began, then the nested `passes` run. f is linear, cubic (1 − (1 − x)³: Zhu & Gupta, 2017,
    arXiv:1710.01878, equation 1), or exponential: each round takes the same part of what it finds.

    Every step of every round is a step of the run, named `<id>.<round>.prune`, `<id>.<round>.fit`,
    and checkpointed, locked and reported like any other. With `metric_drop`, the metric is compared
    after each round with that before the first; a round that falls below is undone, and the run
    goes on with the round before.

    Preserves: approximate. Needs what the criterion and the nested passes need, and a metric for
    `metric_drop`.
    """

    Options: ClassVar[type[Options]] = IterativeOptions

    def rounds(self, options: IterativeOptions) -> Sequence[Sequence[Step]]:
        """Return, for each round, the pruning and the nested passes.

        Raises:
            SpecError: A nested pass is unknown, or an option is wrong.
        """
        nested = _parsed(options.passes)
        return [
            (
                Step("prune", "prune.channels", Channels(), options.amount(options.reached(k))),
                *nested,
            )
            for k in range(1, options.steps + 1)
        ]

    def needs_metric(self, options: IterativeOptions) -> bool:
        """Whether a drop of the metric ends it."""
        return options.metric_drop is not None

    def stop(
        self, options: IterativeOptions, before: float, after: float, metric: Metric
    ) -> str | None:
        """Return by how much the metric fell, if that is too much."""
        if options.metric_drop is None:
            return None
        drop = before - after if metric.higher_is_better else after - before
        if drop <= options.metric_drop.of(abs(before)) + 1e-12:
            return None
        return (
            f"{metric.name} went from {before:.4g} to {after:.4g}, which is more than "
            f"{options.metric_drop}"
        )


def _parsed(passes: Sequence[dict[str, Any]]) -> tuple[Step, ...]:
    from fxcompress.spec import parse_steps

    return parse_steps(passes) if passes else ()
