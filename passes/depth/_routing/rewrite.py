"""Route tokens around a block: choose, gather, run the block on what was chosen, scatter back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from fxcompress.nn import RouteGradient, Tap, TopTokens
from fxcompress.rewrite import insert_tap
from fxcompress.rewrite.closing import DROPS
from passes.depth._blocks import Region, ends, find_regions
from passes.depth._routing.sizes import Sizes
from passes.depth._routing.tokens import Gathered, Tokens, tokens_of

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.depth.mixture_of_depths import MixtureOfDepthsDecision, Routed

__all__ = ["ROUTE", "insert_routers"]

ROUTE: Final = "route"
"""The name of taps on choices, before the block's number."""


def insert_routers(rewriter: GraphRewriter, decision: MixtureOfDepthsDecision) -> None:
    """Insert routers, and let the blocks see the chosen tokens alone."""
    from glob import escape

    paths = [escape(each.path) for each in decision.blocks]
    found = {region.path: region for region in find_regions(rewriter.program, paths)}
    read = {path: tokens_of(region) for path, region in found.items()}
    # Last first: what a block makes is read by the router of the next.
    for block in reversed(decision.blocks):
        _Block(rewriter, decision, block, found[block.path], read[block.path]).route()


class _Block:
    def __init__(
        self,
        rewriter: GraphRewriter,
        decision: MixtureOfDepthsDecision,
        block: Routed,
        region: Region,
        tokens: Tokens,
    ) -> None:
        self.rewriter, self.decision, self.block = rewriter, decision, block
        self.region, self.tokens = region, tokens
        self.entry, self.exit = ends(region)
        self.scope = _scope_of(region)
        self.last = self.entry
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}
        state: Tensor = self.entry.meta["val"]
        self.width, self.dtype = int(state.shape[2]), state.dtype

    def route(self) -> None:
        """Insert everything, from the router to the scatter."""
        inside = set(self.region.nodes)
        users = [user for user in self.exit.users if user not in inside]
        places, scores, likely = self._choice()
        where = self._method("expand", self._method("unsqueeze", places, -1), -1, -1, self.width)
        chosen = self._method("gather", self.entry, 1, where)
        sizes = Sizes(self.rewriter, self.region, self.tokens.data, self.entry, chosen, self.scope)
        readers = self.tokens.data & set(self.entry.users)
        self.rewriter.replace_uses(self.entry, chosen, only=readers.__contains__)
        self.last = sizes.follow(self.last)
        for each in self.tokens.gathered:
            self._gather(each, places)
        self.last = self.exit
        mixed = self._heard(chosen, scores, places)
        whole = self._method("scatter", self.entry, 1, where, mixed)
        self.rewriter.replace_uses(self.exit, whole, only=set(users).__contains__)
        self._tap(scores, likely, places)

    def _choice(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Return the places of the chosen tokens, the scores, and the prediction."""
        decision, path = self.decision, self.block.path
        weight, bias = self._start()
        router = _linear(weight, None, self.dtype)
        score = self._module(f"{path}.router", router, self.entry)
        scores = likely = self._method("squeeze", score, -1)
        if decision.causal:
            seen = self._method("detach", self.entry)
            predictor = _linear(weight, bias, self.dtype)
            likely = self._method("squeeze", self._module(f"{path}.predictor", predictor, seen), -1)
        top = TopTokens(decision.capacity, decision.causal, decision.start, decision.until)
        places = self._module(f"{path}.top_tokens", top, scores, likely)
        return places, scores, likely

    def _start(self) -> tuple[Tensor, float]:
        """Return the router's weight `[1, width]`, and the predictor's bias."""
        found = self.decision.arrays.get(f"{self.block.path}.weight")
        if found is not None:
            threshold = float(self.decision.arrays[f"{self.block.path}.threshold"])
            return found, -threshold
        generator = torch.Generator().manual_seed(self.decision.seed + self.block.index)
        weight = torch.randn(1, self.width, generator=generator) * self.width**-0.5
        return weight, 0.0

    def _heard(self, chosen: fx.Node, scores: fx.Node, places: fx.Node) -> fx.Node:
        """Return what the block makes, of which the router hears."""
        own = self._method("unsqueeze", self._method("gather", scores, 1, places), -1)
        path = f"{DROPS}.route_{self.block.index}"
        return self._module(path, RouteGradient(), own, chosen, self.exit)

    def _gather(self, each: Gathered, places: fx.Node) -> None:
        """Let a node read a value's entries of the chosen tokens."""
        known = each.value, each.rank
        if known not in self.made:
            self.made[known] = self._entries(each, places)
        node = self.made[known]
        self.rewriter.replace_uses(each.value, node, only={each.reader}.__contains__)

    def _entries(self, each: Gathered, places: fx.Node) -> fx.Node:
        """Return a value's entries of the chosen tokens, lined up with what reads them."""
        value = each.value
        self.last = max(value, places, self.last)
        if self.last > each.reader:
            self.last = max(value, places)
        found: Tensor = value.meta["val"]
        shape: list[Any] = [1] * (each.rank - found.dim()) + list(found.shape)
        node = value
        for _ in range(each.rank - found.dim()):
            node = self._method("unsqueeze", node, 0)
        batch = self._method("size", self.entry, 0)
        node = self._method("expand", node, batch, *[-1] * (each.rank - 1))
        for dim in each.dims:
            at = each.rank + dim
            index = places
            for _ in range(at - 1):
                index = self._method("unsqueeze", index, 1)
            for _ in range(each.rank - at - 1):
                index = self._method("unsqueeze", index, -1)
            wide = [self._wide(node, place, shape, at) for place in range(1, each.rank)]
            index = self._method("expand", index, -1, *wide)
            node = self._method("gather", node, at, index)
            shape[at] = None
        return node

    def _wide(self, node: fx.Node, place: int, shape: list[Any], at: int) -> Any:
        """Return the size of a dim of an index: as it is in what is gathered from."""
        if place == at:
            return -1
        size = shape[place]
        return size if type(size) is int else self._method("size", node, place)

    def _tap(self, scores: fx.Node, likely: fx.Node, places: fx.Node) -> None:
        """Tap the prediction beside the choice, `[batch, tokens, 2]`, for the loss to compare."""
        if not self.decision.causal:
            return
        self.last = max(likely, places)
        if self.decision.start is not None:
            # What is predicted is the choice at the end, also while more tokens go through.
            path = f"{self.block.path}.final_tokens"
            places = self._module(path, TopTokens(self.decision.capacity), scores, likely)
        none = self._function(torch.zeros_like, likely)
        chosen = self._method("scatter", none, 1, places, 1.0)
        both = self._function(torch.stack, (likely, chosen), -1)
        insert_tap(self.rewriter, both, Tap(f"{ROUTE}_{self.block.index}", at=self.block.path))

    # -- nodes -------------------------------------------------------------------------------------

    def _module(self, path: str, module: nn.Module, *args: Any) -> fx.Node:
        path = self.rewriter.fresh_path(path)
        self.last = self.rewriter.call_module(path, module, args, after=self.last, scope=self.scope)
        return self.last

    def _method(self, name: str, *args: Any) -> fx.Node:
        self.last = self.rewriter.call_method(name, args, after=self.last, scope=self.scope)
        return self.last

    def _function(self, function: Any, *args: Any) -> fx.Node:
        self.last = self.rewriter.call_function(function, args, after=self.last, scope=self.scope)
        return self.last


def _linear(weight: Tensor, bias: float | None, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.fill_(bias)
    return made.to(dtype)


def _scope_of(region: Region) -> tuple[tuple[str, str], ...]:
    """Return the scope of a block itself."""
    scope = region.nodes[0].meta["scope"]
    place = next(i for i, (path, _) in enumerate(scope) if path == region.path)
    return tuple(scope[: place + 1])
