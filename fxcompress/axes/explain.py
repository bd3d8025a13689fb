"""explain(): what a dimension is made of, what shrinks with it, and why it cannot shrink.

Everything is read from the solved analysis when asked for; nothing is kept while solving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxcompress.axes._lookup import Found, lookup
from fxcompress.axes._places import Graph, Vertex, dims_at, occurrences, route, trail
from fxcompress.axes._written import Letters, constant_text
from fxcompress.axes.analysis import Analysis
from fxcompress.axes.terms import Axis, Concat, Frozen, Product, Role, Term, axes_of, size_of
from fxcompress.ir import node_ids, op_name

__all__ = ["AxisFacts", "Coupled", "Coupling", "DimFacts", "Explanation", "coupling", "explain"]


@dataclass(frozen=True)
class DimFacts:
    """One dimension: where, how long, and its term in letters; `axes` names what it is made of."""

    place: str
    size: int
    term: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Coupled:
    """A parameter or buffer dimension that shrinks with an axis: `module` is whose it is."""

    place: str
    role: Role
    module: str
    term: str


@dataclass(frozen=True)
class AxisFacts:
    """An axis that occurs in what was asked for.

    Attributes:
        name: What it is called; `fixed` or `free` for one that no parameter has.
        letter: What it is called in terms; empty for one that cannot change.
        size: How many indices it has.
        kind: What it is in the model.
        frozen: Why it cannot change; empty if it can.
        path: From the asked dimension through the model to the node that froze it.
        coupled: Every parameter and buffer dimension in which it occurs, in graph order.
        constants: Numbers in the graph that follow its size, such as `view size[2] = 4·a`.
        statistics: Nodes that take a mean, a norm or a softmax over it.
    """

    name: str
    letter: str
    size: int
    kind: str
    frozen: str
    path: tuple[str, ...]
    coupled: tuple[Coupled, ...]
    constants: tuple[str, ...]
    statistics: tuple[str, ...]

    @property
    def modules(self) -> dict[str, tuple[Coupled, ...]]:
        """The coupled dimensions by module, in graph order."""
        found: dict[str, list[Coupled]] = {}
        for each in self.coupled:
            found.setdefault(each.module, []).append(each)
        return {module: tuple(members) for module, members in found.items()}


@dataclass(frozen=True)
class Explanation:
    """What was asked for, dimension by dimension, and the axes that those are made of.

    Attributes:
        what: As asked.
        dims: Its dimensions; of a node, those of its result and then of its parameters.
        axes: What they are made of.
        letters: What the letters in terms stand for.
        tied: The name under which a tied parameter is kept, or empty.
    """

    what: str
    dims: tuple[DimFacts, ...]
    axes: tuple[AxisFacts, ...]
    letters: Mapping[str, str]
    tied: str = ""


@dataclass(frozen=True)
class Coupling:
    """Whether two things shrink together.

    Attributes:
        left: The first, as asked.
        right: The second.
        axes: The axes that both have; none if they are independent.
        path: The shortest way from one to the other along the first of these.
    """

    left: str
    right: str
    axes: tuple[str, ...]
    path: tuple[str, ...]


def explain(analysis: Analysis, what: str) -> Explanation:
    """Explain a node, a parameter or buffer, one dimension of either, or an axis, by name.

    Args:
        analysis: The solved dimensions of a Program.
        what: A node id (`layer1.0/add`), a tensor (`fc.weight`), a dimension (`fc.weight[1]`), or
            an axis as decisions name it (`attn.qkv.weight[0].1`).

    Raises:
        UsageError: There is none of that name; the hint has the closest.
    """
    found = lookup(analysis, what)
    reader = _Reader(analysis)
    dims = tuple(reader.dim(vertex, term) for vertex, term in found.dims)
    starts: dict[Axis, Vertex] = {}
    for vertex, term in found.dims:
        for axis in axes_of(term):
            if found.axis in (None, axis):
                starts.setdefault(axis, vertex)
    axes = [reader.axis(axis, start) for axis, start in starts.items()]
    if found.axis is None:
        axes += _singles(found)
    return Explanation(what, dims, tuple(axes), reader.letters.names, found.tied)


def coupling(analysis: Analysis, left: str, right: str) -> Coupling:
    """Say whether two nodes, tensors, dimensions or axes shrink together, and along which way.

    Raises:
        UsageError: There is none of a name.
    """
    first, second = lookup(analysis, left), lookup(analysis, right)
    shared = [axis for axis in _axes(first) if axis in set(_axes(second))]
    ways = (_way(occurrences(analysis, axis), axis, first, second) for axis in shared[:1])
    return Coupling(left, right, tuple(map(called, shared)), next(ways, ()))


def called(axis: Axis) -> str:
    """Return an axis's name, or what it is if no parameter has it."""
    return axis.name or ("fixed" if axis.frozen else "free")


class _Reader:
    """Describes the dimensions and axes of one analysis, with a letter for each free axis."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.ids = node_ids(analysis.program)
        self.nodes = {name: node for node, name in self.ids.items()}
        self.letters = Letters()

    def dim(self, vertex: Vertex, term: Term) -> DimFacts:
        names = tuple(dict.fromkeys(axis.name for axis in axes_of(term) if axis.name))
        return DimFacts(str(vertex), size_of(term), self.letters.write(term), names)

    def axis(self, axis: Axis, start: Vertex) -> AxisFacts:
        write = self.letters.write
        return AxisFacts(
            name=called(axis),
            letter=write(axis) if axis.frozen is None else "",
            size=axis.size,
            kind=axis.kind,
            frozen=axis.frozen.reason if axis.frozen else "",
            path=self._path(axis, start),
            coupled=tuple(
                Coupled(str(each), each.role, each.tensor.rpartition(".")[0], write(each.term))
                for each in axis.places
            ),
            constants=tuple(
                constant_text(each, self.ids[each.node], write)
                for each in self.analysis.constants
                if each.form != "attribute" and any(axis in axes_of(term) for term in each.terms)
            ),
            statistics=tuple(
                self.ids[node]
                for node, terms in self.analysis.spans.items()
                if any(axis in axes_of(term) for term in terms)
            ),
        )

    def _path(self, axis: Axis, start: Vertex) -> tuple[str, ...]:
        """Return the way from a dimension to the node that froze its axis."""
        if axis.frozen is None:
            return ()
        node = self.nodes.get(axis.frozen.node)
        if node is None:
            return (str(start), axis.frozen.node) if axis.frozen.node else (str(start),)
        graph = occurrences(self.analysis, axis)
        end = Vertex(axis.frozen.node, -1)
        for vertex, term in dims_at(self.analysis, node, self.ids):
            if axis in axes_of(term):
                graph.add_edge(vertex, end, node=axis.frozen.node, op=op_name(node))
        path = trail(route(graph, start, end)) or (str(start), axis.frozen.node)
        return path if path[-1] == axis.frozen.node else (*path, axis.frozen.node)


def _singles(found: Found) -> Iterator[AxisFacts]:
    """Yield what is made of single indices: no axis, but as fixed as a frozen one."""
    told: set[tuple[int, Frozen]] = set()
    for vertex, term in found.dims:
        for part in _without_axes(term):
            if part.frozen is None or (size_of(part), part.frozen) in told:
                continue
            told.add((size_of(part), part.frozen))
            path = tuple(filter(None, (str(vertex), part.frozen.node)))
            reason = part.frozen.reason
            yield AxisFacts("fixed", "", size_of(part), "other", reason, path, (), (), ())


def _without_axes(term: Term) -> Iterator[Concat]:
    """Yield the largest concatenations in a term that have no axis."""
    if isinstance(term, Axis):
        return
    if isinstance(term, Concat) and not any(True for _ in axes_of(term)):
        yield term
        return
    for each in term.factors if isinstance(term, Product) else term.parts:
        yield from _without_axes(each)


def _axes(found: Found) -> list[Axis]:
    if found.axis is not None:
        return [found.axis]
    met = (axis for _, term in found.dims for axis in axes_of(term))
    return [axis for axis in dict.fromkeys(met) if axis.size > 1]


def _way(graph: Graph, axis: Axis, first: Found, second: Found) -> tuple[str, ...]:
    ends = [[v for v, term in each.dims if axis in axes_of(term)] for each in (first, second)]
    ways = (trail(route(graph, start, end)) for start in ends[0] for end in ends[1])
    return min((way for way in ways if way), key=len, default=())
