"""What the leaf is called with: tokens, weights and indices, in its own shapes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.moe._lift.found import Found

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Arguments", "arguments_of"]


@dataclass(frozen=True)
class Arguments:
    """What the leaf is called with.

    Attributes:
        x: Tokens `[…, width]`.
        weights: `[…, k]`.
        indices: `[…, k]`.
        summed: Tokens are `[…, k, width]`, with a choice of one each: what the leaf makes of them
            is to be summed over k.
    """

    x: fx.Node
    weights: fx.Node
    indices: fx.Node
    summed: bool = False


def arguments_of(rewriter: GraphRewriter, found: Found) -> Arguments:
    """Add the nodes that make the arguments of what a mixture has."""
    weighing = found.weighing
    x, weights, indices = found.x, weighing.weights, weighing.indices

    def call(target: Any, *args: Any) -> fx.Node:
        return rewriter.call_function(target, args, before=found.output)

    one = indices.meta["val"].dim() < x.meta["val"].dim()
    k = 1 if one else indices.meta["val"].shape[-1]
    indices = call(torch.unsqueeze, indices, -1) if one else indices
    if weighing.spread:
        weights = call(torch.gather, weights, -1, indices)
    elif one:
        weights = call(torch.unsqueeze, weights, -1)
    if weighing.kept is not None:
        weights = call(operator.mul, weights, _taken(call, found, indices, k))
    if not weighing.before:
        return Arguments(x, weights, indices)
    each = call(torch.unsqueeze, weights, -1)
    x = call(operator.mul, call(torch.unsqueeze, x, -2), each)
    return Arguments(x, call(torch.ones_like, each), call(torch.unsqueeze, indices, -1), True)


def _taken(call: Any, found: Found, indices: fx.Node, k: Any) -> fx.Node:
    """Return 1 for choices that count and 0 for others, `[…, k]`."""
    kept = found.weighing.kept
    assert kept is not None
    rank = found.x.meta["val"].dim()
    if k != 1 and kept.meta["val"].dim() == rank:
        taken: fx.Node = call(torch.gather, kept, -1, indices)
    elif kept.meta["val"].dim() == rank:
        taken = call(torch.sum, kept, -1, True)
    else:
        taken = call(torch.sum, kept, -1)
    return taken
