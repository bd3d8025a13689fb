"""`addmm` with a weight of its own, as GPT-2's layers are written: a linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import fx, nn

from fxcompress.ir.ops import bind, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes.tidy._fuse._nodes import SILENT, drop, found, replace, tensor_of, value
from passes.tidy._fuse.linears import linear_layer

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES"]


def _check(program: Program, match: Match) -> MatchResult:
    bound = bind(match.root)
    bias, rows, weight = (bound.get(name) for name in ("input", "mat1", "mat2"))
    shift, matrix = tensor_of(bias), tensor_of(weight)
    if matrix is None or shift is None or not isinstance(rows, fx.Node):
        return SILENT
    assert isinstance(bias, fx.Node)
    assert isinstance(weight, fx.Node)
    if bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1 or matrix.dim() != 2:
        return MatchResult.fail("it scales its operands", [match.root])
    if not isinstance(matrix, nn.Parameter) or tuple(shift.shape) != matrix.shape[1:]:
        return MatchResult.fail("its bias is no vector of a parameter's columns", [bias, weight])
    for each in (weight, bias):
        name = str(each.target)
        readers = list(program.graph.find_nodes(op="get_attr", target=name))
        tied = [a for a, c in program.ties.items() if name in (a, c)]
        if len(readers) > 1 or len(each.users) > 1 or tied:
            return MatchResult.fail(f"{name} is shared with {_other(tied, each)}", readers)
    path = str(weight.target).rpartition(".")[0]
    below = [n for n in program.state() if path and n.startswith(f"{path}.")]
    if sorted(below) != sorted({str(weight.target), str(bias.target)}):
        return MatchResult.fail(f"{weight.target} is in no module of its own", [weight])
    if shift.requires_grad != matrix.requires_grad or shift.dtype != matrix.dtype:
        return MatchResult.fail(f"{bias.target} is frozen or trained, unlike its weight", [bias])
    return found(match.root, rows=rows, weight=weight, bias=bias)


def _other(tied: list[str], node: fx.Node) -> str:
    return tied[0] if tied else f"{len(node.users)} readers"


def _as_layer(rewriter: GraphRewriter, match: Match) -> None:
    root, weight, bias = match.root, match["weight"], match["bias"]
    path = str(weight.target).rpartition(".")[0]
    like = nn.Module()
    like.weight = tensor_of(weight)  # type: ignore[assignment]
    matrix: Any = like.weight
    shift: Any = tensor_of(bias)
    layer = linear_layer(matrix.detach().t().contiguous(), shift.detach(), like)
    rewriter.set_module(path, layer)
    rows = match["rows"]
    made = rewriter.call_module(path, None, (rows,), before=root)
    rewriter.replace_uses(root, made)
    drop(rewriter, root)


def _unrolled(program: Program, match: Match) -> MatchResult:
    """Match rows put one below the other for a layer, and taken apart after it."""
    root = match.root
    layer = root.args[0]
    if not isinstance(layer, fx.Node) or op_name(layer) != "linear" or len(layer.users) > 1:
        return SILENT
    rows = layer.args[0]
    if not isinstance(rows, fx.Node) or op_name(rows) not in ("reshape", "flatten"):
        return SILENT
    source = rows.args[0]
    whole, cut = value(root), value(source)
    if value(rows).dim() != 2 or whole.dim() != cut.dim():
        return SILENT
    sizes = zip(whole.shape[:-1], cut.shape[:-1], strict=True)
    if any(str(a) != str(b) for a, b in sizes) or value(layer).shape[-1] != whole.shape[-1]:
        return SILENT
    if value(rows).shape[-1] != cut.shape[-1]:
        return SILENT
    assert isinstance(source, fx.Node)
    return found(root, layer=layer, rows=rows, source=source)


def _direct(rewriter: GraphRewriter, match: Match) -> None:
    layer = match["layer"]
    made = rewriter.call_module(
        str(layer.target),
        None,
        (match["source"],),
        before=match.root,
        scope=layer.meta.get("scope", ()),
    )
    replace(rewriter, match.root, made)


RULES: Final = (
    Rule("products", op("addmm", anything("bias")), rewrite=_as_layer, check=_check),
    Rule("products", op(("reshape",), anything("x")), rewrite=_direct, check=_unrolled),
)
