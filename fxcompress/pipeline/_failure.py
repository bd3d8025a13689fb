"""What a failing pass leaves for its reader: the error, the graph, and a spec that fails again."""

from __future__ import annotations

import contextlib
import io
import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress._files import write_text
from fxcompress.errors import FxCompressError, PassError

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.records import RunRecord
    from fxcompress.pipeline.run_folder import RunFolder
    from fxcompress.pipeline.steps import Step

__all__ = ["absolute", "explained", "keep"]

FOLDERS = frozenset({"run", "outputs", "adapter", "folder", "tokenizer", "hf"})
"""Keys whose value is the path of a folder."""
EXCERPT = 12
"""Lines of the graph shown around the node that an error names."""


def explained(error: Exception, step: Step) -> FxCompressError:
    """Return an error for a person: the one given, or a PassError around it."""
    raised = error
    if not isinstance(raised, FxCompressError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        raised = PassError(
            f"pass {step.id} failed",
            reason=f"{type(error).__name__}: {error}",
            hint=f"it was raised at {place.filename}:{place.lineno}",
            where=step.where or None,
        )
    raised.add_note(f"in pass {step.id} ({step.use}){f', {step.where}' if step.where else ''}")
    return raised


def keep(
    folder: RunFolder,
    record: RunRecord,
    program: Program,
    step: Step,
    error: FxCompressError,
    context: Context,
) -> None:
    """Write `failure/` and the failed record, and tell the error where they are.

    The last good Program goes to `failure/program.fxp`; `failure/spec.yaml` applies only the step
    that failed to it.
    """
    # A full disk or a module that no file can hold may be why the pass failed, or come on top:
    # the first error matters, not that of these files.
    with contextlib.suppress(OSError, FxCompressError):
        folder.write(record)
        shutil.rmtree(folder.failure, ignore_errors=True)
        folder.failure.mkdir()
        text = program.text(state=False)
        write_text(folder.failure / "graph.fxg", text)
        trace = "".join(traceback.format_exception(error))
        write_text(folder.failure / "error.txt", f"{error}\n\n{excerpt(text, error)}\n\n{trace}")
        error.add_note(f"the error and the graph are in {folder.failure}")
        program.save(folder.failure / "program.fxp")
        _keep_teachers(folder.failure, step, context)
        write_text(folder.failure / "spec.yaml", reproducer(step, context))
        error.add_note(f"fxcompress run {folder.failure / 'spec.yaml'} fails again")


def excerpt(text: str, error: FxCompressError) -> str:
    """Return the lines of a graph's text around the node that an error names."""
    lines = text.splitlines()
    subject = f"%{error.where} " if error.where else None
    for number, line in enumerate(lines):
        if subject is not None and line.lstrip().startswith(subject):
            first = max(0, number - EXCERPT // 2)
            marked = [
                f"{'>' if index == number else ' '} {each}"
                for index, each in enumerate(lines[first : number + EXCERPT // 2], start=first)
            ]
            return "\n".join(marked)
    return "\n".join(lines[:EXCERPT])


def reproducer(step: Step, context: Context) -> str:
    """Return a spec that applies one step to the last good Program, wherever it lies."""
    told = step.options.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    if (taught := _taught_by(step, context)) is not None:
        told["teacher"] = {**_learning(told.get("teacher")), "spec": f"{taught[0]}.yaml"}
    options = absolute(told, context.folder)
    return _written(
        {
            "fxcompress": 1,
            "name": f"{context.name}-{step.id}",
            "model": {"program": "program.fxp"},
            "seed": context.seed,
            **context.reproduce,
            "passes": [{"use": step.use, "id": step.id, **options}],
        }
    )


def absolute(value: Any, folder: Path, key: str = "") -> Any:
    """Return plain data with the paths of files in a folder made absolute, `file.py:name` too.

    A folder is one only where its key says so: a name of something else may be that of a folder.
    """
    if isinstance(value, Mapping):
        return {name: absolute(item, folder, name) for name, item in value.items()}
    if isinstance(value, list):
        return [absolute(item, folder, key) for item in value]
    if not isinstance(value, str):
        return value
    file, colon, name = value.partition(":")
    path = folder / Path(file).expanduser()
    found = path.is_file() or (key in FOLDERS and path.is_dir())
    return f"{path.resolve()}{colon}{name}" if file and found else value


def _taught_by(step: Step, context: Context) -> tuple[str, Program] | None:
    """Return a name and the Program of a teacher that no file holds; None for others."""
    teacher = getattr(step.options, "teacher", None)
    if teacher == "original" and context.original is not None:
        return "original", context.original
    if teacher == "given" and context.teacher is not None:
        return "given", context.teacher
    name = getattr(teacher, "step", None)
    return (f"step-{name}", context.steps[name]) if name in context.steps else None


def _learning(told: Any) -> dict[str, Any]:
    return {"learns": True} if isinstance(told, Mapping) and told.get("learns") else {}


def _keep_teachers(failure: Path, step: Step, context: Context) -> None:
    """Write a teacher that is no file as the model of a spec."""
    found = _taught_by(step, context)
    if found is not None:
        name, program = found
        program.save(failure / f"{name}.fxp")
        document = {"fxcompress": 1, "name": name, "model": {"program": f"{name}.fxp"}}
        write_text(failure / f"{name}.yaml", _written(document))


def _written(document: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(document, stream)
    return stream.getvalue()
