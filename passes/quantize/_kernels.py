"""Which nodes a target computes in integers, and where their results are quantised."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import fx

from fxcompress.ir.ops import bind, op_name
from passes.quantize._reads import (
    combined,
    depend_on_inputs,
    is_float,
    is_only_operand,
    pads_with_values,
)
from passes.quantize._rules import CONVOLUTIONS, IDLE, LAYERS, SPLITS
from passes.quantize._targets import PlacementRules

__all__ = ["Kernels", "Refusal"]

Refusal = tuple[fx.Node, str, tuple[fx.Node, ...]]
"""A node left in float, why, and the nodes it is because of."""


class Kernels:
    """The integer kernels of a graph.

    Attributes:
        nodes: What the runtime computes in integers, in graph order.
        result_of: Kernel -> the node after which its result is quantised, its fused activation's.
        integer: That node -> the kernel.
        parts: Norms and activations that a kernel computes too.
        part_of: An add that a convolution computes -> the operand that is the convolution's result.
        declined: What might have been a kernel.

    Args:
        nodes: The graph's nodes, in order.
        rules: What the target has kernels for.
        layers: Convolutions and linear layers to quantise.
        products: Products of two activations to quantise.
        excluded: Nodes to leave in float whatever their operands are.
        norms: Batch norms that are, or will be, part of the layer before them.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        rules: PlacementRules,
        layers: Collection[fx.Node],
        products: Collection[fx.Node],
        excluded: Collection[fx.Node],
        norms: Collection[fx.Node],
    ) -> None:
        self.rules, self.layers, self.products, self.excluded = rules, layers, products, excluded
        self.norms = norms
        self.ops = {node: op_name(node) for node in nodes}
        self.variable = depend_on_inputs(nodes)
        self.nodes: list[fx.Node] = []
        self.result_of: dict[fx.Node, fx.Node] = {}
        self.integer: dict[fx.Node, fx.Node] = {}
        self.part_of: dict[fx.Node, fx.Node] = {}
        self.parts: set[fx.Node] = set()
        self.declined: list[Refusal] = []
        for node in nodes:
            self._classify(node)

    def operands(self, kernel: fx.Node) -> list[fx.Node]:
        """Return the activations that a kernel reads as integers: not weight, bias or sizes."""
        if self.ops[kernel] in LAYERS:
            found = [bind(kernel).get("input")]
        elif kernel in self.products:
            found = [each for each in kernel.all_input_nodes if is_float(each)]
        else:
            found = [each for each in combined(kernel) if each is not self.part_of.get(kernel)]
        return [each for each in found if isinstance(each, fx.Node)]

    def moves(self, node: fx.Node) -> bool:
        """Whether the target only moves values: each is one of the first operand, or 0."""
        op = self.ops[node]
        if op == "pad":
            return bool(self.rules.moves) and pads_with_values(node)
        return op in self.rules.moves or (bool(self.rules.moves) and op in SPLITS)

    def is_near_integer(self, node: fx.Node) -> bool:
        """Whether a tensor is an integer tensor, or moves or element-wise functions of one."""
        while True:
            if node in self.integer or self.ops[node] == self.rules.quantizer:
                return True
            near = self.ops[node] in self.rules.functions or self.moves(node)
            if not near or not node.all_input_nodes:
                return False
            node = node.all_input_nodes[0]

    def _classify(self, node: fx.Node) -> None:
        op, rules = self.ops[node], self.rules
        if node in self.layers or node in self.products:
            self._kernel(node, result=op in rules.results and self._add_after(node) is None)
        elif op in rules.combines and self._combines(node):
            self._kernel(node, result=op in rules.results)
        elif op in rules.averages and node not in self.excluded and self._averages(node):
            self._kernel(node, result=True)

    def _kernel(self, node: fx.Node, *, result: bool) -> None:
        self.nodes.append(node)
        if not result and not self.rules.fused_adds:
            return
        parts = self._parts(node)
        self.parts.update(parts)
        if result:
            last = parts[-1] if parts else node
            self.result_of[node] = last
            self.integer[last] = node

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        """Return the norm and the activation that are a part of a kernel."""
        if self.ops[node] == "cat" or self.ops[node] in self.rules.averages:
            return []
        found: list[fx.Node] = []
        for fused in (self.norms.__contains__, self._is_fused):
            last = found[-1] if found else node
            users = list(last.users)
            if len(users) == 1 and fused(users[0]) and is_only_operand(users[0], last):
                found.append(users[0])
        return found

    def _is_fused(self, node: fx.Node) -> bool:
        return self.ops.get(node) in self.rules.fused

    # -- adds that a convolution computes -------------------------------------------------------

    def _add_after(self, layer: fx.Node) -> fx.Node | None:
        """Return the add that is a part of a convolution."""
        if not self.rules.fused_adds or self.ops[layer] not in CONVOLUTIONS:
            return None
        last = self._end(layer)
        user = next(iter(last.users), None)
        return user if user is not None and self._convolution_of(user) is last else None

    def _end(self, layer: fx.Node) -> fx.Node:
        """Return what becomes of a layer's result by its norm, and by what does nothing in eval."""
        last = layer
        while len(last.users) == 1 and self._is_idle(next(iter(last.users))):
            last = next(iter(last.users))
        return last

    def _is_idle(self, node: fx.Node) -> bool:
        return node in self.norms or self.ops.get(node) in IDLE

    def _convolution_of(self, add: fx.Node) -> fx.Node | None:
        """Return the first operand of an add that is a convolution's result and nobody else's."""
        operands = combined(add) if self.ops.get(add) == "add" and add not in self.excluded else []
        same = [each for each in operands if isinstance(each, fx.Node) and is_float(each)]
        if len(same) != 2 or same[0] is same[1] or not _same_shape(*same):
            return None
        if any(each not in self.variable for each in same):
            return None
        for each in same:
            layer = each
            while self._is_idle(layer):
                layer = layer.all_input_nodes[0]
            chosen = layer in self.layers and self.ops[layer] in CONVOLUTIONS
            if chosen and len(each.users) == 1 and self._end(layer) is each:
                return each
        return None

    # -- kernels of activations -----------------------------------------------------------------

    def _combines(self, node: fx.Node) -> bool:
        if self.ops[node] == "add" and self.rules.fused_adds:
            part = self._is_part(node)
            if part or "add" not in self.rules.results:
                return part
        operands = self.operands(node)
        near = [each for each in operands if self.is_near_integer(each)]
        if not near or not is_float(node):
            return False
        rest = [each for each in operands if each not in near]
        plain = [value for value in combined(node) if not isinstance(value, fx.Node)]
        if node in self.excluded:
            self._decline(node, "it is excluded")
        elif plain or any(not is_float(each) for each in operands):
            self._decline(node, "one of its operands is a number, not an activation")
        elif any(each not in self.variable for each in rest):
            self._decline(node, "one of its operands is a parameter", rest)
        elif rest:
            self._decline(node, "not all of its operands are integer tensors", rest)
        else:
            return True
        return False

    def _is_part(self, add: fx.Node) -> bool:
        convolution = self._convolution_of(add)
        if convolution is not None:
            self.part_of[add] = convolution
            return True
        return False

    def _averages(self, node: fx.Node) -> bool:
        operands = self.operands(node)
        if not operands or not self.is_near_integer(operands[0]):
            return False
        if self.ops[node] != "mean":
            return True
        # Runtimes have integer kernels for means over space, not over channels or the batch.
        value = operands[0].meta.get("val")
        dims = bind(node).get("dim")
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        rank = value.dim() if isinstance(value, torch.Tensor) else 0
        return rank >= 3 and {d % rank for d in dims} == set(range(2, rank))

    def _decline(self, node: fx.Node, reason: str, because: Iterable[fx.Node] = ()) -> None:
        self.declined.append((node, reason, tuple(because)))


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    shapes = [list(each.meta["val"].shape) for each in (one, other)]
    return len(shapes[0]) == len(shapes[1]) and all(a == b for a, b in zip(*shapes, strict=True))
