"""Find the teacher that a spec names, as a Program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.errors import FxCompressError, ModelError, UsageError

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.train._teacher_options import Teacher, TeacherFrom

__all__ = ["load_teacher"]


def load_teacher(teacher: Teacher | None, context: Context) -> Program | None:
    """Return the Program of a teacher; None without one, or where there is no original.

    Raises:
        UsageError: None was given.
        ModelError: The spec or run folder is missing or damaged, or holds no model.
    """
    if teacher is None:
        return None
    if teacher == "original":
        return context.original
    if teacher == "given":
        if context.teacher is None:
            raise UsageError(
                "there is no teacher", hint="give one: `compress(program, recipe, teacher=...)`"
            )
        return context.teacher
    return _elsewhere(teacher, context)


def _elsewhere(teacher: TeacherFrom, context: Context) -> Program:
    if teacher.step is not None:
        return _of_step(teacher.step, context)
    text = teacher.spec or teacher.run or ""
    path = context.folder / Path(text).expanduser()
    if not path.exists():
        what = "spec" if teacher.spec else "run folder"
        raise ModelError(
            f"the teacher's {what} {text} is not there",
            reason=f"there is nothing at {path.resolve()}",
            hint="paths are relative to the spec",
            where=text,
        )
    try:
        return _of_spec(path, planning=context.planning) if teacher.spec else _of_run(path)
    except FxCompressError as error:
        raise ModelError(
            f"the teacher of {text} cannot be loaded: {error.what}",
            reason=error.reason,
            hint=error.hint,
            where=error.where or text,
        ) from error


def _of_step(name: str, context: Context) -> Program:
    if name not in context.steps:
        raise UsageError(
            f"there is no result of the step {name} to learn from",
            reason="no step before this one has that id",
            hint="name an earlier step of the same pipeline by its `id`",
            where=name,
        )
    return context.steps[name]


def _of_spec(path: Path, *, planning: bool) -> Program:
    from fxcompress.spec import Spec, load_program

    return load_program(Spec.load(path), meta=planning)


def _of_run(path: Path) -> Program:
    from fxcompress.pipeline import RunFolder
    from fxcompress.pipeline.checkpoints import Checkpoints

    record = RunFolder(path).record()
    if record is None:
        raise ModelError(
            f"{path.name} is no run folder",
            reason="it has no run.json",
            hint="name the folder that `fxcompress run` wrote",
        )
    if record.state != "done":
        raise ModelError(
            f"the run in {path.name} is not finished ({record.state})",
            hint="finish it with `fxcompress run SPEC --resume`",
        )
    checkpoints = Checkpoints(path / "checkpoints")
    return checkpoints.load(checkpoints.completed(record.course)[-1])
