"""Where the activations of an axis can be watched: what its readers read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.axes import Axis, Place, Term, positions
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.pipeline.base import Selection
from passes._layers.weights import Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program

__all__ = ["Tap", "find_taps"]


@dataclass(frozen=True)
class Tap:
    """One dimension of an activation, and what it is made of."""

    node: fx.Node
    dim: int
    term: Term

    def width(self, axis: Axis) -> int:
        """Return how many positions along the dimension belong to each index."""
        return int(positions(self.term, axis).shape[1])


def find_taps(
    program: Program, analysis: Analysis, axes: Iterable[Axis]
) -> dict[Axis, tuple[Tap, ...]]:
    """Return where each axis's activations are read by a layer, in the order of its places.

    An axis that no layer reads (the width of queries and keys) is watched where its own layers
    make it. An axis without an activation gets none.
    """
    weights = {weight.tensor: weight for weight in find_weights(program, Selection())[0]}
    makers = _makers(program)
    found = {}
    for axis in axes:
        read = [
            node
            for place in axis.places
            if place.tensor in weights
            for node in _operands(place, weights[place.tensor])
        ]
        made = [node for place in axis.places for node in makers.get(place.tensor, ())]
        found[axis] = tuple(_taps(read, analysis, axis)) or tuple(_taps(made, analysis, axis))
    return found


def _operands(place: Place, weight: Weight) -> Iterator[fx.Node]:
    """Yield what a weight is multiplied with, if the place is its input dimension."""
    if place.dim != weight.form.input:
        return
    for reader in weight.readers:
        operand = bind(reader.node)[reader.operand]
        if isinstance(operand, fx.Node):
            yield operand


def _taps(nodes: Iterable[fx.Node], analysis: Analysis, axis: Axis) -> Iterator[Tap]:
    for node in dict.fromkeys(nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            for dim, term in enumerate(analysis.terms(node) or ()):
                tap = Tap(node, dim, term)
                if tap.width(axis):
                    yield tap


def _makers(program: Program) -> Mapping[str, list[fx.Node]]:
    """Return parameter -> the nodes that compute with it and with an activation."""
    found: dict[str, list[fx.Node]] = {}
    constant: dict[fx.Node, set[str]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            if op_name(node) == "param":
                constant[node] = {program.ties.get(str(node.target), str(node.target))}
            continue
        inputs = node.all_input_nodes
        names = set().union(*(constant.get(each, set()) for each in inputs)) if inputs else set()
        if node.op == "call_module":
            for name, _ in module_of(node).named_parameters():
                full = f"{node.target}.{name}"
                names.add(program.ties.get(full, full))
        elif inputs and all(each in constant for each in inputs):
            constant[node] = names
            continue
        for name in names:
            found.setdefault(name, []).append(node)
    return found
