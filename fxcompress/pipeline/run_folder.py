"""The folder of a run: who may write it, what it holds, and how it fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import ValidationError

from fxcompress._files import cannot_write, write_text
from fxcompress.errors import RunFolderError
from fxcompress.pipeline.records import RunRecord

__all__ = ["RunFolder"]

RECORD = "run.json"
GUARD = ".running"
OWNED = (
    RECORD, "fxcompress.lock.json", "fxcompress.lock.safetensors", "spec.resolved.yaml",
    "plan.json", "graph.fxg", "report.json", "report.html", "report.md",
)  # fmt: skip
OWNED_FOLDERS = ("checkpoints", "scratch", "artifacts", "failure", "tensorboard")


class RunFolder:
    """A run's folder, held by one process at a time.

        run.json                 RunRecord: every pass that is done
        fxcompress.lock.json     decisions and hashes (arrays in fxcompress.lock.safetensors)
        checkpoints/NN-id/       graph, changed tensors, decision and record of each pass
        scratch/NN-id/           what a pass that is not done resumes from
        tensorboard/NN-id/       curves of a training, where it was asked for them
        failure/                 what a failing pass leaves for its reader
        artifacts/               what was emitted

    Args:
        path: The folder; made if missing.
        resume: Go on with the run that is here.
        overwrite: Throw away the run that is here.

    Raises:
        RunFolderError: It is in use, holds something else, or cannot be written.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.resume = resume
        self._overwrite = overwrite
        self._guard: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            guard = (self.path / GUARD).open("a+")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        _take(guard, self.path)
        self._guard = guard
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._guard is not None:
            # The system drops the lock with the handle, also when the process is killed.
            self._guard.close()
            self._guard = None

    def begin(self, record: RunRecord) -> RunRecord | None:
        """Claim the folder for a run; return the record of the run to go on with, if any.

        Raises:
            RunFolderError: The folder holds another run, a run of this spec and `resume` was not
                asked for, or files of no run.
        """
        found = self.record()
        if found is None or self._overwrite:
            if found is None:
                self._refuse_strangers()
            self._clear()
            self.write(record)
            return None
        differences = _differences(found, record)
        if differences:
            raise RunFolderError(
                "the folder holds another run",
                reason="; ".join(differences),
                hint="choose another folder, or overwrite this one with --force",
                where=str(self.path),
            )
        if not self.resume:
            raise RunFolderError(
                f"the folder holds this run already ({found.state})",
                hint="continue it with --resume, or overwrite it with --force",
                where=str(self.path),
            )
        return found

    def record(self) -> RunRecord | None:
        """Return the record of the run that is here, or None.

        Raises:
            RunFolderError: It cannot be read.
        """
        path = self.path / RECORD
        if not path.exists():
            return None
        try:
            return RunRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise RunFolderError(
                "the run's record cannot be read",
                reason=str(error).splitlines()[0],
                hint="choose another folder, or overwrite this one with --force",
                where=str(path),
            ) from error

    def write(self, record: RunRecord) -> None:
        """Write the record."""
        write_text(self.path / RECORD, record.model_dump_json(indent=2) + "\n")

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def scratch(self, index: int, step: str) -> Path:
        """Where a pass may keep what it needs to go on after a kill."""
        return self.path / "scratch" / f"{index:02d}-{step}"

    def curves(self, index: int, step: str) -> Path:
        """Where a pass may write TensorBoard's files."""
        return self.path / "tensorboard" / f"{index:02d}-{step}"

    def clear_scratch(self, index: int, step: str) -> None:
        """Remove what a pass that is done kept to go on.

        Raises:
            RunFolderError: It cannot be removed.
        """
        folder = self.scratch(index, step)
        try:
            if folder.exists():
                shutil.rmtree(folder)
                folder.parent.rmdir()
        except OSError as error:
            raise cannot_write(folder, error) from error

    @property
    def failure(self) -> Path:
        """Where a failing pass leaves its traces."""
        return self.path / "failure"

    def _refuse_strangers(self) -> None:
        known = {GUARD, *OWNED, *OWNED_FOLDERS}
        others = sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in known and not entry.name.startswith(".tmp-")
        )
        if others:
            raise RunFolderError(
                "the folder is not empty and holds no run",
                reason=f"it has {', '.join(others[:3])}{' …' if len(others) > 3 else ''}",
                hint="choose an empty or new folder",
                where=str(self.path),
            )

    def _clear(self) -> None:
        try:
            for name in OWNED_FOLDERS:
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in OWNED:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _differences(found: RunRecord, record: RunRecord) -> list[str]:
    """Say how the run that is here differs from the one that is to start."""
    pairs = {
        "the spec": (found.spec, record.spec),
        "the model": (found.model, record.model),
        "the seed": (found.seed, record.seed),
        "the passes": (found.steps, record.steps),
        "the software": (str(found.versions), str(record.versions)),
    }
    return [
        f"{what} differs: {_short(was)} there, {_short(now)} here"
        for what, (was, now) in pairs.items()
        if was != now
    ]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    text = str(value)
    # Digests are recognised by their first digits.
    return (text[:12] if len(text) == 64 else text) or "none"


def _take(guard: IO[str], path: Path) -> None:
    """Take the lock on an open file, without waiting."""
    if os.name == "nt":
        return
    import fcntl

    try:
        fcntl.flock(guard.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        guard.seek(0)
        holder = guard.read().strip()
        guard.close()
        raise RunFolderError(
            "the folder is in use",
            reason=f"process {holder} is running in it" if holder else "another process runs in it",
            hint="wait for it, or choose another folder",
            where=str(path),
        ) from error
    guard.truncate(0)
    guard.write(f"{os.getpid()}\n")
    guard.flush()
