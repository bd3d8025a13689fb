"""`fxcompress diff`: what changed between two runs, programs or golden files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing
from fxcompress.errors import UsageError

if TYPE_CHECKING:
    from fxcompress.ir import GraphDiff, Text

__all__ = ["command"]


@click.command("diff")
@existing("before", metavar="A")
@existing("after", metavar="B")
@document_options
@emits
def command(before: Path, after: Path) -> Outcome:
    """Show the typed edits from A to B: run folders, `.fxp` programs or `.fxg` texts.

    The first line is a verdict: names only, numbers only, or STRUCTURE changed. Exit code 3 says
    that there is a difference.
    """
    from fxcompress.ir import diff, render_diff

    changes = diff(_text(before), _text(after))
    shown = render_diff(changes, (str(before), str(after)))
    return Outcome(shown, _document(changes), 3 if changes else 0)


def _text(path: Path) -> Text:
    """Read the golden text of a run, a program or a text file."""
    from fxcompress.ir import Program, parse

    file = path / "graph.fxg" if path.is_dir() else path
    if not file.is_file():
        reason = "the folder holds no finished run" if path.is_dir() else "there is no such file"
        raise UsageError(f"cannot read {path}", reason=reason)
    if file.suffix == ".fxp":
        return parse(Program.load(file).text())
    try:
        return parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read {path}",
            reason="it is no text",
            hint="give a run folder, a .fxp program or a .fxg text",
        ) from error


def _document(changes: GraphDiff) -> dict[str, Any]:
    return {
        "verdict": changes.verdict.value,
        "returns": changes.returns,
        "nodes": [
            {
                "kind": node.kind,
                "id": node.id,
                "fields": list(node.fields),
                "before": node.before.body if node.before else None,
                "after": node.after.body if node.after else None,
            }
            for node in changes.nodes
        ],
        "state": [
            {"kind": each.kind, "name": each.name, "distance": each.distance}
            for each in changes.state
        ],
        "outputs": [
            {"kind": each.kind, "index": each.index, "distance": each.distance}
            for each in changes.outputs
        ],
    }
