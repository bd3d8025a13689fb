"""Remove what computes nothing: dead code, detours, state read before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["clean", "remove_dead", "same_shape"]


def remove_dead(graph: fx.Graph) -> None:
    """Erase every node that no output depends on; inputs stay."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def same_shape(left: Any, right: Any) -> bool:
    """Whether two values are tensors of provably the same shape and dtype."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    if left.dtype != right.dtype or left.dim() != right.dim():
        return False
    return all(_expr(a) == _expr(b) for a, b in zip(left.shape, right.shape, strict=True))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def clean(graph: fx.Graph) -> None:
    """Bring a recorded graph into its canonical, minimal form."""
    remove_dead(graph)
    for node in list(graph.nodes):
        operand = _passes_through(node)
        if operand is not None:
            node.replace_all_uses_with(operand)
            graph.erase_node(node)
    remove_dead(graph)
    _sink_state(graph)


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _passes_through(node: fx.Node) -> fx.Node | None:
    """Return the operand whose value `node` repeats, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    rule = _NO_OPS.get(node.target)
    operand = _first(node)
    if rule is None or operand is None or not rule(node, operand):
        return None
    return operand


def _always(node: fx.Node, operand: fx.Node) -> bool:
    return True


def _keeps_type(node: fx.Node, operand: fx.Node) -> bool:
    left, right = node.meta.get("val"), operand.meta.get("val")
    return same_shape(left, right) and left.device == right.device  # type: ignore[union-attr]


def _keeps_order(node: fx.Node, operand: fx.Node) -> bool:
    value = operand.meta.get("val")
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dims", ())
    if not isinstance(value, torch.Tensor) or not isinstance(dims, (tuple, list)):
        return False
    return [d % value.dim() for d in dims] == list(range(value.dim()))


def _neutral(node: fx.Node, operand: fx.Node, number: int) -> bool:
    literal = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if isinstance(literal, bool) or not isinstance(literal, (int, float)) or literal != number:
        return False
    return same_shape(node.meta.get("val"), operand.meta.get("val"))


def _no_strides_needed(node: fx.Node, operand: fx.Node) -> bool:
    return not any(user.target in _NEED_STRIDES for user in node.users)


# Views that exist only for some memory layouts; everything else works on any.
_NEED_STRIDES = frozenset({torch.view_as_complex, torch.as_strided, "view", torch.view_as_real})

_NO_OPS: dict[Any, Callable[[fx.Node, fx.Node], bool]] = {
    torch.clone: _always,
    "contiguous": _no_strides_needed,
    "to": _keeps_type,
    "expand": _keeps_type,
    torch.reshape: _keeps_type,
    torch.flatten: _keeps_type,
    torch.squeeze: _keeps_type,
    torch.permute: _keeps_order,
    torch.add: lambda node, operand: _neutral(node, operand, 0),
    torch.mul: lambda node, operand: _neutral(node, operand, 1),
}


def _sink_state(graph: fx.Graph) -> None:
    """Move every `get_attr` right before its first user, so that a text reads in order."""
    placed: set[fx.Node] = set()
    for node in list(graph.nodes):
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and operand not in placed:
                placed.add(operand)
                node.prepend(operand)
