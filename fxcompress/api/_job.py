"""What is to be done, planned and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.analysis import CostSummary
from fxcompress.api._figures import costs
from fxcompress.api._result import Result
from fxcompress.ir import Program
from fxcompress.pipeline import Context, Limit, Lock, Plan, RunFolder, Step
from fxcompress.pipeline import execute as execute_steps
from fxcompress.pipeline import plan as plan_steps
from fxcompress.pipeline.planning import Limits
from fxcompress.spec import Figures, Spec, check_constraints

if TYPE_CHECKING:
    from fxcompress.pipeline.steps import OnEvent

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What is to be done to which Program, with which data.

    Attributes:
        program: The original.
        steps: Checked steps.
        context: Data, metric, seed and provenance.
        spec: Where it comes from, if it comes from a spec.
        source: The spec file, or empty.
        owned: The Program was made for this job, so a run may move its weights to its folder.
    """

    program: Program
    steps: tuple[Step, ...]
    context: Context
    spec: Spec | None = None
    source: str = ""
    owned: bool = False

    def plan(self, on_event: OnEvent | None = None) -> Plan:
        """Say what would be done; the model is not run.

        Raises:
            FxCompressError: A pass would fail, or change nothing.
        """
        return plan_steps(
            self.program,
            self.steps,
            self.context,
            limits=self.limits,
            source=self.source,
            on_event=on_event,
        )

    def run(
        self,
        run_dir: str | Path | RunFolder | None = None,
        *,
        lock: Lock | None = None,
        plan: Plan | None = None,
        resume: bool = False,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
    ) -> Result:
        """Do it; the arguments are those of `pipeline.execute`.

        Raises:
            FxCompressError: A check, a pass or the run folder failed.
        """
        documents = {} if self.spec is None else {"spec.resolved.yaml": self.spec.resolved_yaml()}
        done = execute_steps(
            self.program,
            self.steps,
            self.context,
            run_dir,
            lock=lock,
            plan=plan,
            resume=resume,
            overwrite=overwrite,
            spill=self.owned,
            documents=documents,
            on_event=on_event,
        )
        return Result(self, done)

    @property
    def limits(self) -> Limits | None:
        """How a plan checks the spec's constraints; None without a spec."""
        spec = self.spec
        if spec is None:
            return None

        def check(original: CostSummary, now: CostSummary) -> list[Limit]:
            figures = Figures(costs(original), costs(now))
            return [
                Limit(name=each.name, limit=each.limit, value=each.value, met=each.met)
                for each in check_constraints(spec.constraints, figures)
                if each.name in costs(now)
            ]

        return check
