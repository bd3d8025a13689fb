"""The `forward` of the model itself: the program's parameters in, its output's structure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.emit._source.body import Body, Writer
from fxcompress.emit._source.literals import Literals, literal_text
from fxcompress.emit._source.naming import fresh, identifier
from fxcompress.emit._source.regions import Region
from fxcompress.emit._source.tree import Unit
from fxcompress.ir.signature import Signature

__all__ = ["write_root_body"]


def write_root_body(
    unit: Unit,
    region: Region,
    symbols: Mapping[str, str],
    literals: Literals,
    signature: Signature,
    outputs: Sequence[Any],
) -> Body:
    """Return the `forward` of the model: its parameters and output are the program's."""
    writer = Writer(unit, region, symbols, literals)
    placeholders = {
        str(n.target): n for n in unit_graph(outputs, region).find_nodes(op="placeholder")
    }
    for parameter in signature.parameters:
        if parameter.kind == "KEYWORD_ONLY" and all(k != "*" for k, _ in writer.parameters):
            writer.parameters.append(("*", ""))
        name = identifier(parameter.name)
        star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind, "")
        whole = parameter.tree.is_leaf()
        writer.parameters.append((star + name, "Tensor" if whole or star else "Any"))
        writer.taken[name] = None
        for path, leaf in zip(_paths(parameter.tree), parameter.leaves, strict=True):
            node = placeholders[str(leaf)]
            if whole:
                writer.bind(node, name)
            elif node.users:
                inner = fresh(identifier(str(leaf)), writer.taken)
                writer.bind(node, inner)
                writer.lines.append(f"{inner} = {name}{path}")
    nodes = [leaf for leaf in outputs if isinstance(leaf, fx.Node)]
    writer.run(nodes)
    texts = [
        writer.value(leaf).text if isinstance(leaf, fx.Node) else literal_text(leaf)
        for leaf in outputs
    ]
    value = pytree.tree_unflatten(texts, signature.output)
    text = _tree_text(value)
    bare = isinstance(value, tuple) and len(value) > 1
    return writer.body(text[1:-1] if bare else text)


def unit_graph(outputs: Sequence[Any], region: Region) -> fx.Graph:
    """Return the graph that the outputs or the region are of."""
    nodes = [leaf for leaf in outputs if isinstance(leaf, fx.Node)] or list(region.nodes())
    return nodes[0].graph


def _paths(tree: pytree.TreeSpec) -> list[str]:
    value = pytree.tree_unflatten(list(range(tree.num_leaves)), tree)
    return [
        pytree.keystr(path).replace("'", '"') for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]


def _tree_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        inner = ", ".join(f"{literal_text(key)}: {_tree_text(v)}" for key, v in value.items())
        return f"{{{inner}}}"
    parts = [_tree_text(item) for item in value]
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
