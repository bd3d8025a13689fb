"""What came of a job: Programs, record, figures, report, artefacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.api._figures import figures_of
from fxcompress.ir import Program
from fxcompress.pipeline import Execution, Lock, Plan, RunRecord
from fxcompress.spec import Figures, check_constraints

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.api._job import Job
    from fxcompress.emit import Artifact, EmitOptions
    from fxcompress.report import Report
    from fxcompress.spec import ConstraintResult

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """What came of a Job.

    Attributes:
        job: What was to be done.
        execution: What was done: Programs, record and lock.
    """

    job: Job
    execution: Execution = field(repr=False)

    @property
    def program(self) -> Program:
        """The compressed Program."""
        return self.execution.program

    @property
    def original(self) -> Program:
        """The Program that was given."""
        return self.execution.original

    @property
    def module(self) -> fx.GraphModule:
        """The compressed model: call it like the original, train it, take its state dict."""
        return self.execution.program.module

    @property
    def record(self) -> RunRecord:
        """What every pass did, cost and showed."""
        return self.execution.record

    @property
    def lock(self) -> Lock:
        """Every decision, and the hashes of what it was made from."""
        return self.execution.lock

    @cached_property
    def plan(self) -> Plan:
        """The plan of the same job, made when it is asked for."""
        return self.job.plan()

    @cached_property
    def constraints(self) -> tuple[ConstraintResult, ...]:
        """The spec's constraints against what was measured."""
        if self.job.spec is None:
            return ()
        return tuple(check_constraints(self.job.spec.constraints, self.figures()))

    @cached_property
    def report(self) -> Report:
        """The report, ready for `report.render_html` and `render_markdown`."""
        return self.build_report()

    def build_report(
        self,
        *,
        constraints: Sequence[ConstraintResult] | None = None,
        artifacts: Sequence[Artifact] = (),
    ) -> Report:
        """Return the report with what followed the passes.

        Args:
            constraints: Results to show in place of `constraints`.
            artifacts: What was emitted.
        """
        from fxcompress.api._report import report_of

        shown = self.constraints if constraints is None else constraints
        return report_of(self, shown, artifacts)

    def figures(self, **measured: float) -> Figures:
        """Return the figures that constraints are checked against.

        Args:
            measured: Further figures of the result, e.g. `latency` in seconds.
        """
        metric = self.job.context.metric
        upwards = metric is None or metric.higher_is_better
        return figures_of(self.record, upwards, measured)

    def emit(
        self,
        directory: str | Path,
        formats: Sequence[str] = ("pt2",),
        *,
        options: EmitOptions | None = None,
    ) -> tuple[Artifact, ...]:
        """Write the result in each format and prove it by reloading; see `fxcompress.emit.emit`.

        Raises:
            EmitError: A format cannot be written, or computes something else after reloading.
        """
        from fxcompress.emit import emit

        return emit(self.program, directory, formats, options=options)
