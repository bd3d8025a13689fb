"""The command line: one file per command; torch is imported only by the commands that need it."""

from fxcompress.cli._app import main

__all__ = ["main"]
