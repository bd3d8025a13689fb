"""Import what may not be installed, or say what to install."""

from __future__ import annotations

import importlib
from typing import Any

from fxcompress.errors import MissingExtraError

__all__ = ["imported"]


def imported(module: str, *, hint: str, needs: str = "", where: str | None = None) -> Any:
    """Import a module.

    Args:
        module: Its qualified name.
        hint: How to install it.
        needs: What needs it, for the message.
        where: What names it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is not installed",
            reason=f"{needs} ({error})" if needs else str(error),
            hint=hint,
            where=where,
        ) from error
