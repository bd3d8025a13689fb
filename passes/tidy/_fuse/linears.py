"""Two linear layers in a row, where one costs less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx, nn

from fxcompress.ir.ops import module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes.tidy._fuse._nodes import SILENT, drop, found, layer_refusal

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES", "linear_layer"]


def linear_layer(weight: Tensor, bias: Tensor | None, like: Any) -> nn.Linear:
    """Return a layer of these tensors, in the dtype and trainable as those of another layer."""
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=like.weight.dtype
    )
    trained = bool(like.weight.requires_grad)
    layer.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(like.weight.dtype), requires_grad=trained)
    return layer


def _check(program: Program, match: Match) -> MatchResult:
    root = match.root
    first = root.args[0]
    if not isinstance(first, fx.Node) or op_name(first) != "linear":
        return SILENT
    for layer in (first, root):
        refused = layer_refusal(program, layer)
        if refused is not None:
            return refused
    if len(first.users) > 1:
        return MatchResult.fail(
            f"the output of {first.target} has {len(first.users)} users", [first, *first.users]
        )
    inner: Any = module_of(first)
    outer: Any = module_of(root)
    if inner.weight.dtype != outer.weight.dtype:
        return MatchResult.fail(f"{first.target} has another dtype", [first])
    if inner.weight.requires_grad != outer.weight.requires_grad:
        return MatchResult.fail(f"{first.target} is frozen or trained, unlike it", [first])
    one = outer.out_features * inner.in_features
    two = outer.weight.numel() + inner.weight.numel()
    if one >= two:
        return MatchResult.fail(f"one layer costs {one:,} products a row, the two {two:,}", [first])
    return found(root, first=first)


def _multiply(rewriter: GraphRewriter, match: Match) -> None:
    root, first = match.root, match["first"]
    inner: Any = module_of(first)
    outer: Any = module_of(root)
    outer_weight = outer.weight.detach().double()
    weight = outer_weight @ inner.weight.detach().double()
    bias = None if outer.bias is None else outer.bias.detach().double()
    if inner.bias is not None:
        shift = outer_weight @ inner.bias.detach().double()
        bias = shift if bias is None else bias + shift
    rewriter.set_module(str(root.target), linear_layer(weight, bias, outer))
    rewriter.set_args(root, (first.args[0],))
    drop(rewriter, first)


RULES: Final = (Rule("linears", op("linear", anything("x")), rewrite=_multiply, check=_check),)
