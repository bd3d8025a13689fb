"""Errors as people and programs read them: text on stderr, an exit code, a document."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Final

import rich_click as click
from click.exceptions import Abort, ClickException, Exit

from fxcompress.errors import FxCompressError, SpecError, UsageError, WorkerError

__all__ = ["INTERRUPTED", "error_document", "follows", "report_failure"]

INTERRUPTED: Final = 130


def report_failure(error: BaseException, *, debug: bool = False) -> int:
    """Write an error to stderr and return the exit code.

    An error that fxcompress did not raise on purpose is a bug in it or in a library: its traceback
    goes to a file, or to stderr with `debug`.
    """
    if isinstance(error, Exit):
        return int(error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, Abort | KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    if isinstance(error, ClickException):
        error.show()
        return error.exit_code
    if debug:
        traceback.print_exception(error)
    if isinstance(error, WorkerError | SpecError | UsageError) and follows():
        # The first process says it, or whoever ended first has said why.
        return error.exit_code
    if isinstance(error, FxCompressError):
        _say(f"{_red('error')}: {error}")
        for note in getattr(error, "__notes__", ()):
            _say(note)
        return error.exit_code
    if isinstance(error, MemoryError):
        _say(f"{_red('error')}: out of memory")
        return 1
    _say(f"{_red('unexpected error')}: {type(error).__name__}: {_first_line(error)}")
    if not debug:
        _say(f"  the traceback is in {_save(error)}\n  try: the same command with --debug")
    return 1


def follows() -> bool:
    """Whether this is one of several processes, and not the first."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def error_document(error: FxCompressError) -> dict[str, Any]:
    """Return an error as plain data."""
    document: dict[str, Any] = {
        "kind": type(error).__name__,
        "what": error.what,
        "reason": error.reason,
        "hint": error.hint,
        "where": error.where,
    }
    if isinstance(error, SpecError):
        document["problems"] = [
            {
                "file": problem.file,
                "line": problem.line,
                "column": problem.column,
                "key": problem.key,
                "message": problem.message,
                "hint": problem.hint,
            }
            for problem in error.problems
        ]
    return document


def _say(text: str) -> None:
    # click drops the colours where stderr is no terminal; NO_COLOR is ours to honour.
    click.echo(text, err=True)


def _red(text: str) -> str:
    return text if os.environ.get("NO_COLOR") else click.style(text, fg="red", bold=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _save(error: BaseException) -> Path | str:
    """Write the traceback to a file of its own."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fxcompress-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
    except OSError:
        return "no file, since none can be written"
    return Path(file.name)
