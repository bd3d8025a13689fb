"""The report of a result, with what followed the passes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.api._figures import metrics_of
from fxcompress.report import build
from fxcompress.report.build import Extras
from fxcompress.report.model import ArtifactRow, ConstraintRow

if TYPE_CHECKING:
    from fxcompress.api._result import Result
    from fxcompress.emit import Artifact
    from fxcompress.report import Report
    from fxcompress.spec import ConstraintResult

__all__ = ["report_of"]


def report_of(
    result: Result, constraints: Sequence[ConstraintResult], artifacts: Sequence[Artifact]
) -> Report:
    """Return the report of a result; constraints that nothing was measured for are left out."""
    job = result.job
    metric = job.context.metric
    extras = Extras(
        spec_name=_shown(job.source),
        date=_now(),
        spec_text="" if job.spec is None else job.spec.resolved_yaml(),
        lock=result.lock.model_dump_json(indent=2),
        metric_name=result.record.metric_name,
        metrics=metrics_of(result.record),
        higher_is_better=metric is None or metric.higher_is_better,
        constraints=tuple(_limit(each) for each in constraints if each.met is not None),
        artifacts=tuple(_file(each) for each in artifacts),
    )
    return build(result.record, result.original, result.program, extras)


def _limit(checked: ConstraintResult) -> ConstraintRow:
    return ConstraintRow(
        name=checked.name, limit=checked.limit, value=checked.reached, met=bool(checked.met)
    )


def _file(made: Artifact) -> ArtifactRow:
    return ArtifactRow(
        format=made.format,
        path=made.path.name,
        bytes=made.bytes,
        sha256=made.sha256[made.path.name],
        check=f"reloaded in a fresh process: error {made.comparison.relative:.1e} of the range, "
        f"cosine {made.comparison.cosine:.5f}",
        notes=made.notes,
    )


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
