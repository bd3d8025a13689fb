"""The steps of a pipeline, and the events that a run tells of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fxcompress.errors import UsageError
from fxcompress.pipeline.base import Options, Pass

__all__ = ["Event", "OnEvent", "Pipeline", "Round", "Step"]


@dataclass(frozen=True)
class Step:
    """One pass with its options.

    Attributes:
        id: Its name in the pipeline; unique. Names checkpoints, so no path separators.
        use: The pass's name in the catalog, e.g. `quantize.static`.
        pass_: The pass.
        options: Checked options, an instance of the pass's `Options`.
        where: `spec.yaml:12`, or empty when composed in code.
        round: Which round of which step it belongs to, if any.
    """

    id: str
    use: str
    pass_: Pass[Any, Any]
    options: Options
    where: str = ""
    round: Round | None = None


@dataclass(frozen=True)
class Round:
    """The place of a step in a pass that is rounds of steps.

    Attributes:
        owner: The step of the spec that it belongs to.
        number: The round, from 1.
        name: The step's id within the round.
        first: Whether it is the round's first step.
        last: Whether it is the round's last step.
    """

    owner: Step
    number: int
    name: str
    first: bool
    last: bool


@dataclass(frozen=True)
class Pipeline:
    """Steps in the order they are applied.

    Raises:
        UsageError: Two steps have the same id, or an id that cannot name a folder.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for step in self.steps:
            if step.id in seen:
                raise UsageError(
                    f"two passes have the id {step.id}",
                    reason="checkpoints, locks and reports name passes by id",
                    hint="give one of them another `id:`",
                    where=step.where or None,
                )
            if not step.id or step.id != step.id.strip(". ") or set(step.id) & set('/\\:*?"<>|\n'):
                raise UsageError(
                    f"{step.id!r} cannot be the id of a pass",
                    reason="the id names a folder of the run",
                    hint="use letters, digits, dots, dashes and underscores",
                    where=step.where or None,
                )
            seen.add(step.id)

    def check_follows(self) -> None:
        """Check that each step reads results of earlier steps alone.

        Raises:
            UsageError: One reads the result of a step that does not come before it.
        """
        before: list[str] = []
        for step in self.steps:
            for name in sorted(step.pass_.follows(step.options)):
                if name not in before:
                    raise UsageError(
                        f"{step.id} reads the result of the step {name}, which is not before it",
                        reason=f"before it come {', '.join(before) or 'none'}",
                        hint="name an earlier step by its `id`",
                        where=step.where or None,
                    )
            before.append(step.id)

    def read_from(self, done: int) -> frozenset[str]:
        """Return the ids of the steps whose results are read after the first `done` steps."""
        later = self.steps[done:]
        return frozenset().union(*(step.pass_.follows(step.options) for step in later))

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Event:
    """Something that happened in a run or a plan, for progress bars and logs.

    Attributes:
        kind: `start` and `end` frame a step; `progress` counts inside it; `resume` says that the
            step was taken from its checkpoint.
        step: The step's id; empty for the run as a whole.
        index: The step's place, from 1.
        steps: How many steps there are.
        text: What is going on, e.g. `calibrating`.
        done: Units done (`progress`).
        total: Units in all, where that is known.
    """

    kind: Literal["start", "progress", "resume", "end"]
    step: str
    index: int
    steps: int
    text: str = ""
    done: int = 0
    total: int | None = None


OnEvent = Callable[[Event], None]
