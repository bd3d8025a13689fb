"""Where the nodes of a small graph go in a picture without scripts: in layers, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import networkx as nx

__all__ = ["BOX", "Layout", "lay_out"]

BOX: Final = (168, 34)
"""Width and height of a node."""
_BEND: Final = 14
_GAP: Final = 18
_ROW: Final = 58
_SWEEPS: Final = 40
# How much an edge pulls its ends: between bends, and between nodes; 1 between the two.
_STRAIGHT, _NODES = 8, 3

_Place: TypeAlias = tuple[int, int]
"""A node and 0, or the n-th bend of the edge of that number."""


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        width: Of the whole.
        height: Likewise.
        nodes: The middle of each node's box.
        paths: The points that each edge passes, from the lower side of one box to the upper side
            of another.
    """

    width: float
    height: float
    nodes: Mapping[int, tuple[float, float]]
    paths: Sequence[Sequence[tuple[float, float]]]


def lay_out(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> Layout:
    """Put nodes in layers so that edges point down, with few crossings.

    Longest paths give the layers, barycentres the order in each, and means of neighbours the
    places (Sugiyama, Tagawa and Toda, 1981, sections III and IV).

    Args:
        nodes: In an order in which edges point forwards.
        edges: Pairs of nodes.
    """
    ranks = _ranks(nodes, edges)
    layers: list[list[_Place]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for node in nodes:
        layers[ranks[node]].append((node, 0))
    graph: nx.DiGraph[_Place] = nx.DiGraph()
    chains = []
    for number, (source, target) in enumerate(edges):
        bends: list[_Place] = [(-1 - number, i) for i in range(ranks[source] + 1, ranks[target])]
        for bend in bends:
            layers[bend[1]].append(bend)
        chain = [(source, 0), *bends, (target, 0)]
        nx.add_path(graph, chain)
        chains.append(chain)
    graph.add_nodes_from((node, 0) for node in nodes)
    _order(layers, graph)
    x = _spread(layers, graph)
    left = min((x[place] - _width(place) / 2 for place in x), default=0.0)
    right = max((x[place] + _width(place) / 2 for place in x), default=0.0)
    y = {place: rank * _ROW + BOX[1] / 2 for rank, layer in enumerate(layers) for place in layer}
    half = BOX[1] / 2
    return Layout(
        right - left,
        (len(layers) - 1) * _ROW + BOX[1],
        {node: (x[node, 0] - left, y[node, 0]) for node in nodes},
        [
            [
                (x[chain[0]] - left, y[chain[0]] + half),
                *((x[bend] - left, y[bend] + d) for bend in chain[1:-1] for d in (-half, half)),
                (x[chain[-1]] - left, y[chain[-1]] - half),
            ]
            for chain in chains
        ],
    )


def _ranks(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the layer of each node; what reads nothing stands right above what reads it."""
    ranks: dict[int, int] = dict.fromkeys(nodes, 0)
    into: dict[int, list[int]] = {node: [] for node in nodes}
    out: dict[int, list[int]] = {node: [] for node in nodes}
    for source, target in edges:
        into[target].append(source)
        out[source].append(target)
    for node in nodes:
        ranks[node] = max((ranks[source] + 1 for source in into[node]), default=0)
    for node in nodes:
        if not into[node] and out[node]:
            ranks[node] = min(ranks[target] for target in out[node]) - 1
    lowest = min(ranks.values(), default=0)
    return {node: rank - lowest for node, rank in ranks.items()}


def _order(layers: list[list[_Place]], graph: nx.DiGraph[_Place]) -> None:
    """Sort each layer by the mean place of what it is connected with above, then below."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            places = {place: i for each in layers for i, place in enumerate(each)}
            near = graph.predecessors if down else graph.successors
            layer.sort(
                key=lambda place: _mean([places[each] for each in near(place)], places[place])
            )


def _spread(layers: list[list[_Place]], graph: nx.DiGraph[_Place]) -> dict[_Place, float]:
    """Return the middle of each place: near its neighbours', none over another."""
    x: dict[_Place, float] = {
        place: i * (BOX[0] + _GAP) for layer in layers for i, place in enumerate(layer)
    }
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = [_pulled(x, graph, place) for place in layer]
            x.update(zip(layer, _without_overlap(layer, wanted), strict=True))
    return x


def _without_overlap(layer: Sequence[_Place], wanted: Sequence[float]) -> list[float]:
    """Return places far enough from each other, in their order, nearest to those wanted.

    Without what must lie between them, places may only grow: that is isotonic regression, by
    pooling adjacent violators (Best and Chakravarti, 1990, section 2).
    """
    offsets = [0.0]
    for one, other in pairwise(layer):
        offsets.append(offsets[-1] + _apart(one, other))
    pools: list[tuple[float, int]] = []
    for place, offset in zip(wanted, offsets, strict=True):
        pool = (place - offset, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, count = pools.pop()
            size = count + pool[1]
            pool = (mean * count + pool[0] * pool[1]) / size, size
        pools.append(pool)
    levels = [mean for mean, count in pools for _ in range(count)]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]


def _pulled(x: dict[_Place, float], graph: nx.DiGraph[_Place], place: _Place) -> float:
    """Return the mean of the neighbours' places; bends pull at bends most: lines are straight."""
    near = list(nx.all_neighbors(graph, place))
    weights = [
        _STRAIGHT if place[0] < 0 and each[0] < 0 else 1 if place[0] < 0 or each[0] < 0 else _NODES
        for each in near
    ]
    if not near:
        return x[place]
    return sum(w * x[each] for w, each in zip(weights, near, strict=True)) / sum(weights)


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _width(place: _Place) -> int:
    return BOX[0] if place[0] >= 0 else _BEND


def _apart(one: _Place, other: _Place) -> float:
    return (_width(one) + _width(other)) / 2 + _GAP
