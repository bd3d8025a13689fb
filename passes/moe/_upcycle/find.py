"""Dense feed-forward layers, found by what they compute: down(act(up x)) or with a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name, op_spec
from fxcompress.rewrite.edits import Declined
from passes.moe._upcycle.activation import activation_of

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["FeedForward", "Layer", "find_feed_forwards"]

_RESHAPES: Final = frozenset({"reshape", "view"})
_PARTS: Final = frozenset({"chunk", "split"})


@dataclass(frozen=True)
class Layer:
    """A linear layer, however it is written.

    Attributes:
        weight: The name of its weight.
        bias: The name of its bias; None without one.
        transposed: Whether the weight is `[in, out]`.
        part: The first and the last but one of the outputs that are meant, where a layer makes more
            than one thing; None for all.
    """

    weight: str
    bias: str | None
    transposed: bool = False
    part: tuple[int, int] | None = None

    def matrix(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight as `[out, in]`."""
        weight = state[self.weight].detach()
        weight = weight.t() if self.transposed else weight
        return weight if self.part is None else weight[self.part[0] : self.part[1]]

    def offset(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """Return the bias, `[out]`."""
        if self.bias is None:
            return None
        bias = state[self.bias].detach()
        return bias if self.part is None else bias[self.part[0] : self.part[1]]


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward layer.

    Attributes:
        path: The innermost module that holds all of it; empty for the model itself.
        entry: What it reads, `[..., width]`.
        exit: What it makes, `[..., width]`.
        down: The node that multiplies by the last matrix; it names the layer.
        gate: None without a gate.
        activation: A key of `fxcompress.nn.experts.ACTIVATIONS` or `GATES`.
        dropout: How likely each hidden value is dropped while training.
    """

    path: str
    entry: fx.Node
    exit: fx.Node
    down: fx.Node
    gate: Layer | None
    up: Layer
    last: Layer
    activation: str
    dropout: float

    @property
    def tensors(self) -> tuple[object, ...]:
        """What tells whether two calls are of one layer."""
        return (self.gate, self.up, self.last, self.activation)


@dataclass(frozen=True)
class _Call:
    """A call of a linear layer: what it reads, the node that multiplies, and what it makes."""

    layer: Layer
    entry: fx.Node
    product: fx.Node
    exit: fx.Node


def find_feed_forwards(program: Program) -> tuple[list[FeedForward], list[Declined]]:
    """Return the feed-forward layers in graph order, and what is almost one with the reason."""
    ids = node_ids(program)
    calls = {call.exit: call for node in program.nodes if (call := _call(node)) is not None}
    found: list[FeedForward] = []
    declined: list[Declined] = []
    for call in calls.values():
        made = _feed_forward(call, calls, ids)
        if isinstance(made, FeedForward):
            found.append(made)
        elif made is not None:
            declined.append(made)
    return found, declined


def _feed_forward(
    last: _Call, calls: Mapping[fx.Node, _Call], ids: Mapping[fx.Node, str]
) -> FeedForward | Declined | None:
    """Return the feed-forward layer that ends in a linear layer; None where nothing is like one."""
    region = _region(last.entry, calls)
    if region is None or not region.nodes:
        return None
    layers = [_source(each, calls) for each in region.sources]
    entry = calls[layers[0][1]].entry
    width = _sizes(entry)
    if not width or width != _sizes(last.exit) or len(layers) > 2:
        return None

    def refuse(reason: str, *because: fx.Node) -> Declined:
        names = tuple(ids[node] for node in because)
        return Declined(node=ids[last.product], reason=reason, because_of=names)

    others = [call for _, call in layers if calls[call].entry is not entry]
    if others:
        reads = (calls[others[0]].entry, entry)
        return refuse("its gate and its values are made of different inputs", *reads)
    made = [*region.nodes, *(n for _, call in layers for n in _nodes(calls[call]))]
    inside = {*made, *_nodes(last)}
    for node in made:
        reader = next((user for user in node.users if user not in inside), None)
        if reader is not None:
            return refuse("something else reads its hidden values", reader)
    if region.obstacle is not None:
        return refuse(f"{op_name(region.obstacle)} stands among its hidden values", region.obstacle)
    activation = activation_of(region.nodes, region.sources, last.entry)
    if activation is None:
        return refuse("its activation is none that experts have", *region.nodes[:1])
    name, swapped = activation
    parts = [layer for layer, _ in layers][:: -1 if swapped else 1]
    path = _common(last.product, *(calls[call].product for _, call in layers))
    return FeedForward(
        path=path,
        entry=entry,
        exit=last.exit,
        down=last.product,
        gate=parts[0] if len(parts) == 2 else None,
        up=parts[-1],
        last=last.layer,
        activation=name,
        dropout=max((_dropout(node) for node in region.nodes), default=0.0),
    )


@dataclass(frozen=True)
class _Region:
    """Element-wise nodes in graph order, and the linear layers' values that they are made of.

    Attributes:
        obstacle: A node that is not a function of the hidden values alone; None without one.
    """

    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    obstacle: fx.Node | None = None


def _region(hidden: fx.Node, calls: Mapping[fx.Node, _Call]) -> _Region | None:
    """Return what hidden values are computed by; None where not of linear layers element-wise."""
    nodes: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    obstacle = None
    stack = [hidden]
    while stack:
        node = stack.pop()
        if node in nodes or node in sources:
            continue
        if node in calls or _part_of(node, calls) is not None:
            sources.add(node)
            continue
        spec = op_spec(op_name(node))
        if spec is None or not (spec.elementwise or spec.kind == "quantize"):
            return None
        nodes.add(node)
        if spec.kind == "quantize" or op_name(node) in ("mask", "tap", "prelu"):
            obstacle = node
        stack += [each for each in node.all_input_nodes if isinstance(_value(each), Tensor)]
        if any(not isinstance(_value(each), Tensor) for each in node.all_input_nodes):
            obstacle = node
    if not sources:
        return None
    order = list(hidden.graph.nodes)
    return _Region(
        tuple(sorted(nodes, key=order.index)), tuple(sorted(sources, key=order.index)), obstacle
    )


def _source(node: fx.Node, calls: Mapping[fx.Node, _Call]) -> tuple[Layer, fx.Node]:
    """Return the layer whose values a node is, and the end of its call."""
    if node in calls:
        return calls[node].layer, node
    part = _part_of(node, calls)
    assert part is not None, "a source is a layer's values or a part of them"
    call, bounds = part
    layer = calls[call].layer
    return Layer(layer.weight, layer.bias, layer.transposed, bounds), call


def _part_of(
    node: fx.Node, calls: Mapping[fx.Node, _Call]
) -> tuple[fx.Node, tuple[int, int]] | None:
    """Return the layer and the outputs of it that a part of a split is; None if it is none."""
    if op_name(node) != "getitem" or not isinstance(node.args[1], int):
        return None
    split = node.args[0]
    if not isinstance(split, fx.Node) or op_name(split) not in _PARTS:
        return None
    call = split.all_input_nodes[0]
    pieces = split.meta.get("val")
    if call not in calls or not isinstance(pieces, (tuple, list)):
        return None
    value = _value(call)
    assert isinstance(value, Tensor), "a linear layer makes a tensor"
    if bind(split).get("dim", 0) % value.dim() != value.dim() - 1:
        return None
    sizes = [int(piece.shape[-1]) for piece in pieces]
    index = node.args[1] % len(sizes)
    return call, (sum(sizes[:index]), sum(sizes[: index + 1]))


def _nodes(call: _Call) -> list[fx.Node]:
    """Return the nodes of a call, and what takes its values apart."""
    flat = [] if call.product is call.exit else [bind(call.product)["mat1"]]
    parts = [user for user in call.exit.users if op_name(user) in _PARTS]
    items = [user for part in parts for user in part.users if op_name(user) == "getitem"]
    return [*flat, call.product, call.exit, *parts, *items]


def _call(node: fx.Node) -> _Call | None:
    """Return the call of a linear layer that a node ends; None if it ends none."""
    op = op_name(node)
    if op == "linear":
        layer = _linear(node)
        return None if layer is None else _Call(layer, _input(node), node, node)
    product = node
    if op in _RESHAPES:
        product = node.all_input_nodes[0]
    if op_name(product) != "addmm":
        return None
    layer = _addmm(product)
    if layer is None:
        return None
    if product is node:
        # Where its one reader gives it its shape back, that is the end of the call.
        ends = [user for user in node.users if op_name(user) in _RESHAPES]
        return None if ends else _Call(layer, bind(node)["mat1"], node, node)
    flat = bind(product)["mat1"]
    if not isinstance(flat, fx.Node) or op_name(flat) not in _RESHAPES or len(product.users) != 1:
        return None
    entry = flat.all_input_nodes[0]
    return _Call(layer, entry, product, node) if _sizes(entry)[:-1] == _sizes(node)[:-1] else None


def _linear(node: fx.Node) -> Layer | None:
    bound = bind(node)
    if node.op == "call_module":
        if "weight" in bound:
            return None
        module = module_of(node)
        bias = None if module.bias is None else f"{node.target}.bias"
        return Layer(f"{node.target}.weight", bias)
    weight, added = bound["weight"], bound.get("bias")
    if not _is_parameter(weight) or not (added is None or _is_parameter(added)):
        return None
    return Layer(str(weight.target), None if added is None else str(added.target))


def _addmm(node: fx.Node) -> Layer | None:
    bound = bind(node)
    bias, weight = bound["input"], bound["mat2"]
    scaled = bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1
    if scaled or not _is_parameter(bias) or not _is_parameter(weight):
        return None
    value = _value(bias)
    if not isinstance(value, Tensor) or value.dim() != 1:
        return None
    return Layer(str(weight.target), str(bias.target), transposed=True)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and op_name(node) == "param"


def _input(node: fx.Node) -> fx.Node:
    found = bind(node)["input"]
    assert isinstance(found, fx.Node), "a linear layer reads a tensor"
    return found


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _sizes(node: fx.Node) -> tuple[str, ...]:
    value = _value(node)
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()


def _dropout(node: fx.Node) -> float:
    if op_name(node) != "dropout":
        return 0.0
    p = module_of(node).p if node.op == "call_module" else bind(node).get("p", 0.5)
    return float(p) if isinstance(p, (int, float)) else 0.0


def _common(*nodes: fx.Node) -> str:
    """Return the innermost module that holds all of these nodes and is none of them."""
    chains = []
    for node in nodes:
        own = str(node.target) if node.op == "call_module" else None
        scope = [path for path, _ in node.meta.get("scope", ()) if path != own]
        chains.append([path for path in scope if path])
    shared = [path for path in chains[0] if all(path in chain for chain in chains[1:])]
    return shared[-1] if shared else ""
