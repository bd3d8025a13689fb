"""The plan: what a pipeline would do, as plain data that can be read, kept and executed later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fxcompress._files import write_text
from fxcompress.analysis import CostSummary
from fxcompress.errors import LockError, PassError
from fxcompress.pipeline.base import Decision
from fxcompress.pipeline.lock import Lock, PassLock, array_digests
from fxcompress.pipeline.records import FORMAT_VERSION
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.pipeline.steps import Pipeline, Step

__all__ = ["Change", "Limit", "Plan", "PlanStep"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Change(_Part):
    """One line of a plan: what is added, removed or changed, and how.

    `follows` marks a node whose type alone changed because something before it did.
    """

    sign: Literal["+", "-", "~"]
    subject: str
    text: str = ""
    follows: bool = False


class Limit(_Part):
    """A constraint of the spec against the figures of one column; `met` is None if unknown."""

    name: str
    limit: str
    value: float | None = None
    met: bool | None = None


class PlanStep(_Part):
    """What one pass would do.

    Attributes:
        series: The step of the spec that it is a round of, if any.
        summary: What the decision says of itself, a line each.
        changes: By module, in graph order.
        declined: What it would leave as it is, and why.
        pending: What only a run can know (`scale: known after calibration`).
        cost: Cost after it.
        limits: The spec's constraints after it.
        settled: Nothing is pending up to here, so a run decides exactly this.
        arrays: Digest of each array of the decision.
    """

    index: int
    id: str
    use: str
    where: str = ""
    series: str = ""
    summary: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    declined: tuple[Declined, ...] = ()
    pending: tuple[str, ...] = ()
    cost: CostSummary
    limits: tuple[Limit, ...] = ()
    settled: bool = True
    arrays: Mapping[str, str] = {}

    def count(self, sign: str) -> int:
        """How many changes there are of a sign, those that only follow left out."""
        return sum(change.sign == sign and not change.follows for change in self.changes)


class Plan(_Part):
    """What a pipeline would do to a Program.

    Attributes:
        source: The spec file, for `run plan.json`.
        basis: What it was planned from, and what was decided: a lock without data.
        original: Cost of the original.
    """

    format_version: str = FORMAT_VERSION
    name: str
    source: str = ""
    basis: Lock
    original: CostSummary
    steps: tuple[PlanStep, ...]

    @property
    def result(self) -> CostSummary:
        """Cost after the last step."""
        return self.steps[-1].cost if self.steps else self.original

    def check(self, now: Lock, pipeline: Pipeline) -> None:
        """Check that spec, model, passes and software are those of the plan.

        Raises:
            LockError: Something changed; every difference is named.
        """
        drift = self.basis.drift(now, pipeline)
        if drift:
            raise LockError(
                "the plan does not match what is here",
                reason="; ".join(drift),
                hint="make the plan again",
                where=self.source or None,
            )

    def check_decision(self, step: Step, entry: PassLock, decision: Decision) -> None:
        """Check that a run decided what was planned, as far as that was settled.

        Raises:
            PassError: It decided something else.
        """
        planned = next(each for each in self.steps if each.id == step.id)
        locked = next(each for each in self.basis.passes if each.id == step.id)
        if not planned.settled:
            return
        same_arrays = array_digests(decision.arrays) == dict(planned.arrays)
        if dict(locked.decision) != dict(entry.decision) or not same_arrays:
            raise PassError(
                f"pass {step.id} decided something else than was planned",
                reason="spec, model and software are the same, so the pass is not repeatable",
                hint="make the plan again, and compare the two",
                where=step.where or None,
            )

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON."""
        return write_text(Path(path), self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            LockError: It is missing, damaged or of another format.
        """
        try:
            return Plan.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise LockError(
                "the plan cannot be read",
                reason=str(error).splitlines()[0],
                hint="make it again with `fxcompress plan SPEC -o plan.json`",
                where=str(path),
            ) from error
