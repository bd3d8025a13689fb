"""Passes that are rounds of other passes: a run takes them step by step, and may stop early."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fxcompress.errors import PassError, UsageError
from fxcompress.pipeline.base import Decision, OptionsT, Pass, Preserves
from fxcompress.pipeline.steps import Round, Step

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.records import RunRecord
    from fxcompress.rewrite import GraphRewriter
    from fxcompress.train.metrics import Metric

__all__ = [
    "Rounds",
    "Stop",
    "can_be_undone",
    "check_metric",
    "earlier",
    "expanded",
    "stop_of",
    "without",
]

AnyDecision: TypeAlias = Decision


class Rounds(Pass[OptionsT, Decision]):
    """A pass that is a list of steps, repeated.

    A run and a plan put its steps in its place, named `<id>.<round>.<step>`: each is checked,
    checkpointed, locked and reported like any other. After a round `stop` may say that it went too
    far; then it is undone, and the run goes on after the last round.
    """

    Decision: ClassVar[type[Decision]] = Decision
    preserves: ClassVar[Preserves] = "approximate"

    @abstractmethod
    def rounds(self, options: OptionsT) -> Sequence[Sequence[Step]]:
        """Return the steps of each round; their ids are unique within it."""

    def reads(self, options: OptionsT) -> frozenset[str]:
        """Return the splits that the steps of all rounds cannot do without."""
        steps = [step for steps in self.rounds(options) for step in steps]
        return frozenset().union(*(step.pass_.reads(step.options) for step in steps))

    def needs_metric(self, options: OptionsT) -> bool:
        """Whether `stop` must be told the metric."""
        return False

    def stop(self, options: OptionsT, before: float, after: float, metric: Metric) -> str | None:
        """Return why a round went too far, or None.

        Args:
            options: The pass's options.
            before: The metric before the first round.
            after: The metric after this one.
            metric: Which metric that is.
        """
        return None

    def decide(self, program: Program, options: OptionsT, context: Context) -> AnyDecision:
        """Refuse: there is nothing to decide at once.

        Raises:
            PassError: Always.
        """
        raise self._only_in_steps()

    def rewrite(self, rewriter: GraphRewriter, decision: AnyDecision) -> None:
        """Refuse: there is nothing to rewrite at once.

        Raises:
            PassError: Always.
        """
        raise self._only_in_steps()

    def _only_in_steps(self) -> PassError:
        return PassError(
            f"{type(self).__name__} is a list of steps, not one",
            hint="give it to `run`, `plan` or `compress`, which take it step by step",
        )


@dataclass(frozen=True)
class Stop:
    """A round that went too far: what is undone, what is left out, and why.

    Attributes:
        keep: How many passes stay.
        dropped: Ids of the steps that are undone or not taken.
        reason: Why.
    """

    keep: int
    dropped: tuple[str, ...]
    reason: str


def expanded(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps with those of every Rounds in its place."""
    found: list[Step] = []
    for step in steps:
        if not isinstance(step.pass_, Rounds):
            found.append(step)
            continue
        for number, inner in enumerate(step.pass_.rounds(step.options), start=1):
            for place, each in enumerate(inner, start=1):
                mine = Round(step, number, each.id, place == 1, place == len(inner))
                name = f"{step.id}.{number}.{each.id}"
                found.append(replace(each, id=name, where=step.where, round=mine))
    return tuple(found)


def without(steps: Iterable[Step], kept: Collection[str]) -> tuple[Step, ...]:
    """Return the steps, of rounds only those that are named: a lock's, say."""
    return tuple(step for step in steps if step.round is None or step.id in kept)


def earlier(step: Step, decided: Mapping[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return what the same step decided in the rounds before this one.

    Args:
        step: The step.
        decided: Id -> decision of all steps so far.
    """
    mine = step.round
    if mine is None:
        return ()
    names = (f"{mine.owner.id}.{number}.{mine.name}" for number in range(1, mine.number))
    return tuple(decided[name] for name in names)


def check_metric(steps: Iterable[Step], metric: Metric | None) -> None:
    """Refuse rounds that a metric stops where there is none.

    Raises:
        UsageError: There is no metric.
    """
    for step in steps:
        if metric is None and can_be_undone(step):
            assert step.round is not None, "only a round can be undone"
            raise UsageError(
                f"{step.round.owner.id} stops by the metric, and there is none",
                hint="add a `metric` to the spec, or take `metric_drop` out",
                where=step.where or None,
            )


def can_be_undone(step: Step) -> bool:
    """Whether a round begins that the run may have to go back from."""
    mine = step.round
    if mine is None or not mine.first:
        return False
    return _series(mine).needs_metric(mine.owner.options)


def stop_of(steps: Sequence[Step], record: RunRecord, metric: Metric | None) -> Stop | None:
    """Return whether the round that was just finished went too far.

    Raises:
        PassError: The first round did: there is nothing to go back to.
    """
    done = len(record.passes)
    mine = steps[done - 1].round if done else None
    if metric is None or mine is None or not mine.last:
        return None
    of_series = [i for i, s in enumerate(steps) if s.round and s.round.owner.id == mine.owner.id]
    first = of_series[0]
    before = record.passes[first - 1].metric if first else record.original_metric
    after = record.passes[-1].metric
    if before is None or after is None:
        return None
    reason = _series(mine).stop(mine.owner.options, before, after, metric)
    if reason is None:
        return None
    undone = [i for i in of_series if (each := steps[i].round) and each.number >= mine.number]
    if mine.number == 1:
        raise PassError(
            f"the first round of {mine.owner.id} goes too far",
            reason=reason,
            hint="take smaller steps, train longer, or allow a larger drop",
            where=mine.owner.where or None,
        )
    return Stop(undone[0], tuple(steps[i].id for i in undone), f"round {mine.number}: {reason}")


def _series(mine: Round) -> Rounds[Any]:
    found = mine.owner.pass_
    assert isinstance(found, Rounds), "only Rounds are expanded into rounds"
    return found
