"""The union of two graphs: every node of either, with what happened to it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxcompress.ir import Program, node_ids, node_lines, op_name, op_spec, type_text
from fxcompress.report.model import Edge, ModuleNode, Status, UnionGraph, UnionNode

__all__ = ["union_graph"]

# op kinds of the table -> colour classes of the page
_COLOURS: Mapping[str, str] = {
    "linear": "weight",
    "matmul": "weight",
    "embedding": "weight",
    "recurrent": "weight",
    "attention": "attn",
    "norm": "norm",
    "activation": "act",
    "pool": "pool",
    "resample": "pool",
    "reduce": "pool",
    "quantize": "quant",
    "elementwise": "math",
    "shape": "shape",
    "index": "shape",
    "identity": "shape",
    "create": "shape",
}
_IO = {"placeholder": "io", "output": "io", "get_attr": "shape"}


@dataclass(frozen=True)
class _Side:
    """One of the two graphs, by id."""

    program: Program
    ids: Mapping[fx.Node, str]
    nodes: Mapping[str, fx.Node]
    lines: Mapping[str, str]

    @staticmethod
    def of(program: Program) -> "_Side":
        ids = node_ids(program)
        return _Side(program, ids, {name: node for node, name in ids.items()}, node_lines(program))

    def edges(self) -> Iterable[tuple[str, str]]:
        for node, name in self.ids.items():
            for source in node.all_input_nodes:
                yield self.ids[source], name


def union_graph(before: Program, after: Program) -> UnionGraph:
    """Return the graphs of two Programs as one.

    A node is the same when its golden line is; ids, not FX names, say which node is which.
    """
    old, new = _Side.of(before), _Side.of(after)
    order = _merged(list(old.nodes), list(new.nodes))
    nodes = tuple(_node(name, old, new) for name in order)
    index = {name: i for i, name in enumerate(order)}
    old_edges, new_edges = dict.fromkeys(old.edges()), dict.fromkeys(new.edges())
    edges = []
    for source, target in {**new_edges, **old_edges}:
        status: Status = "same"
        if (source, target) not in old_edges:
            status = "added"
        elif (source, target) not in new_edges:
            status = "removed"
        edges.append(Edge(source=index[source], target=index[target], status=status))
    edges.sort(key=lambda edge: (edge.source, edge.target))
    return UnionGraph(
        nodes=nodes,
        edges=tuple(edges),
        modules=_modules(nodes, (old, new)),
        added=sum(node.status == "added" for node in nodes),
        changed=sum(node.status == "changed" for node in nodes),
        removed=sum(node.status == "removed" for node in nodes),
    )


def _merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return all names in the new order, each removed one behind the name it used to follow."""
    kept = set(new)
    following: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for name in old:
        if name in kept:
            anchor = name
        else:
            following.setdefault(anchor, []).append(name)
    merged = list(following.get(None, ()))
    for name in new:
        merged.append(name)
        merged.extend(following.get(name, ()))
    return merged


def _node(name: str, old: _Side, new: _Side) -> UnionNode:
    was, now = old.lines.get(name, ""), new.lines.get(name, "")
    side = new if name in new.nodes else old
    node = side.nodes[name]
    status: Status = "same" if was == now else "changed"
    if name not in old.nodes:
        status = "added"
    elif name not in new.nodes:
        status = "removed"
    op = op_name(node)
    spec = op_spec(op)
    return UnionNode(
        id=name,
        op=op,
        kind=_IO.get(node.op) or _COLOURS.get(spec.kind if spec else "", "other"),
        type=type_text(node.meta.get("val"), side.program),
        status=status,
        scope=_scope(node),
        text=now,
        before="" if was == now else was,
    )


def _scope(node: fx.Node) -> str:
    """Return the module path in whose box a node is drawn: the one that holds its layer."""
    if node.op in ("call_module", "get_attr"):
        path = str(node.target).rpartition(".")[0]
        return path.rpartition(".")[0] if node.op == "get_attr" else path
    scope = node.meta.get("scope") or ()
    return scope[-1][0] if scope else ""


def _modules(nodes: Iterable[UnionNode], sides: Iterable[_Side]) -> tuple[ModuleNode, ...]:
    classes = {
        path: cls
        for side in sides
        for node in side.nodes.values()
        for path, cls in node.meta.get("scope") or ()
    }
    counts: dict[str, dict[str, int]] = {}
    for node in nodes:
        parts = node.scope.split(".") if node.scope else []
        for end in range(1, len(parts) + 1):
            count = counts.setdefault(".".join(parts[:end]), {})
            count[node.status] = count.get(node.status, 0) + 1
    return tuple(
        ModuleNode(
            path=path,
            cls=classes.get(path, "").rpartition(".")[2],
            nodes=sum(count.values()),
            added=count.get("added", 0),
            changed=count.get("changed", 0),
            removed=count.get("removed", 0),
        )
        for path, count in counts.items()
    )
