"""Writing files so that a reader sees the old content or the new, never a part of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxcompress.errors import RunFolderError

__all__ = [
    "replaced_file", "replaced_folder", "sync_file", "sync_folder", "write_bytes", "write_text",
]  # fmt: skip

_TEMPORARY = ".tmp-"


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file as a whole: temporary file, fsync, rename.

    Raises:
        RunFolderError: The disk is full, or the folder cannot be written.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file as a whole: temporary file, fsync, rename.

    Raises:
        RunFolderError: The disk is full, or the folder cannot be written.
    """
    with replaced_file(path) as temporary:
        temporary.write_bytes(data)
    return path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `path` when the block ends.

    Raises:
        RunFolderError: The disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _discard(temporary)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and is gone if it fails.

    Raises:
        RunFolderError: The disk is full, or the parent cannot be written.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        _discard(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                sync_file(file)
        sync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _discard(temporary)


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> RunFolderError:
    """Return the error for a person that an OSError while writing stands for."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return RunFolderError(
        f"cannot write {path.name}",
        reason="the disk is full" if full else str(error.strerror or error),
        hint="make room, then continue with --resume" if full else "choose another output folder",
        where=str(path),
    )


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
