"""`fxcompress check`: is a spec valid? No model is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing, overrides
from fxcompress.cli._failures import error_document
from fxcompress.errors import SpecError

if TYPE_CHECKING:
    from fxcompress.spec import Spec

__all__ = ["command"]


@click.command("check")
@existing("specs", nargs=-1, required=True)
@overrides
@click.option("--resolved", is_flag=True, help="Print the composed spec instead of a summary.")
@document_options
@emits
def command(specs: Sequence[Path], overrides: Sequence[str], resolved: bool) -> Outcome:
    """Validate and resolve spec files; no model is built and no code of theirs is run.

    Every problem is told at once, with its place in the file.
    """
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    for path in specs:
        row, text = _checked(path, overrides, resolved=resolved)
        rows.append(row)
        lines.append(text)
    failed = [row for row in rows if "error" in row]
    if failed and len(specs) > 1:
        lines.append(f"{len(failed)} of {len(specs)} specs are not valid")
    return Outcome("\n".join(lines), {"specs": rows}, 2 if failed else 0)


def _checked(path: Path, overrides: Sequence[str], *, resolved: bool) -> tuple[dict[str, Any], str]:
    """Return what there is to say about one spec, as a document and as text."""
    from fxcompress.spec import Spec

    try:
        spec = Spec.load(path, overrides)
    except SpecError as error:
        return {"path": str(path), "error": error_document(error)}, str(error)
    row = {
        "path": str(path),
        "name": spec.title,
        "digest": spec.digest,
        "steps": [{"id": step.id, "use": step.use, "where": step.where} for step in spec.steps],
        "resolved": spec.plain(),
    }
    text = spec.resolved_yaml().rstrip() if resolved else f"{path}: ok   {_summary(spec)}"
    return row, text


def _summary(spec: Spec) -> str:
    steps = ", ".join(step.id for step in spec.steps) or "no passes"
    formats = ", ".join(item.use for item in spec.emit) or "nothing"
    return f"{spec.title}: {steps}; emits {formats}"
