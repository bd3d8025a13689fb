"""`fxcompress report`: render a run's report again."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from fxcompress.cli._command import existing

__all__ = ["command"]


@click.command("report")
@existing("run")
@click.option(
    "--markdown", is_flag=True, help="Print the Markdown, for a pull request; write nothing."
)
def command(run: Path, markdown: bool) -> int:
    """Render report.html and report.md again from report.json in a run folder."""
    from fxcompress.report import load_report, render_markdown, write_report

    report = load_report(run)
    if markdown:
        click.echo(render_markdown(report), nl=False)
        return 0
    folder = run if run.is_dir() else run.parent
    for path in write_report(report, folder):
        click.echo(path)
    return 0
