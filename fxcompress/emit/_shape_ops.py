"""Operators that have shapes only and stand for a runtime's own while a program is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["shape_ops"]


def shape_ops(operators: Mapping[str, tuple[str, Callable[..., Any]]]) -> Any:
    """Register operators in `torch.ops.fxcompress`.

    Args:
        operators: By name, the schema and what gives tensors of the result's shapes and types.

    Returns:
        What keeps them: they are gone with it.
    """
    made: Any = torch.library
    library = made.Library("fxcompress", "FRAGMENT")
    for name, (schema, shapes) in operators.items():
        library.define(f"{name}{schema}")
        made.register_fake(f"fxcompress::{name}", shapes, lib=library)
    return library
