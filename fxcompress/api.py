"""The Python API: compress a Program by a spec, or by passes composed in code.

import fxcompress as fxc

program = fxc.capture(model, (x,))
result = fxc.compress(program, fxc.Spec.load("spec.yaml"))
result = fxc.compress(
    program,
    [fxc.passes.tidy.fold_batchnorm(), {"use": "quantize.static", "calibration": 64}],
    data={"calibration": batches},
)
result.emit("out/", ["pt2", "onnx"])
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fxcompress._pass_factories import PassFactories
from fxcompress.analysis import CostSummary
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.pipeline import Context, Execution, Limit, Lock, Plan, RunFolder, RunRecord, Step
from fxcompress.pipeline import execute as execute_steps
from fxcompress.pipeline import plan as plan_steps
from fxcompress.pipeline.planning import Limits
from fxcompress.spec import (
    Figures,
    Spec,
    check_constraints,
    load_data,
    load_metric,
    load_program,
    parse_steps,
)

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.emit import Artifact, EmitOptions
    from fxcompress.pipeline.steps import OnEvent
    from fxcompress.report import Report
    from fxcompress.spec import ConstraintResult
    from fxcompress.train.metrics import Metric

__all__ = ["Job", "Result", "compress", "passes", "prepare"]

passes = PassFactories()
"""Every installed pass as a function of its options: `passes.quantize.static(bits=8)`."""

Recipe: TypeAlias = Spec | Sequence[Step | Mapping[str, Any]]
"""A spec, or steps: what `passes` makes, mappings as in a spec, or checked Steps."""


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
            figures = Figures(_costs(original), _costs(now))
            return [
                Limit(name=each.name, limit=each.limit, value=each.value, met=each.met)
                for each in check_constraints(spec.constraints, figures)
                if each.name in _costs(now)
            ]

        return check


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
        from fxcompress.report import build
        from fxcompress.report.build import Extras
        from fxcompress.report.model import ArtifactRow, ConstraintRow

        metric = self.job.context.metric
        rows = tuple(
            ConstraintRow(
                name=each.name,
                limit=each.limit,
                value=each.reached,
                met=bool(each.met),
            )
            for each in (self.constraints if constraints is None else constraints)
            if each.met is not None
        )
        made = tuple(
            ArtifactRow(
                format=each.format,
                path=each.path.name,
                bytes=each.bytes,
                sha256=each.sha256[each.path.name],
                check=f"reloaded in a fresh process: error {each.comparison.relative:.1e} of the "
                f"range, cosine {each.comparison.cosine:.5f}",
                notes=each.notes,
            )
            for each in artifacts
        )
        extras = Extras(
            spec_name=_shown(self.job.source),
            date=_now(),
            spec_text="" if self.job.spec is None else self.job.spec.resolved_yaml(),
            lock=self.lock.model_dump_json(indent=2),
            metric_name=self.record.metric_name,
            metrics=self._metrics(),
            higher_is_better=metric is None or metric.higher_is_better,
            constraints=rows,
            artifacts=made,
        )
        return build(self.record, self.original, self.program, extras)

    def figures(self, **measured: float) -> Figures:
        """Return the figures that constraints are checked against.

        Args:
            measured: Further figures of the result, e.g. `latency` in seconds.
        """
        last = self.record.passes[-1] if self.record.passes else None
        result = {**_costs(self.record.result), **measured}
        original = _costs(self.record.original)
        if last is not None and last.to_original is not None:
            result["output_error"] = last.to_original.relative
            result["cosine"] = last.to_original.cosine
            result["sqnr"] = last.to_original.sqnr_db
        metrics = self._metrics()
        if metrics:
            original["metric"] = metrics[0]
            result["metric"] = metrics[max(metrics)]
        metric = self.job.context.metric
        return Figures(original, result, metric is None or metric.higher_is_better)

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

    def _metrics(self) -> dict[int, float]:
        found = {0: self.record.original_metric}
        found.update({each.index: each.metric for each in self.record.passes})
        return {index: value for index, value in found.items() if value is not None}


def compress(
    program: Program,
    recipe: Recipe,
    *,
    data: Mapping[str, Iterable[Any]] | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    run_dir: str | Path | RunFolder | None = None,
    lock: Lock | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Compress a Program; it is not changed.

    Args:
        program: What `capture` returned.
        recipe: A spec (its `model` is not built: `program` stands for it), or passes.
        data: Split name -> re-iterable of batches; a batch is a tuple of positional or a mapping
            of keyword arguments, and labelled splits give `(batch, target)`. Replaces a spec's.
        metric: What results are judged by. Replaces a spec's.
        seed: Replaces a spec's; 0 by default.
        run_dir: Where to keep checkpoints, lock and record; nowhere if None.
        lock: Replay these decisions.
        resume: Go on with the run in `run_dir`.
        overwrite: Throw away the run in `run_dir`.
        on_event: Told of every step.

    Raises:
        FxCompressError: The recipe is not valid, or a check, a pass or the run folder failed.
    """
    job = prepare(recipe, program, data=data, metric=metric, seed=seed)
    return job.run(run_dir, lock=lock, resume=resume, overwrite=overwrite, on_event=on_event)


def prepare(
    recipe: Recipe,
    program: Program | None = None,
    *,
    data: Mapping[str, Iterable[Any]] | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    meta: bool = False,
) -> Job:
    """Make the Job of a recipe: capture a spec's model, load its data and metric, check steps.

    Args:
        recipe: A spec or passes.
        program: The original; a spec's own model if None.
        data: Replaces a spec's data.
        metric: Replaces a spec's metric.
        seed: Replaces a spec's seed.
        meta: Allocate no weights where the spec's model is built (for plans).

    Raises:
        FxCompressError: The recipe is not valid, or what it names cannot be loaded.
    """
    if not isinstance(recipe, Spec):
        if program is None:
            raise UsageError("passes alone name no model", hint="give a Program, or a Spec")
        context = Context(data=data or {}, seed=seed or 0, name=program.name, metric=metric)
        return Job(program, _steps(recipe), context)
    spec = recipe
    context = Context(
        data=load_data(spec) if data is None else data,
        seed=spec.seed if seed is None else seed,
        name=spec.title,
        spec=spec.digest,
        folder=spec.folder,
        metric=load_metric(spec) if metric is None else metric,
        reproduce=_named_by(spec),
    )
    original = load_program(spec, meta=meta) if program is None else program
    source = str(spec.files[0]) if spec.files else ""
    return Job(original, spec.steps, context, spec, source, owned=program is None)


def _steps(recipe: Sequence[Step | Mapping[str, Any]]) -> tuple[Step, ...]:
    """Return checked steps, those that are checked already in their places."""
    parsed = iter(parse_steps([each for each in recipe if not isinstance(each, Step)]))
    return tuple(each if isinstance(each, Step) else next(parsed) for each in recipe)


def _shown(source: str) -> str:
    """Return a path relative to the working folder where it lies below it."""
    path = Path(source)
    inside = source and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else source


def _now() -> str:
    """Return the time in UTC, or that of SOURCE_DATE_EPOCH, which makes reports reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    seconds = int(epoch) if epoch else time.time()
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _costs(cost: CostSummary) -> dict[str, float]:
    """Return a cost by the names that constraints use."""
    return {
        "size": cost.bytes,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "nodes": cost.nodes,
        "activation_peak": cost.activation_peak,
    }


def _named_by(spec: Spec) -> dict[str, Any]:
    """Return the entries of a spec that a failing pass needs again, with paths made absolute."""
    plain = spec.plain()
    return {key: _absolute(plain[key], spec) for key in ("data", "metric") if key in plain}


def _absolute(value: Any, spec: Spec) -> Any:
    if isinstance(value, Mapping):
        return {key: _absolute(item, spec) for key, item in value.items()}
    if isinstance(value, str):
        file, colon, name = value.partition(":")
        path = spec.path(file)
        return f"{path.resolve()}{colon}{name}" if path.is_file() else value
    return value
