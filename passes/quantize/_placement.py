"""Where quantize nodes go: a pure function of the graph and the layers to quantise.

1. The output of a quantised convolution is an integer tensor, after its fused activation. So is
   an add, mul or concatenation all of whose operands are integer tensors (or element-wise
   functions of one), and the average of an integer tensor. Everybody reads the quantised value.
2. What such a kernel, or a quantised linear layer, reads must be the output of a quantize node. If
   it comes, through ops that only move values, from an integer tensor, that tensor's quantizer is
   called again; else the operand gets its own, which only integer kernels read.
3. Operands and result of a concatenation share one quantizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.ir.ops import bind, op_name
from passes.quantize._rules import (
    ACTIVATIONS,
    AVERAGES,
    COMBINES,
    CONVOLUTIONS,
    FUSED,
    LAYERS,
    MOVES,
    SPLITS,
)

__all__ = ["Placement", "Site", "place"]


@dataclass
class Site:
    """A quantizer: the tensors it is called on.

    Attributes:
        calls: Node -> the users that read the quantised value; None for all of them.
        owners: The calls whose values are new; only these are observed.
        fixed: A quantizer that is in the graph already.
    """

    calls: dict[fx.Node, set[fx.Node] | None] = field(default_factory=dict)
    owners: list[fx.Node] = field(default_factory=list)
    fixed: fx.Node | None = None


@dataclass
class Placement:
    """Quantizers of activations, and what was left in float with the reason."""

    sites: list[Site]
    input_site: dict[fx.Node, Site]
    declined: list[tuple[fx.Node, str, tuple[fx.Node, ...]]]


def place(
    nodes: Iterable[fx.Node],
    layers: Collection[fx.Node],
    products: Collection[fx.Node] = (),
    excluded: Collection[fx.Node] = (),
    norms: Collection[fx.Node] = (),
) -> Placement:
    """Return the quantizers that the layers, and what lies between them, need.

    Args:
        nodes: The graph's nodes, in order.
        layers: Convolutions and linear layers to quantise.
        products: Products of two activations to quantise.
        excluded: Nodes to leave in float whatever their operands are.
        norms: Batch norms that are, or will be, part of the layer before them.
    """
    return _Placer(list(nodes), layers, products, excluded, norms).run()


class _Placer:
    def __init__(
        self,
        nodes: list[fx.Node],
        layers: Collection[fx.Node],
        products: Collection[fx.Node],
        excluded: Collection[fx.Node],
        norms: Collection[fx.Node],
    ) -> None:
        self.nodes, self.layers, self.products, self.excluded = nodes, layers, products, excluded
        self.norms = norms
        self.ops = {node: op_name(node) for node in nodes}
        self.variable = _depend_on_inputs(nodes)
        # The node after which an integer kernel's result is quantised, its fused activation's.
        self.result_of: dict[fx.Node, fx.Node] = {}
        self.integer: dict[fx.Node, fx.Node] = {}
        self.kernels: list[fx.Node] = []
        self.sites: dict[fx.Node, Site] = {}
        self.declined: list[tuple[fx.Node, str, tuple[fx.Node, ...]]] = []

    def run(self) -> Placement:
        for node in self.nodes:
            self._classify(node)
        for result in self.integer:
            self.sites[result] = Site({result: None}, [result])
        inputs: dict[fx.Node, Site] = {}
        for kernel in self.kernels:
            sites = [self._read(operand, kernel) for operand in self.operands(kernel)]
            if self.ops[kernel] == "cat":
                sites = [self._merge([self.sites[self.result_of[kernel]], *sites])]
            if sites:
                inputs[kernel] = sites[0]
        unique = {id(site): site for site in self.sites.values()}
        inputs = {kernel: self._current(site) for kernel, site in inputs.items()}
        return Placement(list(unique.values()), inputs, self.declined)

    # -- 1. which results are integer tensors ---------------------------------------------------

    def _classify(self, node: fx.Node) -> None:
        op = self.ops[node]
        if node in self.layers or node in self.products:
            self.kernels.append(node)
            if op in CONVOLUTIONS:
                self._result(node)
        elif op in COMBINES and self._combines(node):
            self.kernels.append(node)
            self._result(node)
        elif op in AVERAGES and node not in self.excluded and self._averages(node):
            self.kernels.append(node)
            self._result(node)

    def _result(self, node: fx.Node) -> None:
        """Note where the result of an integer kernel is quantised."""
        last = node
        if self.ops[node] not in ("cat", *AVERAGES):
            for fused in (self.norms.__contains__, self._is_clamp):
                users = list(last.users)
                if len(users) == 1 and fused(users[0]) and _only_operand(users[0], last):
                    last = users[0]
        self.result_of[node] = last
        self.integer[last] = node

    def _is_clamp(self, node: fx.Node) -> bool:
        return self.ops.get(node) in FUSED

    def _combines(self, node: fx.Node) -> bool:
        operands = self.operands(node)
        near = [each for each in operands if self._is_near_integer(each)]
        if not near or not _is_float(node):
            return False
        rest = [each for each in operands if each not in near]
        plain = [value for value in _values(node) if not isinstance(value, fx.Node)]
        if node in self.excluded:
            self._decline(node, "it is excluded")
        elif plain or any(not _is_float(each) for each in operands):
            self._decline(node, "one of its operands is a number, not an activation")
        elif any(each not in self.variable for each in rest):
            self._decline(node, "one of its operands is a parameter", rest)
        elif rest:
            self._decline(node, "not all of its operands are integer tensors", rest)
        else:
            return True
        return False

    def _averages(self, node: fx.Node) -> bool:
        operands = self.operands(node)
        if not operands or not self._is_near_integer(operands[0]):
            return False
        if self.ops[node] != "mean":
            return True
        # Runtimes have integer kernels for means over space, not over channels or the batch.
        value = operands[0].meta.get("val")
        dims = bind(node).get("dim")
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        rank = value.dim() if isinstance(value, torch.Tensor) else 0
        return rank >= 3 and {d % rank for d in dims} == set(range(2, rank))

    def _is_near_integer(self, node: fx.Node) -> bool:
        """Whether a tensor is an integer tensor, or moves or element-wise functions of one."""
        while True:
            op = self.ops[node]
            if node in self.integer or op == "fake_quant":
                return True
            if not (op in ACTIVATIONS or self._moves(node)) or not node.all_input_nodes:
                return False
            node = node.all_input_nodes[0]

    # -- 2. what the kernels read ---------------------------------------------------------------

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the activations that a kernel reads: not its weight, bias or sizes."""
        if self.ops[node] in LAYERS:
            found: list[Any] = [bind(node).get("input")]
        elif node in self.products:
            found = [each for each in node.all_input_nodes if _is_float(each)]
        else:
            found = _values(node)
        return [each for each in found if isinstance(each, fx.Node)]

    def _read(self, operand: fx.Node, kernel: fx.Node) -> Site:
        """Let a kernel's operand be the output of a quantizer; return that."""
        if self.ops[operand] == "fake_quant":
            return self._fixed(operand)
        source, path = self._source(operand)
        site = self.sites.get(source)
        if site is None and self.ops[source] == "fake_quant":
            site = self._fixed(source)
        if site is None and self._is_near_integer(source):
            # A float function of an integer tensor among integer kernels: all read it quantised.
            site = self.sites[source] = Site({source: None}, [source])
        if site is None:
            site = self.sites.setdefault(operand, Site({operand: set()}, [operand]))
            path = []
        for node in path:
            if self.ops[node] not in SPLITS:
                site.calls.setdefault(node, None)
                self.sites[node] = site
        users = site.calls.get(operand)
        if users is not None:
            users.add(kernel)
        return site

    def _source(self, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Follow moves back to the tensor they move; return it and the moves, in graph order."""
        path: list[fx.Node] = []
        node = operand
        while node not in self.integer and node not in self.sites and self._moves(node):
            path.append(node)
            node = node.all_input_nodes[0]
        return node, path[::-1]

    def _moves(self, node: fx.Node) -> bool:
        """Whether every value of the result is a value of the first operand, or 0."""
        op = self.ops[node]
        if op == "pad":
            bound = bind(node)
            return bound.get("mode", "constant") != "constant" or not bound.get("value")
        return op in MOVES or op in SPLITS

    def _fixed(self, node: fx.Node) -> Site:
        return self.sites.setdefault(node, Site(fixed=node))

    # -- 3. shared quantizers -------------------------------------------------------------------

    def _merge(self, sites: list[Site]) -> Site:
        distinct = list({id(site): site for site in sites}.values())
        fixed = [site for site in distinct if site.fixed is not None]
        free = [site for site in distinct if site.fixed is None]
        merged = free[0] if free else fixed[0]
        for other in free[1:]:
            for node, users in other.calls.items():
                merged.calls.setdefault(node, users)
            merged.owners += other.owners
        for key, site in self.sites.items():
            if any(site is other for other in free):
                self.sites[key] = merged
        return merged

    def _current(self, site: Site) -> Site:
        """Return the site that a merged one has become."""
        if site.fixed is not None or not site.owners:
            return site
        return self.sites[site.owners[0]]

    def _decline(self, node: fx.Node, reason: str, because: Iterable[fx.Node] = ()) -> None:
        self.declined.append((node, reason, tuple(because)))


def _values(node: fx.Node) -> list[Any]:
    """Return the tensors that an op combines (or should have been tensors)."""
    bound = bind(node)
    if "tensors" in bound and isinstance(bound["tensors"], (tuple, list)):
        return list(bound["tensors"])
    if "input" in bound and "other" in bound:
        return [bound["input"], bound["other"]]
    if op_name(node) == "cat" and isinstance(node.args[0], (tuple, list)):
        return list(node.args[0])
    return [node.args[0]] if node.args else list(node.kwargs.values())[:1]


def _only_operand(node: fx.Node, operand: fx.Node) -> bool:
    return list(node.all_input_nodes) == [operand]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _depend_on_inputs(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found
