"""Groups: what makes the channels of a tensor, and the layers that read them.

A producer's output channels are divided by factors s > 0 in its own parameters; every layer that
reads them, through ops that pass positive factors on, has its input channels multiplied by them. A
channel that anything else reads keeps s = 1, so the model computes what it did.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from passes.quantize._scaling.labels import (
    SIZES,
    concrete_shape,
    constant_along,
    follow,
    transparent,
)
from passes.quantize._scaling.layers import (
    LAYERS,
    NORMS,
    Blocked,
    Layer,
    Part,
    factor_part,
    layer_of,
    norm_parts,
    readers_of,
)

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Group", "Groups", "Reader", "Stop", "find_groups"]

_LABEL: Final = torch.int32


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels of a producer.

    Attributes:
        layer: The layer.
        index: For each of its input channels the producer's channel, or -1, `[inputs]`.
    """

    layer: Layer
    index: Tensor

    def factors(self, per_channel: Tensor) -> Tensor:
        """Return the factor of each input channel, `[inputs]`, from those of the producer's."""
        known = self.index.clamp_min(0).long()
        return torch.where(self.index >= 0, per_channel[known], torch.ones((), dtype=torch.float64))

    def largest(self, per_input: Tensor, channels: int) -> Tensor:
        """Return the largest value of each of the producer's channels, `[channels]`; 0 if none."""
        here = self.index >= 0
        made = torch.zeros(channels, dtype=per_input.dtype)
        index = self.index[here].long()
        return made.scatter_reduce(0, index, per_input[here], "amax", include_self=True)


@dataclass(frozen=True)
class Stop:
    """A node that factors cannot pass, and why; the reason has the node as its subject."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Group:
    """A producer and all that reads it.

    Attributes:
        producer: The node whose output channels can be divided.
        layer: The same as a layer; None where it is a norm or a product.
        parts: The parameters that take the division.
        readers: The layers that take the multiplication, in graph order.
        free: Which channels may have another factor than 1, `[channels]`.
        stops: What fixes channels.
        path: The nodes between producer and readers.
    """

    producer: fx.Node
    layer: Layer | None
    parts: tuple[Part, ...]
    readers: tuple[Reader, ...]
    free: Tensor
    stops: tuple[Stop, ...]
    path: tuple[fx.Node, ...]

    @property
    def open(self) -> bool:
        """Whether any channel that a layer reads is free."""
        return any(
            bool(self.free[reader.index[reader.index >= 0].long()].any()) for reader in self.readers
        )


@dataclass(frozen=True)
class Groups:
    """Every group in graph order, and why other nodes cannot be producers."""

    all: tuple[Group, ...]
    refused: Mapping[fx.Node, str]

    def why_not(self, layer: fx.Node, ids: Mapping[fx.Node, str]) -> tuple[str, tuple[str, ...]]:
        """Return why a layer's input channels are in no open group, and the nodes behind it."""
        node = next(iter(layer.all_input_nodes))
        while transparent(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        group = next((each for each in self.all if each.producer is node), None)
        if group is not None and group.stops:
            stop = group.stops[0]
            names = (ids[node], ids[stop.node])
            return f"{names[0]} makes its inputs; {names[1]} reads them and {stop.reason}", names
        if node in self.refused and op_name(node) != "mul":
            return f"{ids[node]}, which makes its inputs, {self.refused[node]}", (ids[node],)
        if node.op == "placeholder":
            return "it reads the model's input", (ids[node],)
        return (
            f"the {op_name(node)} that makes its inputs has no weight that could take the scale",
            (ids[node],),
        )


def find_groups(program: Program, through: frozenset[str] = frozenset()) -> Groups:
    """Return the groups of a Program.

    A layer's input channel is in one group: that of the nearest producer.

    Args:
        program: Is only read.
        through: Ops to be passed beside those that are homogeneous.
    """
    finder = _Finder(program, through)
    groups: list[Group] = []
    refused: dict[fx.Node, str] = {}
    for node in reversed(list(program.nodes)):
        if op_name(node) in LAYERS | NORMS or op_name(node) == "mul":
            try:
                groups.append(finder.group(node))
            except Blocked as blocked:
                refused[node] = str(blocked)
    return Groups(tuple(reversed(groups)), refused)


class _Finder:
    def __init__(self, program: Program, through: frozenset[str]) -> None:
        self.program, self.through = program, through
        self.order = {node: place for place, node in enumerate(program.nodes)}
        self.everybody = readers_of(program)
        self.claimed: dict[fx.Node, Tensor] = {}

    def group(self, node: fx.Node) -> Group:
        """Return the group of one producer.

        Raises:
            Blocked: It has no parameters of its own that could take a division.
        """
        layer, parts, labels = self._producer(node)
        for part in parts:
            if self.everybody.get(part.tensor) != [node]:
                raise Blocked(f"shares {part.tensor} with other nodes")
        walk = _Walk(self, node, labels)
        walk.run()
        for reader in walk.readers:
            mine = (reader.index >= 0) & walk.free[reader.index.clamp_min(0).long()]
            taken = self.claimed.get(reader.layer.node)
            self.claimed[reader.layer.node] = mine if taken is None else taken | mine
        return Group(
            producer=node,
            layer=layer,
            parts=parts,
            readers=tuple(walk.readers),
            free=walk.free,
            stops=tuple(walk.stops),
            path=tuple(walk.path),
        )

    def _producer(self, node: fx.Node) -> tuple[Layer | None, tuple[Part, ...], Tensor]:
        shape = concrete_shape(node.meta["val"])
        op = op_name(node)
        if op == "mul":
            part, channels = factor_part(self.program, node)
            return None, (part,), channels.broadcast_to(shape)
        layer = None
        if op in LAYERS:
            layer = layer_of(self.program, node)
            parts, dim = layer.outputs, layer.dim
        else:
            parts, dim = norm_parts(self.program, node)
        dim %= len(shape)
        view = [1] * len(shape)
        view[dim] = -1
        return layer, parts, torch.arange(shape[dim], dtype=_LABEL).reshape(view).expand(shape)

    def reader(self, node: fx.Node, labels: Mapping[fx.Node, Any]) -> Reader:
        """Return a layer as a reader of labelled channels.

        Raises:
            Blocked: Its weight cannot take the factors.
        """
        layer = layer_of(self.program, node)
        if any(each in labels and each is not layer.input for each in node.all_input_nodes):
            raise Blocked("reads it as a weight or bias")
        if self.everybody.get(layer.weight) != [node]:
            raise Blocked(f"shares {layer.weight} with other nodes")
        found: Tensor = labels[layer.input]
        dim = layer.dim % found.dim()
        for other in range(found.dim()):
            if other != dim:
                if not constant_along(found, other):
                    raise Blocked("reads its channels at places that differ")
                found = found.narrow(other, 0, 1)
        index = found.reshape(-1)
        taken = self.claimed.get(node)
        if taken is not None and bool((taken & (index >= 0)).any()):
            raise Blocked("takes its factors from a nearer node")
        return Reader(layer, index)


class _Walk:
    """From a producer to all that its channels reach."""

    def __init__(self, finder: _Finder, producer: fx.Node, labels: Tensor) -> None:
        self.finder = finder
        self.labels: dict[fx.Node, Any] = {producer: labels}
        self.free = torch.ones(int(labels.max()) + 1, dtype=torch.bool)
        self.readers: list[Reader] = []
        self.stops: list[Stop] = []
        self.path: list[fx.Node] = []
        self.ahead: list[tuple[int, fx.Node]] = []
        self.seen: set[fx.Node] = set()
        self._push(producer)

    def run(self) -> None:
        while self.ahead and bool(self.free.any()):
            _, node = heapq.heappop(self.ahead)
            if op_name(node) in SIZES:
                continue
            try:
                self._visit(node)
            except Blocked as blocked:
                self._block(node, str(blocked))

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            raise Blocked("is the model's output")
        if op_name(node) in LAYERS:
            self.readers.append(self.finder.reader(node, self.labels))
            return
        self.labels[node] = follow(
            node,
            self.labels,
            self.finder.through,
            lambda operand, reason: self._block(node, reason, operand),
        )
        self.path.append(node)
        self._push(node)

    def _push(self, node: fx.Node) -> None:
        for user in node.users:
            if user not in self.seen:
                self.seen.add(user)
                heapq.heappush(self.ahead, (self.finder.order[user], user))

    def _block(self, node: fx.Node, reason: str, operand: fx.Node | None = None) -> None:
        self.stops.append(Stop(node, reason))
        for each in node.all_input_nodes if operand is None else [operand]:
            for labels in _tensors(self.labels.get(each)):
                present = torch.unique(_distinct(labels)).long()
                self.free[present[present >= 0]] = False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _distinct(labels: Tensor) -> Tensor:
    """Drop repetitions that cost no memory."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels
