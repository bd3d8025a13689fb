"""Attention in a graph: find it, fused or written out, and write a fused one out.

    sdpa(q, k, v)   →   softmax(q · kᵀ · scale + mask) · v

Written out, the probabilities are a node that can be tapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.axes._attention import products_around
from fxcompress.errors import PassError
from fxcompress.ir.naming import scope_of
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import TrainingSwitch
from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["Attention", "attentions", "open_attention"]


@dataclass(frozen=True)
class Attention:
    """One attention of a graph.

    Attributes:
        node: The fused op, or the softmax.
        query: `[..., heads, target, width]`.
        key: `[..., heads, source, width]`.
        value: The same shape as the key but for its width.
        probabilities: `[..., heads, target, source]` before dropout; None where it is fused.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    probabilities: fx.Node | None


def attentions(nodes: Iterable[fx.Node]) -> list[Attention]:
    """Return every attention whose fused op or softmax is among these nodes, in their order."""
    found = []
    for node in nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = op_name(node)
        if name == "sdpa":
            given = bind(node)
            query, key, value = (cast(fx.Node, given[k]) for k in ("query", "key", "value"))
            found.append(Attention(node, query, key, value, None))
        elif name == "softmax":
            site = _written_out(node)
            if site is not None:
                found.append(site)
    return found


def _written_out(softmax: fx.Node) -> Attention | None:
    products = products_around(softmax)
    if products is None:
        return None
    scores, mixed = products
    sources = [node for node in scores.all_input_nodes if _is_tensor(node)][-2:]
    values = [node for node in mixed.all_input_nodes if _is_tensor(node)][-2:]
    if len(sources) != 2 or len(values) != 2:
        return None
    return Attention(
        softmax, _unscaled(sources[0]), _untransposed(sources[1]), values[1], _shares(softmax)
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shares(softmax: fx.Node) -> fx.Node:
    """Return the probabilities: the softmax, or what zeroes its rows where nothing is seen."""
    fills = [user for user in softmax.users if op_name(user) == "masked_fill"]
    return fills[0] if len(fills) == 1 else softmax


def _unscaled(node: fx.Node) -> fx.Node:
    """Return what a query was before it was multiplied by a number."""
    number = op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1
    return node.all_input_nodes[0] if number else node


def _untransposed(node: fx.Node) -> fx.Node:
    """Return what a key was before its last two dims changed places, and before its scale."""
    node = _unscaled(node)
    if op_name(node) == "transpose":
        given, rank = bind(node), cast(torch.Tensor, node.meta["val"]).dim()
        if {given["dim0"] % rank, given["dim1"] % rank} == {rank - 1, rank - 2}:
            return cast(fx.Node, given["input"])
    return node


def open_attention(rewriter: GraphRewriter, node: fx.Node) -> fx.Node:
    """Write a fused attention out in place, and return the node of its probabilities.

    A row that may see nothing gives zeros, as the fused op does. Dropout acts on what the
    probabilities are mixed by, after the node that is returned.

    Raises:
        PassError: The op's flags are computed by the graph, or its heads do not divide.
    """
    given = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, **bind(node)}
    writer = _Writer(rewriter, node)
    query, key, value = given["query"], given["key"], given["value"]
    for flag in ("is_causal", "scale", "enable_gqa"):
        if isinstance(given[flag], fx.Node):
            writer.fail(f"its argument {flag} is computed by the graph")
    if given["enable_gqa"]:
        key, value = writer.repeated(key, query), writer.repeated(value, query)
    scale = given["scale"]
    if scale is None:
        scale = writer.size(query, -1) ** -0.5
    turned = writer.method("transpose", key, -2, -1)
    scores = writer.call(torch.matmul, writer.call(torch.mul, query, scale), turned)
    probabilities = writer.softmax(scores, given.get("attn_mask"), causal=given["is_causal"])
    dropped = writer.dropout(probabilities, given["dropout_p"])
    mixed = writer.call(torch.matmul, dropped, value)
    rewriter.replace_uses(node, mixed)
    rewriter.remove(node)
    return probabilities


class _Writer:
    """Adds nodes before a fused attention, in its scope."""

    def __init__(self, rewriter: GraphRewriter, node: fx.Node) -> None:
        self.rewriter, self.node = rewriter, node

    def fail(self, reason: str) -> None:
        where = self.rewriter.id(self.node)
        raise PassError(f"the attention {where} cannot be written out", reason=reason, where=where)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.call_function(function, args, kwargs, before=self.node)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.call_method(name, args, kwargs, before=self.node)

    def size(self, node: fx.Node, dim: int) -> int:
        size = node.meta["val"].shape[dim]
        if not isinstance(size, int):
            self.fail(f"dim {dim} of {self.rewriter.id(node)} is dynamic")
        return int(size)

    def repeated(self, shared: fx.Node, query: fx.Node) -> fx.Node:
        """Return keys or values once per query head."""
        heads, groups = self.size(query, -3), self.size(shared, -3)
        if heads % groups:
            self.fail(f"{heads} query heads do not share {groups} evenly")
        if heads == groups:
            return shared
        return self.call(torch.repeat_interleave, shared, heads // groups, dim=-3)

    def softmax(self, scores: fx.Node, mask: fx.Node | None, *, causal: bool) -> fx.Node:
        if causal:
            mask = self.triangle(scores)
        if mask is None:
            return self.call(F.softmax, scores, dim=-1)
        blind: fx.Node | None = None
        if mask.meta.get("val") is None or mask.meta["val"].dtype == torch.bool:
            unseen = self.call(torch.logical_not, mask)
            if not causal:  # a triangle leaves every row its diagonal
                blind = self.method("all", unseen, dim=-1, keepdim=True)
                unseen = self.call(torch.logical_and, unseen, self.call(torch.logical_not, blind))
            scores = self.method("masked_fill", scores, unseen, float("-inf"))
        else:
            blind = self.method(
                "all", self.call(torch.eq, mask, float("-inf")), dim=-1, keepdim=True
            )
            scores = self.call(torch.add, scores, self.method("masked_fill", mask, blind, 0.0))
        shares = self.call(F.softmax, scores, dim=-1)
        return shares if blind is None else self.method("masked_fill", shares, blind, 0.0)

    def triangle(self, scores: fx.Node) -> fx.Node:
        sizes = tuple(self.method("size", scores, dim) for dim in (-2, -1))
        return self.method("tril", self.method("new_ones", scores, sizes, dtype=torch.bool))

    def dropout(self, shares: fx.Node, p: Any) -> fx.Node:
        if isinstance(p, fx.Node):
            switch = module_of(p) if p.op == "call_module" else None
            if not isinstance(switch, TrainingSwitch) or switch.eval_value:
                return self.call(F.dropout, shares, p, True)
            scope = scope_of(self.node)
            path = self.rewriter.fresh_path(".".join(filter(None, (scope, "attention_dropout"))))
            module = nn.Dropout(float(switch.training_value))
            return self.rewriter.call_module(path, module, (shares,), before=self.node)
        return self.call(F.dropout, shares, p, True) if p else shares
