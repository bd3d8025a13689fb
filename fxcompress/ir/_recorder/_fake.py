"""Run a call on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dispatch.python import enable_python_dispatcher

__all__ = ["run_fake"]

# What C++ kernels say that were written before sizes could be symbols.
_NEEDS_PYTHON = ("SymIntArrayRef", "symbolic sizes", "SymInt")


def run_fake(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`.

    Where a C++ kernel cannot take symbolic sizes, the Python decompositions are tried; they are
    slower, so they are not tried first.
    """
    try:
        return func(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        if not any(sign in str(error) for sign in _NEEDS_PYTHON):
            raise
        with enable_python_dispatcher():
            return func(*args, **kwargs)
