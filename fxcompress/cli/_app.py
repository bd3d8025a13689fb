"""The group of commands, loaded one by one, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Final

import rich_click as click

from fxcompress.cli._failures import report_failure
from fxcompress.errors import UsageError

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: Final = (
    "check", "plan", "run", "explain", "diff", "golden", "report", "bench", "passes", "schema",
    "init", "completion",
)  # fmt: skip
PROGRAM: Final = "fxcompress"


class LazyGroup(click.RichGroup):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; its file is named like it."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fxcompress.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one was meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from fxcompress.pipeline._close import did_you_mean

            hint = did_you_mean(args[0], COMMANDS, kind="commands")
            raise UsageError(f"there is no command `{args[0]}`", hint=hint)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress neural networks as a spec file says: check, plan, run, prove, report.",
    epilog="Exit codes: 0 done · 1 the run failed · 2 usage or spec error · 3 differences · "
    "4 a constraint is not met · 130 interrupted.",
)
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
def cli(debug: bool) -> None:
    """Set up what all commands share."""
    if not debug and not sys.warnoptions:
        # About the insides of torch and transformers; nothing that a spec could change.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; nothing escapes as a traceback."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read us has had enough; flushing at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        return report_failure(error, debug="--debug" in arguments)
