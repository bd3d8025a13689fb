"""`fxcompress schema`: the JSON Schema of spec files."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

__all__ = ["command"]


@click.command("schema")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to a file.")
def command(output: Path | None) -> int:
    """Print the JSON Schema of specs with the passes that are installed, for editors.

    A spec names it in its first line: `# yaml-language-server: $schema=fxcompress.schema.json`.
    """
    from fxcompress._files import write_text
    from fxcompress.spec.schema import schema_text

    text = schema_text()
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text)
        click.echo(f"wrote {output}", err=True)
    return 0
