"""Load a model that teaches from where it lies: a spec, or the folder of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxcompress.errors import FxCompressError, ModelError

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["load_teacher"]


def load_teacher(
    folder: Path, *, spec: str | None = None, run: str | None = None, meta: bool = False
) -> Program:
    """Return the Program that a spec names before any pass, or a run's after its last.

    Args:
        folder: What paths are relative to.
        spec: The spec's path.
        run: Or the run's folder.
        meta: Allocate no weights for a spec's model.

    Raises:
        ModelError: It is missing, damaged or not finished.
    """
    text = spec or run or ""
    path = folder / Path(text).expanduser()
    if not path.exists():
        raise ModelError(
            f"the teacher's {'spec' if spec else 'run folder'} {text} is not there",
            reason=f"there is nothing at {path.resolve()}",
            hint="paths are relative to the spec",
            where=text,
        )
    try:
        return _of_spec(path, meta=meta) if spec else _of_run(path)
    except FxCompressError as error:
        raise ModelError(
            f"the teacher of {text} cannot be loaded: {error.what}",
            reason=error.reason,
            hint=error.hint,
            where=error.where or text,
        ) from error


def _of_spec(path: Path, *, meta: bool) -> Program:
    from fxcompress.spec.load_program import load_program
    from fxcompress.spec.spec import Spec

    return load_program(Spec.load(path), meta=meta)


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
