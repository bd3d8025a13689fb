"""What is computed twice from the same operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxcompress.ir.modules import describe, is_stock
from fxcompress.ir.ops import bind, is_inplace, is_known, module_of, op_name, op_spec
from fxcompress.rewrite import Match, MatchResult, Rule, anything
from passes.tidy._fuse._nodes import SILENT, found, replace

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["RULES", "is_pure"]

_RANDOM: Final = frozenset(
    {
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli",
        "multinomial", "normal", "rrelu", "gumbel_softmax", "fractional_max_pool2d",
        "fractional_max_pool3d",
    }
)  # fmt: skip
_EMPTY: Final = frozenset({"empty", "empty_like", "new_empty", "tap", "setitem"})
_STATISTICS: Final = frozenset({"batch_norm", "instance_norm"})
_KINDS: Final = frozenset({"dropout", "recurrent", "quantize"})


def is_pure(node: fx.Node) -> bool:
    """Whether a node gives the same for the same operands, in both modes, and does nothing else."""
    return is_known(node) and not is_inplace(node) and not _impurity(node)


def _impurity(node: fx.Node) -> str:
    """Return why two calls may differ; empty where they cannot."""
    name = op_name(node)
    spec = op_spec(name)
    drawn = "it draws at random, and two draws differ"
    if name in _RANDOM or (spec is not None and spec.kind == "dropout"):
        return drawn
    if _drops(node):
        return drawn
    if name in _STATISTICS:
        return "it updates its statistics in training"
    if name in _EMPTY or (spec is not None and spec.kind in _KINDS):
        return "it has a state of its own"
    return ""


def _drops(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(node), "dropout", 0.0))
    rate = bind(node).get("dropout_p", 0.0)
    return isinstance(rate, fx.Node) or rate != 0


def _check(program: Program, match: Match) -> MatchResult:
    node = match.root
    if node.op in ("placeholder", "output") or not is_known(node) or is_inplace(node):
        return SILENT
    for twin in _candidates(node):
        if twin < node and _same_call(twin, node):
            why = _impurity(node)
            if why:
                return MatchResult.fail(why, [twin])
            written = next(filter(is_inplace, node.graph.nodes), None)
            if written is not None:
                return MatchResult.fail("the model writes into tensors in place", [written])
            return found(node, twin=twin)
    return SILENT


def _candidates(node: fx.Node) -> Iterable[fx.Node]:
    sources = node.all_input_nodes
    if sources:
        return sorted(sources[0].users)
    return node.graph.find_nodes(op=node.op, target=node.target)


def _same_call(one: fx.Node, other: fx.Node) -> bool:
    if one.op != other.op or not _equal(one.args, other.args):
        return False
    if not _equal(one.kwargs, other.kwargs):
        return False
    return one.target == other.target or (
        one.op == "call_module" and _same_module(module_of(one), module_of(other))
    )


def _same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are alike and have no tensors that could tell them apart."""
    if type(one) is not type(other) or not is_stock(one):
        return False
    if any(True for module in (one, other) for _ in (*module.parameters(), *module.buffers())):
        return False
    return _equal(dict(describe(one).kwargs), dict(describe(other).kwargs))


def _equal(one: Any, other: Any) -> bool:
    """Whether arguments are the same, 1, 1.0 and True being three."""
    if isinstance(one, (tuple, list)):
        alike = isinstance(other, (tuple, list)) and len(one) == len(other)
        return alike and all(map(_equal, one, other))
    if isinstance(one, dict):
        alike = isinstance(other, dict) and one.keys() == other.keys()
        return alike and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, slice) and isinstance(other, slice):
        return _equal([one.start, one.stop, one.step], [other.start, other.stop, other.step])
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and bool(one == other)


def _merge(rewriter: GraphRewriter, match: Match) -> None:
    replace(rewriter, match.root, match["twin"])


RULES: Final = (Rule("common", anything("value"), rewrite=_merge, check=_check),)
