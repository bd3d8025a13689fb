"""Put a router and experts in the place of a feed-forward layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.errors import PassError
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import Experts, Tap
from fxcompress.rewrite.taps import insert_tap, taps_of
from passes.moe._dense import insert_dense, linear_of
from passes.moe._upcycle.copies import experts_of, matrices_of, router_of, shared_of
from passes.moe._upcycle.find import FeedForward, find_feed_forwards

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.moe.upcycle import Recipe, Upcycled, UpcycleDecision

__all__ = ["check_inserted", "insert"]


@dataclass
class _Place:
    """Where the parts of a layer go; their modules are there after its first call."""

    router: str
    experts: str
    shared: str
    called: bool = False


def insert(rewriter: GraphRewriter, decision: UpcycleDecision) -> None:
    """Let every call of an upcycled layer be a router and experts."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    found = {rewriter.id(each.down): each for each in find_feed_forwards(rewriter.program)[0]}
    for layer in decision.layers:
        place = _Place(
            router=_path(rewriter, layer, "router"),
            experts=_path(rewriter, layer, "experts"),
            shared=_path(rewriter, layer, "shared"),
        )
        for node in layer.nodes:
            _insert_call(rewriter, found[node], place, layer, decision)


def _path(rewriter: GraphRewriter, layer: Upcycled, name: str) -> str:
    return rewriter.fresh_path(f"{layer.path}.{name}" if layer.path else name)


def _insert_call(
    rewriter: GraphRewriter,
    call: FeedForward,
    place: _Place,
    layer: Upcycled,
    decision: UpcycleDecision,
) -> None:
    recipe, state = decision.recipe, rewriter.program.state()
    trainable = state[call.up.weight].requires_grad
    dense = None if place.called else matrices_of(call, state)
    router: nn.Module | None = None
    experts: nn.Module | None = None
    if dense is not None:
        what = layer.nodes[0]
        weight = router_of(dense, recipe, decision.seed, what)
        router = linear_of(weight, None, trainable=trainable)
        experts = experts_of(
            dense, recipe, decision.seed, what,
            activation=layer.activation, dropout=layer.dropout,
        )  # fmt: skip
        experts.requires_grad_(trainable)
    scope = _scope(call, layer.path)
    where: dict[str, Any] = {"before": call.down, "scope": scope}
    value, read = call.entry.meta["val"], call.entry
    if value.dtype in (torch.bfloat16, torch.float16):
        read = rewriter.call_method("to", (call.entry, torch.float32), **where)
    logits = rewriter.call_module(place.router, router, (read,), **where)
    weights, indices = _Routing(rewriter, where).write(logits, recipe)
    made = rewriter.call_module(place.experts, experts, (call.entry, weights, indices), **where)
    if recipe.shared:
        shared = insert_dense(
            rewriter,
            place.shared,
            None if dense is None else shared_of(dense, recipe),
            call.entry,
            layer.activation,
            gated=layer.gated,
            dropout=layer.dropout,
            trainable=trainable,
            **where,
        )
        made = rewriter.call_function(operator.add, (made, shared), **where)
    rewriter.replace_uses(call.exit, made)
    _tap(rewriter, logits, layer.index, place.router)
    place.called = True


@dataclass(frozen=True)
class _Routing:
    """Writes what is between a router's logits and its experts."""

    rewriter: GraphRewriter
    where: dict[str, Any]

    def write(self, logits: fx.Node, recipe: Recipe) -> tuple[fx.Node, fx.Node]:
        """Return weights and indices `[..., k]`."""
        chances = self._call(F.softmax, logits, dim=-1)
        top = self._call(torch.topk, chances, recipe.top_k, dim=-1)
        weights, indices = (self._call(operator.getitem, top, i) for i in (0, 1))
        if recipe.weights == "renormalized":
            total = self._call(torch.sum, weights, dim=-1, keepdim=True)
            weights = self._call(operator.truediv, weights, total)
        elif recipe.weights == "straight_through":
            ones = self._call(operator.truediv, weights, self._call(torch.detach, weights))
            # Counted, not written down, so that another top-k is one number to change.
            count = self._call(torch.sum, self._call(torch.detach, ones), dim=-1, keepdim=True)
            weights = self._call(operator.truediv, ones, count)
        if recipe.capacity is not None:
            weights = self._within(weights, indices, recipe, recipe.capacity)
        return weights, indices

    def _within(
        self, weights: fx.Node, indices: fx.Node, recipe: Recipe, capacity: float
    ) -> fx.Node:
        """Return weights that are 0 where an expert has all the tokens it takes.

        The r-th token of a sequence that chose an expert is taken if r ≤ ⌈c · tokens · k / N⌉, that
        is (r − 1) · N < c · tokens · k. So what a token gets depends on no later one, but for the
        length of the sequence.
        """
        hot = self._call(F.one_hot, indices, recipe.experts)
        chosen = self._call(torch.sum, hot, dim=-2)
        places = self._call(torch.cumsum, chosen, dim=-2)
        place = self._call(torch.gather, places, -1, indices)
        choices = self._call(torch.sum, chosen, dim=(-2, -1), keepdim=True)
        limit = self._call(operator.mul, choices, capacity)
        earlier = self._call(operator.mul, self._call(operator.sub, place, 1), recipe.experts)
        taken = self._call(torch.lt, earlier, limit)
        return self._call(operator.mul, weights, taken)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.call_function(target, args, kwargs, **self.where)


def _tap(rewriter: GraphRewriter, logits: fx.Node, index: int, at: str) -> None:
    """Let losses read a router's logits."""
    taken = set(taps_of(rewriter.program))
    name, count = f"router_{index}", 1
    while name in taken:
        count += 1
        name = f"router_{index}_{count}"
    insert_tap(rewriter, logits, Tap(name, at=at))


def _scope(call: FeedForward, path: str) -> tuple[tuple[str, str], ...]:
    """Return the scope of the module that holds a layer."""
    chain = tuple(call.down.meta.get("scope", ()))
    inside = [place for place, (name, _) in enumerate(chain) if name == path]
    return chain[: inside[0] + 1] if inside else ()


def check_inserted(after: Program, decision: UpcycleDecision) -> None:
    """Check that each layer has become experts, as many as were asked for.

    Raises:
        PassError: One has not.
    """
    recipe = decision.recipe
    calls = [node for node in after.nodes if op_name(node) == "experts"]
    made = [module_of(node) for node in calls]
    fitting = [
        each for each in made if isinstance(each, Experts) and each.experts == recipe.experts
    ]
    wanted = sum(len(layer.nodes) for layer in decision.layers)
    if len(fitting) < wanted:
        raise PassError(f"{len(fitting)} calls of {recipe.experts} experts, not {wanted}")
