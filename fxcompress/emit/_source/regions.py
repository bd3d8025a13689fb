"""Which modules of the original become methods: parts of the graph that one call could compute."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxcompress.ir.ops import is_scalar

__all__ = ["Region", "dimension", "find_regions", "localize_scalars"]

_TRIVIAL = 3


@dataclass(eq=False)
class Region:
    """A module whose nodes can be computed by one call, with its parts in an order that works.

    Attributes:
        path: The module's path; empty for the root.
        origin: The class it had in the original model.
        items: Nodes and inner regions, in order.
        inputs: Values from outside, in the order of first use.
        outputs: Values used outside.
        sizes: Dynamic sizes computed outside that a tensor among the inputs has too, so that they
            need not be given: tensor -> dimension -> the nodes outside.
    """

    path: str
    origin: str
    items: list[fx.Node | Region] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    sizes: dict[fx.Node, dict[int, list[fx.Node]]] = field(default_factory=dict)

    def nodes(self) -> Iterable[fx.Node]:
        """Return every node inside, inner regions included."""
        for item in self.items:
            if isinstance(item, Region):
                yield from item.nodes()
            else:
                yield item


def dimension(node: fx.Node, symbols: Mapping[str, str]) -> str | None:
    """Return the name of the dynamic size that a scalar node is, or None."""
    value = node.meta.get("val")
    return symbols.get(str(value.node.expr)) if isinstance(value, torch.SymInt) else None


def find_regions(graph: fx.Graph, symbols: Mapping[str, str]) -> Region:
    """Return the root region of a graph.

    A module that is called more than once, that uses modules of another, or that cannot be
    computed in one go because its parts wait for something outside, is not a region: its nodes
    belong to the module around it.

    Args:
        graph: A program's graph.
        symbols: Symbol of a dynamic size -> its name.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    chains = _chains(nodes)
    _lift_sizes(chains, symbols)
    origins = {path: cls for node in nodes for path, cls in node.meta.get("scope") or ()}
    order = {node: index for index, node in enumerate(graph.nodes)}
    while True:
        builder = _Builder(chains, origins, order)
        root = builder.build("", nodes, 0)
        if not builder.dissolved:
            break
        chains = {
            node: tuple(path for path in chain if path not in builder.dissolved)
            for node, chain in chains.items()
        }
    _find_inputs(root, symbols)
    (output,) = graph.find_nodes(op="output")
    _find_outputs(root, set(output.all_input_nodes))
    _unify_sizes(root, symbols)
    return root


def localize_scalars(graph: fx.Graph) -> None:
    """Copy arithmetic on sizes to each module that uses it, so that no call returns a number."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not is_scalar(node):
            continue
        by_scope: dict[tuple[tuple[str, str], ...], list[fx.Node]] = defaultdict(list)
        for user in node.users:
            by_scope[tuple(user.meta.get("scope") or ())].append(user)
        for scope, users in by_scope.items():
            if scope == tuple(node.meta.get("scope") or ()) or users[0].op == "output":
                continue
            with graph.inserting_before(users[0]):
                copied = graph.node_copy(node, lambda n: n)
            copied.meta = {**node.meta, "scope": scope}
            for user in users:
                user.replace_input_with(node, copied)
        if not node.users:
            graph.erase_node(node)


def _chains(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """Return for each node the modules around it that may become regions, outermost first."""
    chains: dict[fx.Node, tuple[str, ...]] = {}
    for node in nodes:
        chain: list[str] = []
        for path, _ in node.meta.get("scope") or ():
            if path and path not in chain and (not chain or path.startswith(f"{chain[-1]}.")):
                chain.append(path)
        chains[node] = tuple(chain)
    refused = _refused(chains)
    return {
        node: tuple(path for path in chain if path not in refused) for node, chain in chains.items()
    }


def _lift_sizes(chains: dict[fx.Node, tuple[str, ...]], symbols: Mapping[str, str]) -> None:
    """Move the asking for a size out to where all of its users are, so that no call returns it."""
    for node, chain in chains.items():
        if dimension(node, symbols) is None:
            continue
        sources = [chains.get(source, ()) for source in node.all_input_nodes]
        shared = chain
        for user in node.users:
            shared = _common(shared, chains.get(user, ()))
        if all(_common(source, shared) == source for source in sources):
            chains[node] = shared


def _common(one: tuple[str, ...], two: tuple[str, ...]) -> tuple[str, ...]:
    length = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return one[: min(len(one), len(two)) if length is None else length]


def _refused(chains: dict[fx.Node, tuple[str, ...]]) -> set[str]:
    around: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node, chain in chains.items():
        for depth, path in enumerate(chain):
            around[path].add(chain[:depth])
            members[path].append(node)
    refused = {path for path, chains_above in around.items() if len(chains_above) > 1}
    # A normalisation that holds its activation is a leaf, and the activation is called beside it.
    refused.update(str(node.target) for node in chains if node.op == "call_module")
    for path, inside in members.items():
        prefix = f"{path}."
        called = [str(n.target) for n in inside if n.op == "call_module"]
        read = [str(a.target) for n in inside for a in n.all_input_nodes if a.op == "get_attr"]
        foreign = any(not target.startswith(prefix) for target in called)
        owns = bool(called) or any(target.startswith(prefix) for target in read)
        # An activation written as a module of its own reads better as the call that it makes.
        if foreign or (not owns and len(inside) <= _TRIVIAL):
            refused.add(path)
    return refused


class _Builder:
    def __init__(
        self,
        chains: dict[fx.Node, tuple[str, ...]],
        origins: dict[str, str],
        order: dict[fx.Node, int],
    ) -> None:
        self.chains, self.origins, self.order = chains, origins, order
        self.dissolved: set[str] = set()

    def build(self, path: str, nodes: Sequence[fx.Node], depth: int) -> Region:
        groups: dict[str, list[fx.Node]] = {}
        items: list[tuple[int, str | fx.Node]] = []
        item_of: dict[fx.Node, int] = {}
        for node in nodes:
            chain = self.chains[node]
            if len(chain) <= depth:
                item_of[node] = len(items)
                items.append((self.order[node], node))
                continue
            inner = chain[depth]
            if inner not in groups:
                groups[inner] = []
                items.append((self.order[node], inner))
            groups[inner].append(node)
        index = {item: i for i, (_, item) in enumerate(items)}
        for inner, members in groups.items():
            item_of.update((node, index[inner]) for node in members)
        region = Region(path, self.origins.get(path, ""))
        for place in self._sorted(items, nodes, item_of):
            item = items[place][1]
            if isinstance(item, str):
                region.items.append(self.build(item, groups[item], depth + 1))
            else:
                region.items.append(item)
        return region

    def _sorted(
        self,
        items: Sequence[tuple[int, str | fx.Node]],
        nodes: Sequence[fx.Node],
        item_of: dict[fx.Node, int],
    ) -> list[int]:
        """Return the items in dependency order, close to the graph's own."""
        before: list[set[int]] = [set() for _ in items]
        after: list[set[int]] = [set() for _ in items]
        for node in nodes:
            here = item_of[node]
            for source in node.all_input_nodes:
                there = item_of.get(source)
                if there is not None and there != here:
                    before[here].add(there)
                    after[there].add(here)
        waiting = [len(sources) for sources in before]
        ready = [(items[i][0], i) for i, count in enumerate(waiting) if count == 0]
        heapq.heapify(ready)
        done: list[int] = []
        while ready:
            _, here = heapq.heappop(ready)
            done.append(here)
            for there in after[here]:
                waiting[there] -= 1
                if waiting[there] == 0:
                    heapq.heappush(ready, (items[there][0], there))
        if len(done) < len(items):
            # Regions that wait for each other; nodes alone cannot, so one of them is a region.
            stuck = [items[i] for i, count in enumerate(waiting) if count > 0]
            self.dissolved.add(min((o, p) for o, p in stuck if isinstance(p, str))[1])
            return []
        return done


def _find_inputs(region: Region, symbols: Mapping[str, str]) -> None:
    inside = set(region.nodes())
    found: dict[fx.Node, None] = {}
    for item in region.items:
        if isinstance(item, Region):
            _find_inputs(item, symbols)
            operands: Iterable[fx.Node] = item.inputs
        else:
            operands = item.all_input_nodes
        found.update((node, None) for node in operands if node not in inside)
    prefix = f"{region.path}." if region.path else ""
    region.inputs = [
        n for n in found if not (n.op == "get_attr" and str(n.target).startswith(prefix))
    ]
    if region.path:
        _derive_sizes(region, symbols)


def _find_outputs(region: Region, wanted: set[fx.Node]) -> None:
    """Keep what others read; a size that they find out by themselves is not given to them.

    Args:
        region: Where to look.
        wanted: What the surroundings of the region read of it.
    """
    read = set(wanted)
    for item in region.items:
        read.update(item.inputs if isinstance(item, Region) else item.all_input_nodes)
    region.outputs = [node for node in region.nodes() if node in wanted]
    for item in region.items:
        if isinstance(item, Region):
            _find_outputs(item, read)


def _unify_sizes(region: Region, symbols: Mapping[str, str]) -> None:
    """Read sizes off the inputs wherever they show them, so that equal modules read equal."""
    for item in list(region.items):
        if isinstance(item, Region):
            _unify_sizes(item, symbols)
        elif region.path and item not in region.outputs:
            if _read_off(region, item, symbols):
                region.items.remove(item)


def _read_off(region: Region, node: fx.Node, symbols: Mapping[str, str]) -> bool:
    """Find a dynamic size in the shape of an input of the region, and note where."""
    name = dimension(node, symbols)
    if name is None:
        return False
    for tensor in region.inputs:
        value = tensor.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        names = [symbols.get(str(size)) for size in value.shape]
        if name in names:
            places = region.sizes.setdefault(tensor, {})
            places.setdefault(names.index(name), []).append(node)
            return True
    return False


def _derive_sizes(region: Region, symbols: Mapping[str, str]) -> None:
    for node in list(region.inputs):
        if _read_off(region, node, symbols):
            region.inputs.remove(node)
