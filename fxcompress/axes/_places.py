"""Where one axis occurs: a graph of tensor dimensions, joined at the nodes that relate them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx
from torch import fx

from fxcompress.axes.analysis import Analysis
from fxcompress.axes.terms import Axis, Term, axes_of
from fxcompress.ir import module_of, node_ids, op_name

__all__ = [
    "Graph", "Vertex", "dims_at", "occurrences", "results_of", "route", "stored", "tensors_of",
    "trail",
]  # fmt: skip


@dataclass(frozen=True)
class Vertex:
    """A dimension of a node's result, or of a parameter or buffer.

    Attributes:
        owner: The node's id, or the tensor's name.
        dim: Which dimension.
        part: Which tensor of a result of several, such as `#1`; else empty.
        stored: It is of a parameter or buffer.
    """

    owner: str
    dim: int
    part: str = ""
    stored: bool = False

    def __str__(self) -> str:
        return f"{self.owner}{self.part}[{self.dim}]"


Graph: TypeAlias = "nx.Graph[Vertex]"


def occurrences(analysis: Analysis, axis: Axis) -> Graph:
    """Return every dimension in which an axis occurs, joined where a node relates two of them.

    Each node joins those of its operands, parameters and results to one of them, so the graph is
    linear in the size of the model. An edge's `node` and `op` say where it comes from.
    """
    graph: Graph = nx.Graph()
    ids = node_ids(analysis.program)
    for node in analysis.program.nodes:
        met = [vertex for vertex, term in dims_at(analysis, node, ids) if axis in axes_of(term)]
        graph.add_nodes_from(met)
        for vertex in met[1:]:
            if vertex != met[0] and not graph.has_edge(met[0], vertex):
                graph.add_edge(met[0], vertex, node=ids[node], op=op_name(node))
    return graph


def dims_at(
    analysis: Analysis, node: fx.Node, ids: dict[fx.Node, str]
) -> Iterator[tuple[Vertex, Term]]:
    """Yield the dimensions that a node relates: its results', operands', and parameters'."""
    for source in (node, *node.all_input_nodes):
        yield from results_of(analysis, source, ids[source])
    for name in tensors_of(analysis, node):
        yield from stored(analysis, name)


def tensors_of(analysis: Analysis, node: fx.Node) -> list[str]:
    """Return the parameters and buffers of a called module, by canonical name."""
    if node.op != "call_module":
        return []
    module = module_of(node)
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    ties = analysis.program.ties
    return [ties.get(full, full) for full in (f"{node.target}.{name}" for name in names)]


def route(graph: Graph, start: Vertex, end: Vertex) -> list[tuple[Vertex, str]]:
    """Return the shortest way between two dimensions: each with the node that led to it.

    The first has no node. Where there is no way, there is nothing.
    """
    try:
        path = nx.shortest_path(graph, start, end)
    except (nx.NetworkXNoPath, nx.NodeNotFound):
        return []
    via = [graph.edges[pair]["node"] for pair in pairwise(path)]
    return list(zip(path, ["", *via], strict=True))


def trail(path: list[tuple[Vertex, str]]) -> tuple[str, ...]:
    """Return a way as people read it: the place it starts from, then nodes and tensors met."""
    names: list[str] = []
    for place, (vertex, node) in enumerate(path):
        shown = str(vertex) if vertex.stored or place == 0 else vertex.owner
        names += [node, shown] if node else [shown]
    return tuple(name for i, name in enumerate(names) if i == 0 or name not in (names[i - 1], ""))


def results_of(analysis: Analysis, node: fx.Node, name: str) -> Iterator[tuple[Vertex, Term]]:
    """Yield the dimensions of a node's result, of each tensor if there are several."""
    if node.op == "get_attr":
        target = str(node.target)
        yield from stored(analysis, analysis.program.ties.get(target, target))
    elif node.op != "output":
        for part, terms in _flat(analysis.nested_terms(node), ""):
            for dim, term in enumerate(terms):
                yield Vertex(name, dim, part), term


def stored(analysis: Analysis, name: str) -> Iterator[tuple[Vertex, Term]]:
    """Yield the dimensions of a parameter or buffer, given its canonical name."""
    for dim, term in enumerate(analysis.places(name)):
        yield Vertex(name, dim, stored=True), term


def _flat(value: Any, part: str) -> Iterator[tuple[str, tuple[Term, ...]]]:
    if isinstance(value, tuple):
        yield part, value
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _flat(each, f"{part}#{place}")
