"""Largest sizes, for runtimes that plan their memory ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from fxcompress.emit.options import ExecutorchOptions
from fxcompress.errors import UsageError
from fxcompress.ir.signature import Dim

__all__ = ["bounded"]

_DEFAULT: Final = 16


def bounded(dims: Mapping[str, Dim], options: ExecutorchOptions) -> dict[str, Dim]:
    """Return the dynamic sizes, each with a maximum; one of at most 1 is fixed.

    A size that neither the options nor the program limits ends at 16, or at twice the size that it
    was captured with.

    Raises:
        UsageError: The options name a size that the program does not have.
    """
    unknown = [name for name in options.maximum if name not in dims]
    if unknown:
        raise UsageError(
            f"the program has no dynamic size {unknown[0]!r}",
            reason=f"its dynamic sizes are {', '.join(dims) or 'none'}",
            hint="correct `maximum` of the executorch format",
        )
    found = {}
    for name, dim in dims.items():
        free = max(_DEFAULT, 2 * dim.example) if dim.maximum is None else dim.maximum
        found[name] = replace(dim, maximum=options.maximum.get(name, free))
    return found
