"""Packages that training can use and that are installed with the extra `train`."""

from __future__ import annotations

from typing import Any

from fxcompress._imports import imported

__all__ = ["needed"]


def needed(module: str, what: str) -> Any:
    """Import a module of the extra.

    Args:
        module: Its qualified name.
        what: What needs it, for the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    return imported(module, needs=f"{what} needs it", hint="pip install 'fxcompress[train]'")
