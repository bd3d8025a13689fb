"""Nodes around experts that may be their tokens, choice, weights and sum, the nearest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from passes.moe._lift.feeds import Feed
from passes.moe._lift.found import Weighing
from passes.moe._lift.regions import CHOICES

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["choices_of", "shape_of", "sums_of", "tokens_of", "weighings_of"]

# Several choices of one, put together.
_JOINS: Final = frozenset({"cat", "stack"})
_LOOKUPS: Final = frozenset({"getitem", "index_select", "embedding"})
# A choice of none made one of some expert.
_MASKED: Final = frozenset({"masked_fill", "where", "clamp"})
_CANDIDATES: Final = 6
_MASKS: Final = 3


def shape_of(node: fx.Node) -> list[Any]:
    """Return a traced tensor's sizes, to compare: `==` of two dynamic ones would fix them."""
    sizes = node.meta["val"].shape
    return [size if isinstance(size, int) else size.node.expr for size in sizes]


def sums_of(program: Program, ends: list[fx.Node]) -> list[fx.Node]:
    """Return tensors that are made of every expert's output, the first few."""
    places = {node: 1 << place for place, node in enumerate(ends)}
    every = (1 << len(ends)) - 1
    reached: dict[fx.Node, int] = {}
    found: list[fx.Node] = []
    for node in program.nodes:
        reads = places.get(node, 0)
        for each in node.all_input_nodes:
            reads |= reached.get(each, 0)
        if not reads:
            continue
        reached[node] = reads
        value = node.meta.get("val")
        if reads == every and isinstance(value, Tensor) and value.is_floating_point():
            found.append(node)
        if len(found) > 2 * _CANDIDATES:
            break
    return found


def choices_of(sums: list[fx.Node], feed: Feed, count: int) -> list[fx.Node]:
    """Return tensors of experts' numbers."""
    ends = sums[:1] + sums[-1:]
    found = [node for node in _nearest(ends, [feed.x], _far(count)) if _chooses(node)]
    if not found:
        # Where tokens are weighed before experts, those read what the choice makes.
        found = [node for node in _nearest([feed.x], [], _far(count)) if _chooses(node)]
    # A sort may be the choice, but mostly puts tokens in order.
    found.sort(key=lambda node: "sort" in op_name(_source(node)))
    return found[:_CANDIDATES]


def _chooses(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is not torch.int64 or value.dim() == 0:
        return False
    if op_name(node) in _MASKED:
        return any(_chooses(each) for each in node.all_input_nodes)
    second = op_name(node) != "getitem" or node.args[1] == 1
    if op_name(node) in _JOINS or (op_name(_source(node)) in CHOICES and second):
        return True
    # Looked up in a table, by the tokens' ids.
    table = node.all_input_nodes[0] if node.all_input_nodes else node
    return op_name(node) in _LOOKUPS and table.op == "get_attr" and value.dim() > 1


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if op_name(node) == "getitem" else node


def tokens_of(feed: Feed, indices: fx.Node) -> list[fx.Node]:
    """Return tensors that may be the tokens: one row for each choice."""
    width = shape_of(feed.x)[-1]
    rows = shape_of(indices)
    wanted = ([*rows[:-1], width], [*rows, width])
    found, seen, stack = [], {feed.x}, [feed.x]
    while stack and len(seen) < _CANDIDATES**2:
        node = stack.pop(0)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and shape_of(node) in wanted and value.is_floating_point():
            found.append(node)
            break
        fresh = [each for each in node.all_input_nodes if each not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return found


def weighings_of(output: fx.Node, indices: fx.Node, x: fx.Node, count: int) -> Iterator[Weighing]:
    """Yield what may choose and weigh, the plain ways first."""
    near = list(_nearest([output], [x, indices], _far(count)))
    rows = shape_of(indices)
    each = _of_shape(near, rows, lambda value: value.is_floating_point())[: 2 * _CANDIDATES]
    for weights in each:
        yield Weighing(indices, weights)
    spread = [*shape_of(x)[:-1], count]
    for weights in _of_shape(near, spread, lambda value: value.is_floating_point())[:_CANDIDATES]:
        yield Weighing(indices, weights, spread=True)
    one_hot = [[*rows, count], spread]
    for kept in [node for shape in one_hot for node in _of_shape(near, shape, _is_mask)][:_MASKS]:
        for weights in each:
            yield Weighing(indices, weights, kept=kept)


def _is_mask(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def _of_shape(
    nodes: Iterable[fx.Node], wanted: list[Any], fits: Callable[[Tensor], bool]
) -> list[fx.Node]:
    return [
        node
        for node in nodes
        if isinstance(node.meta.get("val"), Tensor)
        and fits(node.meta["val"])
        and node.op != "get_attr"
        and len(node.meta["val"].shape) == len(wanted)
        and shape_of(node) == wanted
    ]


def _nearest(nodes: Iterable[fx.Node], stop: Iterable[fx.Node], most: int) -> Iterator[fx.Node]:
    """Yield what nodes are computed from, the nearest first, and not far."""
    seen = {*stop, *nodes}
    frontier = list(nodes)
    while frontier and len(seen) < most:
        fresh = {each for node in frontier for each in node.all_input_nodes} - seen
        seen |= fresh
        frontier = sorted(fresh, reverse=True)
        yield from frontier


def _far(count: int) -> int:
    """Return how many nodes around so many experts are looked at."""
    return 100 + 16 * count
