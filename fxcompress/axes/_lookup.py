"""Find what a name stands for: an axis, a node, a tensor, or one dimension of a node or tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from fxcompress.axes._places import Vertex, results_of, stored, tensors_of
from fxcompress.axes.analysis import Analysis
from fxcompress.axes.terms import Axis, Term
from fxcompress.errors import UsageError
from fxcompress.ir import node_ids

__all__ = ["Found", "known_names", "lookup"]

_DIM = re.compile(r"(?P<owner>.+)\[(?P<dim>-?\d+)\]")


@dataclass(frozen=True)
class Found:
    """The dimensions that a name stands for, and the axis if it names one.

    `tied` is the name under which a tied parameter is kept, or empty.
    """

    dims: tuple[tuple[Vertex, Term], ...]
    axis: Axis | None = None
    tied: str = ""


def lookup(analysis: Analysis, what: str) -> Found:
    """Return what a name stands for; an axis comes before a dimension of the same name.

    Raises:
        UsageError: There is none of that name, or the dimension is out of range.
    """
    for axis in (*analysis.axes, *analysis.frozen):
        if axis.name == what:
            place = next(each for each in axis.places if what.startswith(str(each)))
            return Found(((Vertex(place.tensor, place.dim, stored=True), place.term),), axis)
    found = _whole(analysis, what)
    if found is not None:
        return found
    match = _DIM.fullmatch(what)
    owner = _whole(analysis, match["owner"]) if match else None
    if match and owner is not None:
        return _dim(owner, int(match["dim"]), what, match["owner"])
    raise _unknown(analysis, what)


def known_names(analysis: Analysis) -> Iterator[str]:
    """Yield every node id, tensor and axis."""
    yield from node_ids(analysis.program).values()
    yield from analysis.tensors
    yield from analysis.program.ties
    for axis in (*analysis.axes, *analysis.frozen):
        yield axis.name


def _whole(analysis: Analysis, name: str) -> Found | None:
    """Return all dimensions of a node and its tensors, of a module's tensors, or of a tensor."""
    for node, node_id in node_ids(analysis.program).items():
        if node_id == name:
            dims = list(results_of(analysis, node, node_id))
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    dims += results_of(analysis, source, "")
            for tensor in tensors_of(analysis, node):
                dims += stored(analysis, tensor)
            return Found(tuple(dims))
    inside = [tensor for tensor in analysis.tensors if tensor.rpartition(".")[0] == name != ""]
    if inside:
        return Found(tuple(each for tensor in inside for each in stored(analysis, tensor)))
    canonical = analysis.program.ties.get(name, name)
    if canonical not in analysis.tensors:
        return None
    tied = canonical if canonical != name else ""
    return Found(tuple(stored(analysis, canonical)), tied=tied)


def _dim(owner: Found, dim: int, what: str, name: str) -> Found:
    own = [(v, term) for v, term in owner.dims if v.owner == owner.dims[0][0].owner]
    rank = 1 + max((vertex.dim for vertex, _ in own), default=-1)
    dims = tuple((v, term) for v, term in own if v.dim == (dim + rank if dim < 0 else dim))
    if not dims:
        raise UsageError(
            f"{name} has no dimension {dim}",
            reason=f"it has {rank}" if rank else "it is no tensor",
            where=what,
        )
    return Found(dims, tied=owner.tied)


def _unknown(analysis: Analysis, what: str) -> UsageError:
    names = list(dict.fromkeys(known_names(analysis)))
    close = get_close_matches(what, names, n=2, cutoff=0.6)
    close = close or [name for name in names if what in name][:2]
    shown = " or ".join(f"`{name}`" for name in close)
    return UsageError(
        f"the model has no node, parameter or axis `{what}`",
        reason=f"there are {len(names)} of them",
        hint=f"did you mean {shown}?" if close else "`fxcompress plan` shows ids of nodes",
        where=what,
    )
