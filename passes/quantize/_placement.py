"""Where quantize nodes go: a pure function of the graph, the layers to quantise and the target.

1. The result of an integer kernel is an integer tensor, after its fused activation, where the
   target's rules say so: everybody reads the quantised value. (For most targets those are
   convolutions, and adds, products and concatenations all of whose operands are integer tensors or
   element-wise functions of one, and the average of an integer tensor.)
2. What a kernel reads must be the output of a quantize node. If it comes, through ops that only
   move values, from an integer tensor, that tensor's quantizer is called again; else the operand
   gets its own, which only integer kernels read.
3. Operands and result of a concatenation share one quantizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import fx

from passes.quantize._kernels import Kernels, Refusal
from passes.quantize._rules import SPLITS
from passes.quantize._targets import TARGETS, PlacementRules

__all__ = ["Placement", "Site", "place"]


@dataclass
class Site:
    """A quantizer: the tensors it is called on.

    Attributes:
        calls: Node -> the users that read the quantised value; None for all of them.
        owners: The calls whose values are new; only these are observed.
        kernels: The kernels that read it.
        fixed: A quantizer that is in the graph already.
    """

    calls: dict[fx.Node, set[fx.Node] | None] = field(default_factory=dict)
    owners: list[fx.Node] = field(default_factory=list)
    kernels: list[fx.Node] = field(default_factory=list)
    fixed: fx.Node | None = None


@dataclass
class Placement:
    """Quantizers of activations, the integer kernels, and refusals.

    Attributes:
        sites: One per quantizer.
        input_site: Kernel -> the quantizer of its first operand.
        kernels: What is computed in integers, norms and activations that are a part of it included.
        maker: Where a result is quantised -> the kernel that made it.
        declined: What was left in float, with the reason.
    """

    sites: list[Site]
    input_site: dict[fx.Node, Site]
    kernels: frozenset[fx.Node]
    maker: dict[fx.Node, fx.Node]
    declined: list[Refusal]


def place(
    nodes: Iterable[fx.Node],
    layers: Collection[fx.Node],
    products: Collection[fx.Node] = (),
    excluded: Collection[fx.Node] = (),
    norms: Collection[fx.Node] = (),
    rules: PlacementRules = TARGETS["generic"],
) -> Placement:
    """Return the quantizers that the layers, and what lies between them, need.

    Args:
        nodes: The graph's nodes, in order.
        layers: Convolutions and linear layers to quantise.
        products: Products of two activations to quantise.
        excluded: Nodes to leave in float whatever their operands are.
        norms: Batch norms that are, or will be, part of the layer before them.
        rules: What the target's kernels take.
    """
    return _Placer(Kernels(list(nodes), rules, layers, products, excluded, norms)).run()


class _Placer:
    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.sites: dict[fx.Node, Site] = {}

    def run(self) -> Placement:
        found = self.kernels
        for result in found.integer:
            self.sites[result] = Site({result: None}, [result])
        inputs: dict[fx.Node, Site] = {}
        for kernel in found.nodes:
            sites = [self._read(operand, kernel) for operand in found.operands(kernel)]
            if found.ops[kernel] == "cat":
                sites = [self._merge([self.sites[found.result_of[kernel]], *sites])]
            if sites:
                inputs[kernel] = sites[0]
        unique = {id(site): site for site in self.sites.values() if self._is_needed(site)}
        inputs = {kernel: self._current(site) for kernel, site in inputs.items()}
        every = frozenset(found.nodes) | found.parts
        return Placement(list(unique.values()), inputs, every, found.integer, found.declined)

    def _is_needed(self, site: Site) -> bool:
        """Whether a kernel reads a site's tensor, or everybody is to have it quantised."""
        return bool(site.kernels) or site.fixed is not None or self.kernels.rules.unread_results

    # -- 2. what the kernels read ---------------------------------------------------------------

    def _read(self, operand: fx.Node, kernel: fx.Node) -> Site:
        """Let a kernel's operand be the output of a quantizer; return that."""
        site = self._site(operand, kernel)
        site.kernels.append(kernel)
        return site

    def _site(self, operand: fx.Node, kernel: fx.Node) -> Site:
        ops = self.kernels.ops
        if ops[operand] == self.kernels.rules.quantizer:
            return self._fixed(operand)
        source, path = self._source(operand)
        site = self.sites.get(source)
        if site is None and ops[source] == self.kernels.rules.quantizer:
            site = self._fixed(source)
        if site is None and self.kernels.is_near_integer(source):
            # A float function of an integer tensor among integer kernels: all read it quantised.
            site = self.sites[source] = Site({source: None}, [source])
        if site is None:
            site = self.sites.setdefault(operand, Site({operand: set()}, [operand]))
            path = []
        for node in path:
            if ops[node] not in SPLITS:
                site.calls.setdefault(node, None)
                self.sites[node] = site
        users = site.calls.get(operand)
        if users is not None:
            users.add(kernel)
        return site

    def _source(self, operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Follow moves back to the tensor they move; return it and the moves, in graph order."""
        path: list[fx.Node] = []
        node, integer = operand, self.kernels.integer
        while node not in integer and node not in self.sites and self.kernels.moves(node):
            path.append(node)
            node = node.all_input_nodes[0]
        return node, path[::-1]

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
            merged.kernels += other.kernels
        for key, site in self.sites.items():
            if any(site is other for other in free):
                self.sites[key] = merged
        return merged

    def _current(self, site: Site) -> Site:
        """Return the site that a merged one has become."""
        if site.fixed is not None or not site.owners:
            return site
        return self.sites[site.owners[0]]
