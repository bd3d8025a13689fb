"""Stable node ids: what users read and select, independent of FX node names."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.ir.ops import op_name

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["find_node", "node_ids", "scope_of"]


def scope_of(node: fx.Node) -> str:
    """Return the path of the innermost module that the node was recorded in; empty for the root."""
    stack = node.meta.get("scope") or ()
    return str(stack[-1][0]) if stack else ""


def node_ids(program: Program | fx.GraphModule | fx.Graph) -> dict[fx.Node, str]:
    """Return the id of every node, in graph order.

    A `call_module` node is called by its module's path (`layer1.0.conv1`), an input by its name, a
    parameter or buffer by its qualified name, anything else by `scope/op` (`layer1.0/relu`,
    `/add`). The second and further nodes of one name end in `@2`, `@3`, … in graph order, so an
    insertion renumbers only nodes of its own name.
    """
    graph = program if isinstance(program, fx.Graph) else program.graph
    counts: Counter[str] = Counter()
    ids: dict[fx.Node, str] = {}
    for node in graph.nodes:
        base = _base(node)
        counts[base] += 1
        ids[node] = base if counts[base] == 1 else f"{base}@{counts[base]}"
    return ids


def _base(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "call_module"):
        return str(node.target)
    if node.op == "output":
        return "output"
    return f"{scope_of(node)}/{op_name(node)}"


def find_node(program: Program, node_id: str) -> fx.Node | None:
    """Return the node of that id, or None."""
    return next((n for n, name in node_ids(program).items() if name == node_id), None)
