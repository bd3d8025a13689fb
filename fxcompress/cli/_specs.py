"""Specs, plans and run folders as commands are given them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline import Plan, RunRecord
    from fxcompress.spec import Spec

__all__ = ["is_run", "load_programs", "load_record", "spec_or_plan"]


def is_run(path: Path) -> bool:
    """Whether a path is a run folder."""
    return (path / "run.json").is_file()


def spec_or_plan(path: Path, overrides: Sequence[str]) -> tuple[Spec, Plan | None]:
    """Load a spec, or the plan that `fxcompress plan -o` wrote and the spec it was made from.

    Raises:
        SpecError: The spec is not valid.
        LockError: The plan cannot be read.
        UsageError: The plan comes from no spec.
    """
    from fxcompress.spec import Spec

    if path.suffix != ".json":
        return Spec.load(path, overrides), None
    from fxcompress.pipeline import Plan

    plan = Plan.load(path)
    if not plan.source:
        raise UsageError("the plan names no spec", where=str(path), hint="make it from a spec file")
    source = Path(plan.source)
    if not source.is_file() and (path.parent / source).is_file():
        source = path.parent / source
    return Spec.load(source, overrides), plan


def load_record(run: Path) -> RunRecord:
    """Read the record of a run folder.

    Raises:
        UsageError: The folder holds no run.
        RunFolderError: Its record is damaged.
    """
    from fxcompress.pipeline import RunFolder

    record = RunFolder(run).record() if run.is_dir() else None
    if record is None:
        raise UsageError(
            f"{run} is no run folder",
            reason="it has no run.json" if run.is_dir() else "there is no such folder",
            hint="name the folder that `fxcompress run` wrote",
        )
    return record


def load_programs(run: Path) -> tuple[RunRecord, Program, Program]:
    """Read a finished run: its record, the original Program and the result.

    Raises:
        UsageError: The folder holds no run, or one that is not finished.
        RunFolderError: It is damaged.
    """
    from fxcompress.pipeline.checkpoints import Checkpoints

    record = load_record(run)
    if record.state != "done":
        raise UsageError(
            f"the run in {run} is not finished ({record.state})",
            hint="finish it with `fxcompress run SPEC --resume`",
        )
    checkpoints = Checkpoints(run / "checkpoints")
    found = checkpoints.completed(record.course)
    return record, checkpoints.load(found[0]), checkpoints.load(found[-1])
