"""Decide which blocks are routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.rewrite.edits import Declined
from passes.depth._blocks import Region, ends, find_regions
from passes.depth._routing.fit import fitted
from passes.depth._routing.tokens import Tokens, TokensError, is_causal, size_text, tokens_of
from passes.depth.mixture_of_depths import MixtureOfDepthsDecision, Routed

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.depth.mixture_of_depths import MixtureOfDepthsOptions

__all__ = ["decide_routed"]


def decide_routed(
    program: Program, options: MixtureOfDepthsOptions, context: Context
) -> MixtureOfDepthsDecision:
    """Return the decision of `depth.mixture_of_depths`."""
    ids = node_ids(program)
    regions = find_regions(program, options.blocks)
    places = _places(options, regions)
    chosen: dict[int, Tokens] = {}
    declined: list[Declined] = []
    for place in places:
        region = regions[place]
        try:
            if region.refusal:
                raise TokensError(region.refusal, *region.because_of)
            chosen[place] = tokens_of(region)
        except TokensError as error:
            if options.layers:
                raise UsageError(
                    f"block {place} cannot be routed", reason=error.reason, where=region.path
                ) from error
            nodes = tuple(ids[node] for node in error.nodes)
            declined.append(Declined(node=region.path, reason=error.reason, because_of=nodes))
    if not chosen:
        raise UsageError(
            "no block can be routed",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
        )
    causal = options.inference == "predictor"
    if options.inference == "auto":
        entry, _ = ends(regions[min(chosen)])
        causal = is_causal(program, size_text(entry.meta["val"].shape[1]))
    blocks = []
    for place, tokens in chosen.items():
        entry, exit_ = ends(regions[place])
        blocks.append(
            Routed(
                index=place,
                path=regions[place].path,
                entry=ids[entry],
                exit=ids[exit_],
                gathered=tuple((ids[g.reader], ids[g.value]) for g in tokens.gathered),
            )
        )
    decision = MixtureOfDepthsDecision(
        blocks=tuple(blocks),
        capacity=options.capacity,
        causal=causal,
        start=options.start,
        until=options.until,
        seed=context.seed,
        declined=tuple(declined),
    )
    if options.init == "random":
        return decision
    if context.planning:
        return decision.model_copy(
            update={"pending": (f"{len(blocks)} routers: known after measuring the blocks",)}
        )
    arrays: dict[str, torch.Tensor] = fitted(
        program, {regions[place].path: regions[place] for place in chosen}, options, context
    )
    return decision.model_copy(update={"arrays": arrays})


def _places(options: MixtureOfDepthsOptions, regions: Sequence[Region]) -> list[int]:
    """Return which blocks to route: those listed, or every second one.

    Raises:
        UsageError: There is no such block.
    """
    for place in options.layers:
        if place >= len(regions):
            raise UsageError(
                f"there is no block {place}",
                reason=f"the model has {len(regions)} blocks, {regions[0].path} being block 0",
            )
    return sorted(options.layers) or list(range(1, len(regions), 2))
