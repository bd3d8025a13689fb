"""How far a run is, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fxcompress.pipeline.steps import Pipeline, Step

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline._step import Applied
    from fxcompress.pipeline.lock import Lock
    from fxcompress.pipeline.records import RunRecord
    from fxcompress.pipeline.rounds import Stop

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """The last good Program, and what led to it.

    Attributes:
        program: The Program after the last pass that is done.
        record: What is done, and which steps are left out.
        lock: The decisions made so far.
        pipeline: The steps of the run, without those that are left out.
    """

    program: Program
    record: RunRecord
    lock: Lock
    pipeline: Pipeline

    @property
    def done(self) -> int:
        """How many passes are done."""
        return len(self.record.passes)

    @property
    def next(self) -> Step | None:
        """The step to take now; None at the end."""
        return self.pipeline.steps[self.done] if self.done < len(self.pipeline) else None

    def noted(self, **update: Any) -> State:
        """Return the same state with other entries in its record."""
        return replace(self, record=self.record.model_copy(update=update))

    def left_out(self, reasons: Mapping[str, str]) -> State:
        """Return the state of a run without some steps: id -> why."""
        stopped = {**self.record.stopped, **reasons}
        kept = Pipeline(tuple(step for step in self.pipeline if step.id not in stopped))
        return replace(self.noted(stopped=stopped), pipeline=kept)

    def after(self, applied: Applied) -> State:
        """Return the state after a pass, its decision not yet locked."""
        done = self.noted(passes=(*self.record.passes, applied.record))
        return replace(done, program=applied.program)

    def undone(self, stop: Stop, program: Program) -> State:
        """Return the state before a round that went too far.

        Args:
            stop: What is undone and left out.
            program: The Program before that round.
        """
        undone = {each.id for each in self.record.passes[stop.keep :]}
        back = self.noted(passes=self.record.passes[: stop.keep])
        back = replace(back, program=program, lock=self.lock.without(undone))
        return back.left_out(dict.fromkeys(stop.dropped, stop.reason))
