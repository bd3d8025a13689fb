"""Linear layers that read one input: one layer, and a split."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from fxcompress.ir.ops import module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes._paths import scope_beside
from passes.tidy._fuse._nodes import SILENT, found, layer_refusal, replace
from passes.tidy._fuse.linears import linear_layer

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES"]


def _siblings(root: fx.Node) -> list[fx.Node]:
    """Return the linear layers of one module that read the same input, in graph order."""
    source = root.args[0]
    if not isinstance(source, fx.Node) or root.op != "call_module":
        return []
    same = [
        user
        for user in source.users
        if user.op == "call_module"
        and op_name(user) == "linear"
        and user.args[0] is source
        and _parent(user) == _parent(root)
    ]
    return sorted(same)


def _parent(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


def _check(program: Program, match: Match) -> MatchResult:
    layers = _siblings(match.root)
    if len(layers) < 2 or layers[0] is not match.root:
        return SILENT
    for layer in layers:
        refused = layer_refusal(program, layer)
        if refused is not None:
            return refused
    first: Any = module_of(layers[0])
    for layer in layers[1:]:
        module: Any = module_of(layer)
        why = ""
        if (module.bias is None) != (first.bias is None):
            why = "has a bias" if first.bias is None else "has no bias"
        elif module.weight.dtype != first.weight.dtype:
            why = f"is in {module.weight.dtype}"
        elif module.weight.requires_grad != first.weight.requires_grad:
            why = "is frozen or trained"
        if why:
            return MatchResult.fail(f"{layer.target} {why}, unlike {match.root.target}", [layer])
    return found(match.root, **{f"layer{i}": each for i, each in enumerate(layers)})


def _join(rewriter: GraphRewriter, match: Match) -> None:
    layers = list(match.values())
    modules: list[Any] = [module_of(layer) for layer in layers]
    weight = torch.cat([each.weight.detach() for each in modules])
    bias = None
    if modules[0].bias is not None:
        bias = torch.cat([each.bias.detach() for each in modules])
    root = match.root
    path = rewriter.fresh_path(_joined_path([str(layer.target) for layer in layers]))
    scope = scope_beside(root)
    cls = scope[-1:] and root.meta["scope"][-1][1]
    made = rewriter.call_module(
        path,
        linear_layer(weight, bias, modules[0]),
        (root.args[0],),
        before=root,
        scope=(*scope, (path, cls or "Linear")),
    )
    sizes = [each.out_features for each in modules]
    cut = rewriter.call_function(torch.split, (made, sizes, -1), before=root, scope=scope)
    parts = [
        rewriter.call_function(operator.getitem, (cut, place), before=root, scope=scope)
        for place in range(len(layers))
    ]
    for layer, part in zip(layers, parts, strict=True):
        replace(rewriter, layer, part)


def _joined_path(paths: list[str]) -> str:
    """Return where the layer goes: `attn.q_proj`, `attn.k_proj` → `attn.q_proj_k_proj`."""
    parent, _, _ = paths[0].rpartition(".")
    leaf = "_".join(path.rpartition(".")[2] for path in paths)
    leaf = f"fused_{leaf}" if leaf[0].isdigit() else leaf
    return f"{parent}.{leaf}" if parent else leaf


RULES: Final = (Rule("projections", op("linear", anything("x")), rewrite=_join, check=_check),)
