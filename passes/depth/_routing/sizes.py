"""Sizes inside a routed block: the number of tokens becomes that of the chosen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sympy
import torch
from torch import fx

from fxcompress.ir.ops import is_scalar, op_name
from passes.depth._sizes import Rebuilder

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.depth._blocks import Region

__all__ = ["Sizes"]

_K: Final = sympy.Symbol("chosen_tokens", integer=True, positive=True)
_SHAPED: Final = frozenset({"view", "reshape", "expand", "unflatten", "repeat"})


class Sizes:
    """Brings the sizes that a block reads up to date.

    Args:
        rewriter: Where.
        region: The block.
        data: What of it is computed from the state's values.
        entry: The state, with all tokens.
        chosen: The state of the chosen tokens.
        scope: For new nodes.
    """

    def __init__(
        self,
        rewriter: GraphRewriter,
        region: Region,
        data: frozenset[fx.Node],
        entry: fx.Node,
        chosen: fx.Node,
        scope: tuple[tuple[str, str], ...],
    ) -> None:
        self.rewriter, self.region, self.data = rewriter, region, data
        self.entry, self.chosen, self.scope = entry, chosen, scope
        self.tokens = _expression(entry.meta["val"].shape[1])

    def follow(self, last: fx.Node) -> fx.Node:
        """Change what must change; return the last node that was put in after `last`."""
        self.last = last
        whole: dict[fx.Node, fx.Node] = {}
        short: dict[fx.Node, fx.Node] = {}
        count: fx.Node | None = None
        for node in self.region.nodes:
            if is_scalar(node):
                continue
            follows = node in self.data
            for scalar in [each for each in node.all_input_nodes if is_scalar(each)]:
                if not self._varies(scalar):
                    continue
                known = short if follows else whole
                if scalar not in known:
                    known[scalar] = self._computed(scalar, short=follows)
                self.rewriter.replace_uses(scalar, known[scalar], only={node}.__contains__)
            if follows and self.tokens.is_Integer and op_name(node) in _SHAPED:
                if count is None and _holds(node, int(self.tokens)):
                    count = self._size(1)
                if count is not None:
                    _replace(self.rewriter, node, int(self.tokens), count)
        return self.last

    def _varies(self, scalar: fx.Node) -> bool:
        """Whether a size depends on the number of tokens."""
        value = scalar.meta.get("val")
        if isinstance(value, torch.SymInt):
            return bool(_expression(value).has(*self.tokens.free_symbols)) and not (
                self.tokens.is_Integer
            )
        return type(value) is int and self.tokens.is_Integer and value == int(self.tokens)

    def _computed(self, scalar: fx.Node, *, short: bool) -> fx.Node:
        """Return a size anew, from the chosen tokens or from all of them."""
        source = self.chosen if short else self.entry
        expression = _expression(scalar.meta["val"]).subs(self.tokens, _K)
        builder = Rebuilder(self.rewriter, self.entry)
        builder.entry, builder.last = source, self.last
        builder.dimensions = {**builder.dimensions, _K: 1}
        if not set(expression.free_symbols) <= set(builder.dimensions):
            return scalar
        made = builder.build(expression)
        assert isinstance(made, fx.Node), "it varies with the tokens, and is no number"
        self.last = builder.last
        return made

    def _size(self, dim: int) -> fx.Node:
        self.last = self.rewriter.call_method(
            "size", (self.chosen, dim), after=self.last, scope=self.scope
        )
        return self.last


def _expression(value: Any) -> sympy.Expr:
    if isinstance(value, torch.SymInt):
        found: sympy.Expr = value.node.expr
        return found
    return sympy.Integer(int(value))


def _holds(node: fx.Node, size: int) -> bool:
    return any(_equal(each, size) for each in _flat((node.args[1:], node.kwargs)))


def _flat(value: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(value, found.append)
    return found


def _equal(value: Any, size: int) -> bool:
    return type(value) is int and value == size


def _replace(rewriter: GraphRewriter, node: fx.Node, size: int, count: fx.Node) -> None:
    """Let a shape name the number of chosen tokens."""

    def changed(value: Any) -> Any:
        return count if _equal(value, size) else value

    args = (node.args[0], *fx.node.map_aggregate(node.args[1:], changed))
    kwargs = fx.node.map_aggregate(dict(node.kwargs), changed)
    if args != node.args or kwargs != node.kwargs:
        rewriter.set_args(node, args, kwargs)
