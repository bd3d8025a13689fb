"""Quantizers of weights: which ops are one, and how one goes into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from torch import fx, nn

from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import take_weight_as_operand
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["QUANTIZERS", "insert_quantizer", "weight_node"]

QUANTIZERS: Final = frozenset({"binarize", "codebook", "fake_quant", "float_quant", "stack_quant"})


def weight_node(reader: fx.Node) -> fx.Node | None:
    """Return the node that a reader takes its weight from; None where it has its own."""
    name = "mat2" if op_name(reader) == "addmm" else "weight"
    found = bind(reader).get(name)
    return found if isinstance(found, fx.Node) else None


def insert_quantizer(
    rewriter: GraphRewriter,
    module: nn.Module,
    path: str,
    tensor: str,
    readers: Sequence[fx.Node],
) -> None:
    """Let every reader of a parameter read it through a quantizer; layers take it as an operand.

    Args:
        rewriter: Changes the graph.
        module: The quantizer.
        path: Where it goes.
        tensor: The parameter.
        readers: All nodes that compute with it.
    """
    scope = scope_beside(readers[0])
    operands = {reader: weight_node(reader) for reader in readers}
    made: dict[fx.Node | None, fx.Node] = {}
    changed: set[str] = set()
    for reader in readers:
        source = operands[reader]
        if source not in made:
            # A second parameter node, or a mask, calls the same quantizer again.
            new = None if made else module
            read = source or rewriter.get_attr(tensor, before=readers[0], scope=scope)
            made[source] = rewriter.call_module(path, new, (read,), after=read, scope=scope)
        if source is None:
            layer = str(reader.target)
            if layer not in changed:
                rewriter.set_module(layer, take_weight_as_operand(rewriter.get_module(layer)))
                changed.add(layer)
            rewriter.set_args(reader, (reader.args[0], made[source]), {})
        else:
            rewriter.replace_uses(source, made[source], only=lambda user: user in readers)
