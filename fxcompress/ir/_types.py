"""When two values have one type, and how a message spells it."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

__all__ = ["describe_value", "same_type"]


def describe_value(value: Any) -> str:
    """Return a value's type for a message: `float32[2, 3]`, `int`, `(…, …)`."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[*map(str, value.shape)]}".replace(
            "'", ""
        )
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe_value(item) for item in value)})"
    return type(value).__name__


def same_type(a: Any, b: Any) -> bool:
    """Whether two values agree in tree, shapes, dtypes and devices; numbers agree by value.

    Sizes that depend on data compare equal to anything: each evaluation names them anew.
    """
    left, left_tree = pytree.tree_flatten(a)
    right, right_tree = pytree.tree_flatten(b)
    if len(left) != len(right) or _kinds(left_tree) != _kinds(right_tree):
        return False
    return all(_same_leaf(x, y) for x, y in zip(left, right, strict=True))


def _kinds(tree: pytree.TreeSpec) -> str:
    # A list and a tuple of results are one to the graph: it only ever indexes them.
    return str(tree).replace("list", "tuple").replace("torch.Size", "tuple")


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.device == b.device
            and a.dim() == b.dim()
            and all(_same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        )
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(a, numbers) and isinstance(b, numbers):
        return _same_size(a, b)
    return type(a) is type(b)


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if free_unbacked_symbols(a) or free_unbacked_symbols(b):
        return True
    left = a.node.expr if hasattr(a, "node") else a
    right = b.node.expr if hasattr(b, "node") else b
    return bool(left == right or sympy.simplify(left - right) == 0)
