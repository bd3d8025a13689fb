"""`fxcompress completion`: the script that makes a shell complete commands, options and passes."""

from __future__ import annotations

import rich_click as click

__all__ = ["command"]


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> int:
    """Print a completion script: eval "$(fxcompress completion bash)"."""
    from click.shell_completion import get_completion_class

    from fxcompress.cli._app import PROGRAM, cli

    completer = get_completion_class(shell)
    assert completer is not None, "the choices are shells that click knows"
    variable = f"_{PROGRAM.upper()}_COMPLETE"
    click.echo(completer(cli, {}, PROGRAM, variable).source())
    return 0
