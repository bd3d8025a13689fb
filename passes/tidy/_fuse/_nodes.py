"""What the rules share: silence, operands, removal of what nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxcompress.ir.ops import is_inplace, is_tap, module_of, op_name
from fxcompress.rewrite import Match, MatchResult

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["SILENT", "drop", "found", "layer_refusal", "own_name", "replace", "tensor_of", "value"]

SILENT: Final = MatchResult.fail("")
"""No match, and no near miss either."""


def found(root: fx.Node, **nodes: Any) -> MatchResult:
    """Return a match with these nodes by name."""
    return MatchResult.ok(Match(root, nodes))


def value(node: Any) -> Any:
    """Return what a node was traced as; None for what is no node."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def replace(rewriter: GraphRewriter, node: fx.Node, by: fx.Node) -> None:
    """Let all that read a node read another one, and drop it."""
    rewriter.replace_uses(node, by)
    drop(rewriter, node)


def drop(rewriter: GraphRewriter, node: fx.Node) -> None:
    """Remove a node that nothing reads, and what only it read."""
    if node._erased or node.users or node.op in ("placeholder", "output"):
        return
    if is_tap(node) or is_inplace(node):
        return
    sources = node.all_input_nodes
    rewriter.remove(node)
    for source in sources:
        drop(rewriter, source)


def tensor_of(node: Any) -> torch.Tensor | None:
    """Return the parameter or buffer that a node reads, or None."""
    if not isinstance(node, fx.Node) or op_name(node) not in ("param", "buffer"):
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def own_name(layer: fx.Node) -> str:
    """Return the path of a layer's module."""
    return str(layer.target)


def layer_refusal(program: Program, layer: fx.Node) -> MatchResult | None:
    """Return why a layer's weight may not change for this call alone, or None.

    A weight may not where it is an operand, where its module is called twice, or where it is tied.
    """
    name = own_name(layer)
    if layer.op != "call_module":
        return MatchResult.fail("it is a function call, whose weight is an operand", [layer])
    if len(layer.args) > 1 or not type(module_of(layer)).__module__.startswith(nn.__name__):
        why = "its weight is masked or quantised already"
        return MatchResult.fail(f"{name} takes its weight as an operand: {why}", [layer])
    calls = list(layer.graph.find_nodes(op="call_module", target=name))
    if len(calls) > 1:
        return MatchResult.fail(f"{name} is a reused module, called {len(calls)} times", calls)
    for tensor in ("weight", "bias"):
        own = f"{name}.{tensor}"
        canonical = program.ties.get(own, own)
        names = (canonical, *program.ties)
        others = [n for n in names if program.ties.get(n, n) == canonical and n != own]
        readers = list(layer.graph.find_nodes(op="get_attr", target=own))
        if others or readers:
            shared = others[0] if others else "the graph"
            return MatchResult.fail(f"{own} is shared with {shared}", [layer, *readers])
    return None
