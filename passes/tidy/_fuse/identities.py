"""What changes nothing, and sums with what is multiplied by zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxcompress.ir._types import same_type
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite import Match, MatchResult, Rule, anything, op
from passes.tidy._fuse._nodes import SILENT, found, replace, tensor_of, value

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES", "zeros"]

_DROPOUTS: Final = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
# In row-major order these move nothing, so that the same shape is the same tensor.
_ROW_MAJOR: Final = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_BROADCASTS: Final = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
_COPIES: Final = ("identity", "alias", "clone", "contiguous", "positive")
_READ_STRIDES: Final = ("as_strided", "view", "stride")
_NEUTRAL: Final = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}


def _source(node: fx.Node) -> Any:
    """Return what a node changes the least: its first operand."""
    return node.args[0] if node.args else bind(node).get("input")


def _same(node: fx.Node, source: Any) -> bool:
    return isinstance(source, fx.Node) and same_type(value(node), value(source))


def _kept(program: Program, match: Match) -> MatchResult:
    root, source = match.root, _source(match.root)
    if not _same(root, source) or not isinstance(value(root), torch.Tensor):
        return SILENT
    return found(root, kept=source)


def _no_dropout(program: Program, match: Match) -> MatchResult:
    root = match.root
    module: Any = module_of(root) if root.op == "call_module" else None
    part = bind(root).get("p", 0.5) if module is None else module.p
    # A node is a probability that follows the mode.
    return SILENT if isinstance(part, fx.Node) or part != 0 else _kept(program, match)


def _neutral(program: Program, match: Match) -> MatchResult:
    """Match x + 0, 0 + x, x - 0, x · 1, 1 · x, x / 1, x¹, unless they change the type."""
    root, bound = match.root, bind(match.root)
    name = op_name(root)
    left, right = bound.get("input"), bound.get("exponent", bound.get("other"))
    if bound.get("rounding_mode") is not None:
        return SILENT
    sides = [(left, right)] + ([(right, left)] if name in ("add", "mul") else [])
    for kept, number in sides:
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        if plain and number == _NEUTRAL[name] and _same(root, kept):
            return found(root, kept=kept)
    return SILENT


def _copy(program: Program, match: Match) -> MatchResult:
    if any(op_name(user) in _READ_STRIDES for user in match.root.users):
        return SILENT
    return _kept(program, match)


def _cast(program: Program, match: Match) -> MatchResult:
    extra = set(bind(match.root)) - {"input", "dtype", "device", "other"}
    return SILENT if extra else _kept(program, match)


def _whole_slice(program: Program, match: Match) -> MatchResult:
    index = match.root.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    return _kept(program, match) if all(map(_takes_all, entries)) else SILENT


def _takes_all(entry: Any) -> bool:
    """Whether an index starts at 0 and steps by 1; that it ends last, the shape says."""
    if entry is Ellipsis:
        return True
    return isinstance(entry, slice) and entry.start in (None, 0) and entry.step in (None, 1)


def _unmoved(program: Program, match: Match) -> MatchResult:
    root = match.root
    dims = _order(root)
    return _kept(program, match) if dims and dims == list(range(len(dims))) else SILENT


def _order(node: fx.Node) -> list[int]:
    """Return where each dimension of a permute or transpose comes from; empty if unknown."""
    tensor, bound = value(node), bind(node)
    if not isinstance(tensor, torch.Tensor):
        return []
    rank = tensor.dim()
    if op_name(node) == "permute":
        dims = bound.get("dims", ())
        return [int(dim) % rank for dim in dims] if all(isinstance(d, int) for d in dims) else []
    pair = [bound.get("dim0"), bound.get("dim1")]
    if not all(isinstance(dim, int) for dim in pair):
        return []
    order = list(range(rank))
    first, second = (int(dim) % rank for dim in pair if isinstance(dim, int))
    order[first], order[second] = order[second], order[first]
    return order


def _undone(program: Program, match: Match) -> MatchResult:
    inner = _source(match.root)
    if op_name(inner) not in ("permute", "transpose"):
        return SILENT
    outer_order, inner_order = _order(match.root), _order(inner)
    if not outer_order or not inner_order:
        return SILENT
    together = [inner_order[place] for place in outer_order]
    if together != list(range(len(together))):
        return SILENT
    return found(match.root, kept=_source(inner), inner=inner)


def _reshaped_twice(program: Program, match: Match) -> MatchResult:
    inner = _source(match.root)
    if not isinstance(inner, fx.Node) or op_name(inner) not in _ROW_MAJOR or len(inner.users) > 1:
        return SILENT
    return found(match.root, inner=inner, source=_source(inner))


def _keep(rewriter: GraphRewriter, match: Match) -> None:
    replace(rewriter, match.root, match["kept"])


def _reshape_once(rewriter: GraphRewriter, match: Match) -> None:
    root, inner = match.root, match["inner"]
    rewriter.set_args(root, (match["source"], *root.args[1:]))
    rewriter.remove(inner)


def _rule(
    names: Sequence[str],
    check: Callable[[Program, Match], MatchResult],
    rewrite: Callable[[GraphRewriter, Match], None] = _keep,
) -> Rule:
    return Rule("identities", op(names, anything("x")), rewrite=rewrite, check=check)


RULES: Final = (
    _rule(_DROPOUTS, _no_dropout),
    _rule(tuple(_NEUTRAL), _neutral),
    _rule(_COPIES, _copy),
    _rule(("to", "type_as"), _cast),
    _rule((*_ROW_MAJOR, *_BROADCASTS), _kept),
    _rule(("getitem", "slice"), _whole_slice),
    _rule(("permute", "transpose"), _unmoved),
    _rule(("permute", "transpose"), _undone),
    _rule(("reshape",), _reshaped_twice, _reshape_once),
)


# -- branches that are multiplied by zero ---------------------------------------------------------


def zeros(parameters: bool) -> tuple[Rule, ...]:
    """Return the rule for x + 0 · y; `parameters` says whether trainable zeros stay zeros."""

    def check(program: Program, match: Match) -> MatchResult:
        root, bound = match.root, bind(match.root)
        left, right = bound.get("input"), bound.get("other")
        sides = [(left, right)] + ([(right, left)] if op_name(root) == "add" else [])
        near = SILENT
        for kept, term in sides:
            if not isinstance(term, fx.Node) or op_name(term) != "mul" or not _same(root, kept):
                continue
            missed = _is_zero(term, parameters)
            if missed is None:
                return found(root, kept=kept, term=term)
            near = missed if missed.reason else near
        return near

    return (Rule("dead_branches", op(("add", "sub"), anything("x")), rewrite=_keep, check=check),)


def _is_zero(product: fx.Node, parameters: bool) -> MatchResult | None:
    """Return None where one factor of a product is zero and stays so, else why it may not be."""
    bound = bind(product)
    for factor in (bound.get("input"), bound.get("other")):
        if isinstance(factor, (int, float)) and factor == 0:
            return None
        tensor = tensor_of(factor)
        if tensor is None or tensor.device.type == "meta" or bool(tensor.any()):
            continue
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and not parameters:
            assert isinstance(factor, fx.Node)
            return MatchResult.fail(
                f"{factor.target} is zero now, but trained: freeze it, or set `parameters: true`",
                [product, factor],
            )
        return None
    return SILENT
