"""Put another Program's whole graph in the place of a rewriter's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from fxcompress.errors import PassError
from fxcompress.rewrite._modules import place
from fxcompress.rewrite._reader import tie_groups

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["graft"]


def graft(rewriter: GraphRewriter, other: Program) -> None:
    """Replace every node, module and tensor by those of another Program.

    Inputs, their sizes and the structure of the output stay those of the rewriter's Program.

    Args:
        rewriter: Nothing may have been changed through it before.
        other: A Program with the same inputs and the same structure of outputs. It is not changed;
            its tensors are shared.

    Raises:
        PassError: The inputs or the outputs differ.
    """
    names = [tensor.name for tensor in rewriter.before.signature.inputs]
    theirs = [tensor.name for tensor in other.signature.inputs]
    if names != theirs or rewriter.before.signature.output != other.signature.output:
        raise PassError(
            "a graph of another signature cannot be put in place",
            reason=f"it takes {', '.join(theirs)}, and not {', '.join(names)}"
            if names != theirs
            else "its outputs have another structure",
        )
    (output,) = rewriter.graph.find_nodes(op="output")
    rewriter.set_args(output, ((),))
    for node in reversed(list(rewriter.graph.nodes)):
        if node.op not in ("placeholder", "output"):
            rewriter.remove(node)
    source = other.copy()
    _adopt(rewriter, source)
    made: dict[fx.Node, fx.Node] = {}
    holders = {str(n.target): n for n in rewriter.graph.find_nodes(op="placeholder")}
    for node in source.nodes:
        if node.op == "placeholder":
            made[node] = holders[str(node.target)]
        elif node.op == "output":
            rewriter.set_args(output, fx.map_arg(node.args, made.__getitem__))
        else:
            made[node] = _copied(rewriter, node, made, output)


def _adopt(rewriter: GraphRewriter, source: Program) -> None:
    """Let the rewriter have another tree of modules and tensors, with its ties and notes."""
    _touch_all(rewriter)
    rewriter.tree.replace(place(source.module, rewriter.device))
    _touch_all(rewriter)
    rewriter._groups = tie_groups(source.ties)
    rewriter._program = replace(rewriter._program, notes=source.notes)


def _touch_all(rewriter: GraphRewriter) -> None:
    """Record every module and tensor that is there as changed."""
    rewriter.touched_modules.update(path for path, _ in rewriter.module.named_modules() if path)
    rewriter.touched_tensors.update(rewriter.tree.state())


def _copied(
    rewriter: GraphRewriter, node: fx.Node, made: dict[fx.Node, fx.Node], output: fx.Node
) -> fx.Node:
    args: Any = fx.map_arg(node.args, made.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, made.__getitem__)
    scope = tuple(node.meta.get("scope", ()))
    target: Any = node.target
    if node.op == "call_module":
        new = rewriter.call_module(target, None, args, kwargs, before=output, scope=scope)
    elif node.op == "call_method":
        new = rewriter.call_method(target, args, kwargs, before=output, scope=scope)
    elif node.op == "get_attr":
        new = rewriter.get_attr(target, before=output, scope=scope)
    else:
        new = rewriter.call_function(target, args, kwargs, before=output, scope=scope)
    new.meta["source"] = node.meta.get("source")
    return new
