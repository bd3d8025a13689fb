"""A linear layer whose output is only cut into parts: a layer for each part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes._paths import scope_beside
from passes.tidy._fuse._nodes import SILENT, drop, found, layer_refusal, value
from passes.tidy._fuse.linears import linear_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES", "names_of_parts"]

_CUTS: Final = ("split", "chunk", "tensor_split")
# What parts are called where a name says them all.
_KNOWN: Final = ({"q", "k", "v"}, {"query", "key", "value"}, {"gate", "up"}, {"k", "v"})


def _check(program: Program, match: Match) -> MatchResult:
    root = match.root
    users = list(root.users)
    if len(users) != 1 or root.op != "call_module":
        return SILENT
    kind = op_name(users[0])
    form = _cut(users[0]) if kind in _CUTS else _heads(root, users[0])
    if form is None:
        return SILENT
    refused = layer_refusal(program, root)
    if refused is not None:
        return refused
    last, _ = form
    for user in last.users:
        if op_name(user) != "getitem" or not isinstance(user.args[1], int):
            return MatchResult.fail("the parts are read together", [last, user])
    return found(root, cut=users[0], last=last)


def _cut(cut: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """Return a split of the last dimension and the widths of its parts."""
    parts, whole = value(cut), value(cut.args[0])
    dim = bind(cut).get("dim", 0)
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None
    if dim % whole.dim() != whole.dim() - 1:
        return None
    return cut, [int(part.shape[-1]) for part in parts]


def _heads(root: fx.Node, shaped: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """Return the unbinding of `[…, parts, heads, width]`, permuted so that parts come first."""
    tensor = value(shaped)
    if op_name(shaped) not in ("reshape", "unflatten") or len(shaped.users) != 1:
        return None
    (moved,) = shaped.users
    rank, source = tensor.dim(), value(root)
    if rank != source.dim() + 2 or op_name(moved) != "permute" or len(moved.users) != 1:
        return None
    (last,) = moved.users
    order = _order(moved, rank)
    if op_name(last) != "unbind" or bind(last).get("dim", 0) != 0 or not order:
        return None
    count = tensor.shape[rank - 3]
    if order[0] != rank - 3 or not isinstance(count, int) or _sizes(shaped, rank) is None:
        return None
    if any(str(a) != str(b) for a, b in zip(tensor.shape[: rank - 3], source.shape, strict=False)):
        return None
    return last, [int(source.shape[-1]) // count] * count


def _order(moved: fx.Node, rank: int) -> list[int]:
    dims = bind(moved).get("dims", ())
    return [dim % rank for dim in dims] if all(isinstance(dim, int) for dim in dims) else []


def _sizes(shaped: fx.Node, rank: int) -> tuple[Any, ...] | None:
    """Return the sizes that a reshape or unflatten names, that of the parts in its place."""
    bound = bind(shaped)
    if op_name(shaped) == "reshape":
        sizes = tuple(bound.get("shape", ()))
        return sizes if len(sizes) == rank and isinstance(sizes[rank - 3], int) else None
    sizes = tuple(bound.get("sizes", ()))
    return sizes if len(sizes) == 3 and bound.get("dim") in (-1, rank - 3) else None


def names_of_parts(path: str, count: int) -> list[str]:
    """Return paths for the parts of a layer: `attn.qkv` → `attn.q`, `attn.k`, `attn.v`.

    `q_proj_k_proj` gives `q_proj` and `k_proj`, as `projections` made it of these. Where the name
    says nothing of its parts, they are numbered.
    """
    parent, dot, leaf = path.rpartition(".")
    words = leaf.split("_")
    size = len(words) // count
    groups = [words[place * size : (place + 1) * size] for place in range(count)]
    names = ["_".join(group) for group in groups]
    whole = size * count == len(words)
    alike = size > 1 and len({tuple(group[1:]) for group in groups}) == 1
    if not (whole and (alike or set(names) in _KNOWN)):
        letters = list(leaf)
        names = letters if set(letters) in _KNOWN and len(letters) == count else []
    names = names or [f"{leaf}_{place}" for place in range(count)]
    return [f"{parent}{dot}{name}" for name in names]


def _separate(rewriter: GraphRewriter, match: Match) -> None:
    root, cut, last = match.root, match["cut"], match["last"]
    form = _cut(cut) if cut is last else _heads(root, cut)
    assert form is not None, "the check has found it"
    module: Any = module_of(root)
    weights = module.weight.detach().split(form[1])
    biases = [None] * len(weights) if module.bias is None else module.bias.detach().split(form[1])
    paths = names_of_parts(str(root.target), len(weights))
    scope = scope_beside(root)
    parts = list(last.users)
    for part in parts:
        place = part.args[1]
        assert isinstance(place, int), "the check has found it"
        path = rewriter.fresh_path(paths[place])
        made = rewriter.call_module(
            path,
            linear_layer(weights[place], biases[place], module),
            (root.args[0],),
            before=part,
            scope=(*scope, (path, "Linear")),
        )
        if cut is not last:
            made = _in_heads(rewriter, made, cut, part)
        rewriter.replace_uses(part, made)
    for part in parts:
        drop(rewriter, part)


def _in_heads(rewriter: GraphRewriter, made: fx.Node, shaped: fx.Node, part: fx.Node) -> fx.Node:
    """Bring `[…, heads · width]` into the order that the part had."""
    rank = value(shaped).dim()
    (moved,) = shaped.users
    sizes: Sequence[Any] = _sizes(shaped, rank) or ()
    scope = part.meta.get("scope", ())
    if op_name(shaped) == "reshape":
        target, args = torch.reshape, (made, [*sizes[: rank - 3], *sizes[rank - 2 :]])
        cut = rewriter.call_function(target, args, before=part, scope=scope)
    else:
        # The number of parts may be the size that is left open, and then it is known now.
        width = value(shaped).shape[-2:]
        cut = rewriter.call_function(
            torch.unflatten, (made, -1, [int(each) for each in width]), before=part, scope=scope
        )
    order = [dim - (dim > rank - 3) for dim in _order(moved, rank)[1:]]
    return rewriter.call_function(torch.permute, (cut, order), before=part, scope=scope)


RULES: Final = (Rule("split", op("linear", anything("x")), rewrite=_separate, check=_check),)
