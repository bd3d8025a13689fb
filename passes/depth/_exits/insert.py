"""Insert the heads of early exits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxcompress.nn import Tap
from fxcompress.rewrite import insert_tap
from fxcompress.rewrite.exits import EXITS
from passes.depth._exits.head import Head, head_of

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.depth.early_exit import EarlyExitDecision

__all__ = ["insert_exits"]


def insert_exits(rewriter: GraphRewriter, decision: EarlyExitDecision) -> None:
    """Add a head after each state, and tap what it makes."""
    answer = rewriter.node(decision.output)
    head = None
    if decision.head != "linear":
        head = head_of(rewriter.program, rewriter.node(decision.last))
    for place in decision.exits:
        state = rewriter.node(place.state)
        at = _Exit(rewriter, place.name)
        if head is None:
            logits = at.linear(state, answer)
        else:
            logits = at.copied(head, state, own=decision.head == "copy")
        insert_tap(rewriter, logits, Tap(place.name, at=place.path))


class _Exit:
    """Adds the nodes of one exit, before the output."""

    def __init__(self, rewriter: GraphRewriter, name: str) -> None:
        self.rewriter, self.folder = rewriter, f"{EXITS}.{name}"
        (self.output,) = rewriter.graph.find_nodes(op="output")
        self.scope = ((self.folder, "EarlyExit"),)

    def linear(self, state: fx.Node, answer: fx.Node) -> fx.Node:
        """Return the logits of a new linear layer on the mean over places."""
        given, wanted = state.meta["val"], answer.meta["val"]
        node, width = state, int(given.shape[1] if given.dim() == 4 else given.shape[-1])
        if given.dim() == 4:
            node = self._call("mean", (node, (2, 3)))
        elif given.dim() == 3 and wanted.dim() == 2:
            node = self._call("mean", (node, 1))
        norm = nn.LayerNorm(width).to(dtype=given.dtype)
        linear = nn.Linear(width, int(wanted.shape[-1])).to(dtype=given.dtype)
        with torch.no_grad():
            # A head of zeros says nothing yet: all classes alike, and no exit taken.
            linear.weight.zero_()
            linear.bias.zero_()
        node = self._module("norm", norm, (node,))
        return self._module("fc", linear, (node,))

    def copied(self, head: Head, state: fx.Node, *, own: bool) -> fx.Node:
        """Return the logits of the model's head on a state; with layers of its own, or the same."""
        made: dict[fx.Node, fx.Node] = {head.state: state}
        paths: dict[str, str] = {}
        for node in head.nodes:
            args: Any = fx.map_arg(node.args, lambda each: self._operand(each, made, own))
            kwargs: Any = fx.map_arg(node.kwargs, lambda each: self._operand(each, made, own))
            told = {"before": self.output, "scope": self.scope}
            target: Any = node.target
            if node.op == "call_module" and own and target not in paths:
                module = copy.deepcopy(self.rewriter.get_module(target))
                paths[target] = f"{self.folder}.{target}"
                new = self.rewriter.call_module(paths[target], module, args, kwargs, **told)
            elif node.op == "call_module":
                path = paths.get(target, target)
                new = self.rewriter.call_module(path, None, args, kwargs, **told)
            elif node.op == "call_method":
                new = self.rewriter.call_method(target, args, kwargs, **told)
            else:
                new = self.rewriter.call_function(target, args, kwargs, **told)
            made[node] = new
        return made[head.answer]

    def _operand(self, node: fx.Node, made: dict[fx.Node, fx.Node], own: bool) -> fx.Node:
        """Return what stands for an operand: a copy, a parameter of the exit's own, or itself."""
        if node in made:
            return made[node]
        if own and node.op == "get_attr":
            tensor = self.rewriter.get_tensor(str(node.target))
            if isinstance(tensor, nn.Parameter):
                name = f"{self.folder}.{node.target}"
                self.rewriter.add_tensor(name, tensor.clone(), trainable=tensor.requires_grad)
                made[node] = self.rewriter.get_attr(name, before=self.output, scope=self.scope)
                return made[node]
        return node

    def _call(self, method: str, args: tuple[Any, ...]) -> fx.Node:
        return self.rewriter.call_method(method, args, before=self.output, scope=self.scope)

    def _module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        path = f"{self.folder}.{name}"
        return self.rewriter.call_module(path, module, args, before=self.output, scope=self.scope)
