"""Packages that training can use and that are installed with the extra `train`."""

from __future__ import annotations

import importlib
from typing import Any

from fxcompress.errors import MissingExtraError

__all__ = ["needed"]


def needed(module: str, what: str) -> Any:
    """Import a module of the extra.

    Args:
        module: Its qualified name.
        what: What needs it, for the message.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{package} is not installed",
            reason=f"{what} needs it ({error})",
            hint="pip install 'fxcompress[train]'",
        ) from error
