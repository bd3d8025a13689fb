"""`fxcompress golden`: hold the results of specs against the texts beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from fxcompress.cli._command import Outcome, document_options, emits, existing
from fxcompress.errors import GoldenError, UsageError

__all__ = ["command"]


@click.command("golden")
@existing("specs", nargs=-1, required=True)
@click.option("--update", is_flag=True, help="Write the texts that are missing or differ.")
@document_options
@emits
def command(specs: Sequence[Path], update: bool) -> Outcome:
    """Run specs in memory and compare the resulting graphs with the golden texts beside them.

    The text of `a/spec.yaml` is `a/spec.fxg`. A difference exits 3 and leaves the new text as
    `.fxg.new`; with --update it is written, and the command exits 1 so that no script takes an
    update for a success. Refused where the environment says CI.
    """
    if update and os.environ.get("CI"):
        raise UsageError(
            "golden files are not updated under CI",
            reason="the environment variable CI is set",
            hint="update them by hand and commit them with the reason",
        )
    lines: list[str] = []
    rows: list[dict[str, str]] = []
    for path in specs:
        state, text = _checked(path, update=update)
        rows.append({"spec": str(path), "golden": str(path.with_suffix(".fxg")), "state": state})
        lines.append(text)
    states = {row["state"] for row in rows}
    code = 3 if "differs" in states else 1 if "written" in states else 0
    return Outcome("\n".join(lines), {"specs": rows}, code)


def _checked(path: Path, *, update: bool) -> tuple[str, str]:
    """Compare one spec's result; return its state and what to say."""
    from fxcompress.cli._progress import showing_steps, working
    from fxcompress.spec import Spec

    spec = Spec.load(path)
    from fxcompress.api import prepare
    from fxcompress.testing import GoldenFile, Update, golden_text

    with working("capturing the model"):
        job = prepare(spec)
    with showing_steps() as listener:
        result = job.run(on_event=listener)
    golden = GoldenFile(path.with_suffix(".fxg"))
    try:
        written = golden.check(golden_text(result.program), Update.ALL if update else None)
    except GoldenError as error:
        error.hint = f"if it is meant: fxcompress golden {path} --update, and say why in the commit"
        return "differs", f"{path}: {error}"
    if written:
        return "written", f"{path}: wrote {golden.path}"
    return "same", f"{path}: same as {golden.path}"
