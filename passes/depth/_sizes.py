"""Sizes that were read off a skipped block, computed again from the block's input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Rebuilder", "can_rebuild", "rebuild"]

_CHAINS: Final[dict[type, Callable[..., Any]]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    Mod: operator.mod,
    PythonMod: operator.mod,
    FloorDiv: operator.floordiv,
}


def can_rebuild(size: fx.Node, entry: fx.Node) -> bool:
    """Whether a size is arithmetic on sizes that the entry has as dimensions."""
    expression = _expression(size.meta.get("val"))
    if expression is None or expression.is_Integer:
        return False
    return _covers(expression, set(_dimensions(entry)))


def rebuild(rewriter: GraphRewriter, size: fx.Node, entry: fx.Node) -> fx.Node:
    """Return a node that computes the size from the entry, placed after it."""
    expression = _expression(size.meta["val"])
    assert expression is not None, "only what can_rebuild accepts is rebuilt"
    built = Rebuilder(rewriter, entry).build(expression)
    assert isinstance(built, fx.Node), "a size that is a number is never rebuilt"
    return built


def _expression(value: Any) -> sympy.Expr | None:
    if isinstance(value, torch.SymInt):
        found: sympy.Expr = value.node.expr
        return found
    return sympy.Integer(value) if isinstance(value, int) else None


def _dimensions(entry: fx.Node) -> dict[sympy.Expr, int]:
    """Return symbol -> dimension of the entry that has this size."""
    found: dict[sympy.Expr, int] = {}
    for dim, size in enumerate(entry.meta["val"].shape):
        expression = _expression(size)
        if expression is not None and expression.is_Symbol:
            found.setdefault(expression, dim)
    return found


def _covers(expression: sympy.Expr, symbols: set[sympy.Expr]) -> bool:
    if expression.is_Symbol:
        return expression in symbols
    if expression.is_Integer:
        return True
    return type(expression) in _CHAINS and all(_covers(e, symbols) for e in expression.args)


class Rebuilder:
    """Computes sizes from the dimensions of one tensor."""

    def __init__(self, rewriter: GraphRewriter, entry: fx.Node) -> None:
        self.rewriter, self.entry = rewriter, entry
        self.dimensions = _dimensions(entry)
        self.last = entry

    def build(self, expression: sympy.Expr) -> fx.Node | int:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            operands: tuple[Any, ...] = (self.entry, self.dimensions[expression])
            self.last = self.rewriter.call_method("size", operands, after=self.last)
            return self.last
        function = _CHAINS[type(expression)]
        first, *rest = (self.build(each) for each in expression.args)
        for operand in rest:
            self.last = self.rewriter.call_function(function, (first, operand), after=self.last)
            first = self.last
        return first
