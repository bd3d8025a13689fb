"""Artefacts, and how their files get to their place: staged, checked, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from pydantic import BaseModel, ConfigDict

from fxcompress.analysis.compare import OutputComparison
from fxcompress.errors import EmitError

__all__ = ["Artifact", "Written", "digest", "inside", "publish", "staging"]


class Artifact(BaseModel):
    """One emitted format.

    Attributes:
        format: One of `FORMATS`.
        paths: Its files; the first is the one to open.
        bytes: Size of all files together.
        sha256: File name -> hash of its bytes.
        comparison: Outputs of the artefact, reloaded in a fresh process, against the program's.
        seconds: Time to write it, and to reload, run and compare it.
        notes: What a reader must know: how to load it, what was flattened, which kernels run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    paths: tuple[Path, ...]
    bytes: int
    sha256: Mapping[str, str]
    comparison: OutputComparison
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file to open."""
        return self.paths[0]


@dataclass(frozen=True)
class Written:
    """What a format wrote into the staging folder: file names (the first to be opened), notes."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def inside(directory: Path, name: str) -> Path:
    """Return `directory / name`.

    Raises:
        EmitError: The name is absolute, climbs with `..`, or leads out of the folder by a link.
    """
    for pure in (PurePosixPath(name), PureWindowsPath(name)):
        if pure.is_absolute() or pure.drive or ".." in pure.parts or not name:
            raise EmitError(
                f"{name!r} is not a file inside the output folder",
                reason="emitted paths must be relative and must not contain '..'",
                hint="give a plain file name",
                where=str(directory),
            )
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise EmitError(
            f"{name!r} leads out of the output folder",
            reason=f"it resolves to {path.resolve()}",
            hint="remove the link",
            where=str(directory),
        )
    return path


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Yield a new folder inside `directory` that is gone afterwards, whatever happened.

    Raises:
        EmitError: The folder cannot be made or written, or the disk is full.
    """
    stage: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".emit-", dir=directory))
        yield stage
    except OSError as error:
        raise EmitError(
            "the artefacts cannot be written",
            reason=f"{error.strerror or error}",
            hint="choose another folder or make room on the disk; nothing was left behind",
            where=str(directory),
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, directory: Path, files: tuple[str, ...]) -> tuple[Path, ...]:
    """Move finished files from the staging folder to their place, each in one step."""
    paths = []
    for name in files:
        source, target = stage / name, inside(directory, name)
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.replace(target)
        paths.append(target)
    return tuple(paths)
