"""What every command shares: its options, and how its outcome reaches stdout."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from fxcompress.cli._failures import error_document, follows
from fxcompress.errors import FxCompressError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = [
    "FORMAT_VERSION", "SILENT", "Outcome", "console", "document_options", "emits", "existing",
    "overrides",
]  # fmt: skip

FORMAT_VERSION: Final = "1.0"


@dataclass(frozen=True)
class Outcome:
    """What a command has to say.

    Attributes:
        text: For people: plain text or something that rich renders.
        document: For programs; `format_version` and `command` are added.
        exit_code: 0, or what makes it none of a success.
    """

    text: RenderableType | str
    document: Mapping[str, Any]
    exit_code: int = 0


SILENT: Final = Outcome("", {})
"""What a process says that is not the first of several."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that honours NO_COLOR and does not wrap what is piped."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return made


def emits(function: Callable[..., Outcome]) -> Callable[..., int]:
    """Print a command's Outcome as `--format` says and return its exit code.

    With `--format json` stdout holds the document and nothing else: whatever a factory or a
    library prints goes to stderr, and an error is a document too.
    """

    @functools.wraps(function)
    def run(*args: Any, format: str = "text", **kwargs: Any) -> int:
        context = click.get_current_context()
        name = context.info_name or "" if context else ""
        if format == "text":
            outcome = function(*args, **kwargs)
            _print(outcome.text)
            return outcome.exit_code
        try:
            with contextlib.redirect_stdout(sys.stderr):
                outcome = function(*args, **kwargs)
        except FxCompressError as error:
            if not follows():
                _dump(name, {"error": error_document(error), "exit_code": error.exit_code})
            raise
        if outcome is SILENT:
            return 0
        _dump(name, {**outcome.document, "exit_code": outcome.exit_code})
        return outcome.exit_code

    return run


def _print(text: RenderableType | str) -> None:
    if isinstance(text, str):
        if text:
            click.echo(text.rstrip("\n"))
    else:
        console().print(text, end="")


def _dump(command: str, document: Mapping[str, Any]) -> None:
    whole = {"format_version": FORMAT_VERSION, "command": command, **document}
    click.echo(json.dumps(whole, indent=2, ensure_ascii=False))


def document_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format`."""
    return click.option(
        "--format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="json: stdout holds one document and nothing else.",
    )(function)


def overrides(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--set`, which arrives as `overrides`."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a value of the spec: passes.shrink.ratio=0.5. May be repeated.",
    )(function)


def existing(name: str, **kwargs: Any) -> Callable[..., Any]:
    """Return an argument that is a path."""
    return click.argument(name, type=click.Path(path_type=Path), **kwargs)
