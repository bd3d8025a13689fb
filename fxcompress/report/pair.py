"""A graph before and after a pass as one picture, for pages that run no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fxcompress.ir import Program, node_ids, op_name, type_text
from fxcompress.report.graph import union_graph
from fxcompress.report.layers import BOX, lay_out
from fxcompress.report.model import Edge, UnionGraph, UnionNode
from fxcompress.report.render import render_macro

__all__ = ["render_pair"]

_MARGIN: Final = 16
_BETWEEN: Final = 48
_HEAD: Final = 58


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    label: str
    type: str
    status: str
    kind: str
    text: str


@dataclass(frozen=True)
class _Flow:
    path: str
    status: str


@dataclass(frozen=True)
class _Panel:
    x: float
    title: str
    note: str
    width: float
    height: float
    nodes: Sequence[_Box]
    edges: Sequence[_Flow]


def render_pair(before: Program, after: Program, title: str) -> str:
    """Return both graphs side by side as an SVG file of its own.

    What went is marked on the left, what came on the right, and what is there in both but reads or
    makes something else on both sides. Sizes are left out.

    Args:
        before: The Program before.
        after: The Program after.
        title: What a screen reader says of the picture.
    """
    graph = union_graph(before, after)
    left = _panel(graph, before, "added", "before", _MARGIN)
    right = _panel(graph, after, "removed", "after", _MARGIN + left.width + _BETWEEN)
    width = round(right.x + right.width + _MARGIN)
    height = round(_HEAD + max(left.height, right.height) + _MARGIN)
    return render_macro("pair", [left, right], width, height, BOX, title)


def _panel(graph: UnionGraph, program: Program, without: str, title: str, x: float) -> _Panel:
    shown = [
        i
        for i, node in enumerate(graph.nodes)
        if node.status != without and not node.type.startswith("int(")
    ]
    edges = [
        edge
        for edge in graph.edges
        if edge.status != without and {edge.source, edge.target} <= set(shown)
    ]
    here = {
        name: (op_name(node), "" if node.op == "output" else type_text(node.meta["val"], program))
        for node, name in node_ids(program).items()
    }
    layout = lay_out(_sorted(shown, edges), [(edge.source, edge.target) for edge in edges])
    parameters = sum(each.numel() for each in program.module.parameters())
    return _Panel(
        x,
        title,
        f"{len(shown)} nodes, {parameters:,} parameters",
        max(layout.width, BOX[0]),
        layout.height,
        [_box(graph.nodes[i], *here[graph.nodes[i].id], *layout.nodes[i]) for i in shown],
        [
            _Flow(_curve(points), edge.status)
            for edge, points in zip(edges, layout.paths, strict=True)
        ],
    )


def _sorted(nodes: Sequence[int], edges: Iterable[Edge]) -> list[int]:
    """Return the nodes of one side so that edges point forwards: the union's order need not."""
    import networkx as nx

    found: nx.DiGraph[int] = nx.DiGraph()
    found.add_nodes_from(nodes)
    found.add_edges_from((edge.source, edge.target) for edge in edges)
    return list(nx.lexicographical_topological_sort(found))


def _box(node: UnionNode, op: str, type_: str, x: float, y: float) -> _Box:
    name = node.id.rpartition("/")[2].partition("@")[0]
    label = name if name == op else f"{name}: {op}"
    text = f"{node.before} → {node.text}" if node.before and node.text else node.text or node.before
    return _Box(round(x, 1), round(y, 1), label, type_, node.status, node.kind, text)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path that leaves and enters every place downwards."""
    (x, y), *rest = points
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in rest:
        middle = (y + to_y) / 2
        path += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return path
