"""Sizes of traced values as exact expressions in the dynamic dimensions."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import sympy
import torch

__all__ = ["Expr", "elements", "evaluate", "size"]

Expr: TypeAlias = sympy.Expr | int


def size(value: Any) -> Expr:
    """Return one size, an int or a SymInt, as an expression."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_number else expr
    return int(value)


def product(sizes: Iterable[Any]) -> Expr:
    """Return the product of sizes; plain ints are multiplied first, which sympy would do slowly."""
    fixed, symbolic = 1, []
    for s in map(size, sizes):
        if isinstance(s, int):
            fixed *= s
        else:
            symbolic.append(s)
    return fixed if not symbolic else fixed * sympy.Mul(*symbolic)


def elements(tensor: torch.Tensor) -> Expr:
    """Return the number of elements of a (fake) tensor."""
    return product(tensor.shape)


def evaluate(expr: Expr, sizes: Mapping[str, int]) -> int:
    """Return the value of an expression with each symbol, by its name, replaced by a size."""
    if isinstance(expr, int):
        return expr
    values = {s: sizes[s.name] for s in expr.free_symbols if isinstance(s, sympy.Symbol)}
    return int(sympy.ceiling(expr.subs(values)))
