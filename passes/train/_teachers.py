"""Find the teacher that a spec names, as a Program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.errors import UsageError
from fxcompress.spec.load_teacher import load_teacher as load_elsewhere

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
    return load_elsewhere(context.folder, spec=teacher.spec, run=teacher.run, meta=context.planning)


def _of_step(name: str, context: Context) -> Program:
    if name not in context.steps:
        raise UsageError(
            f"there is no result of the step {name} to learn from",
            reason="no step before this one has that id",
            hint="name an earlier step of the same pipeline by its `id`",
            where=name,
        )
    return context.steps[name]
