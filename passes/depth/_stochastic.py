"""Where blocks can be dropped at random: the branches that their additions take in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.nn import LayerDrop, StochasticDepth
from fxcompress.rewrite.closing import DROPS
from fxcompress.rewrite.edits import Declined
from passes.depth._blocks import Region, ends, find_regions, stream
from passes.depth.stochastic import Dropped, StochasticDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.depth.stochastic import StochasticOptions

__all__ = ["decide_dropped", "insert_drops"]

_DROPS = ("stochastic_depth", "layer_drop")


def decide_dropped(program: Program, options: StochasticOptions) -> StochasticDecision:
    """Return the decision of `depth.stochastic`."""
    ids = node_ids(program)
    regions = find_regions(program, options.blocks)
    blocks: list[Dropped] = []
    declined: list[Declined] = []
    for place, region in enumerate(regions, start=1):
        reason, because = region.refusal, region.because_of
        pairs: tuple[tuple[str, str], ...] = ()
        if not reason:
            drop = next((n for n in region.nodes if op_name(n) in _DROPS), None)
            if drop is not None:
                reason, because = f"it is dropped at random already, by {ids[drop]}", (drop,)
            else:
                pairs = _pairs(region, options.form, ids)
        if reason:
            nodes = tuple(ids[node] for node in because)
            declined.append(Declined(node=region.path, reason=reason, because_of=nodes))
            continue
        share = place / len(regions) if options.schedule == "linear" else 1.0
        blocks.append(Dropped(path=region.path, p=options.p * share, nodes=pairs))
    if not blocks:
        raise UsageError(
            "no block can be dropped",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
        )
    return StochasticDecision(
        blocks=tuple(blocks), form=options.form, mode=options.mode, declined=tuple(declined)
    )


def _pairs(region: Region, form: str, ids: Mapping[fx.Node, str]) -> tuple[tuple[str, str], ...]:
    """Return the additions with their branches, or what the block reads and makes."""
    entry, exit_ = ends(region)
    if form == "block":
        return ((ids[entry], ids[exit_]),)
    along = stream(region)
    found = []
    for node in region.nodes:
        if node not in along or op_name(node) != "add":
            continue
        branches = [each for each in node.all_input_nodes if each not in along]
        if len(branches) == 1:
            found.append((ids[node], ids[branches[0]]))
    return tuple(found)


def insert_drops(rewriter: GraphRewriter, decision: StochasticDecision) -> None:
    """Insert the drops, each in the scope of its block, so that it goes when the block goes."""
    # Last first: what reads a block includes the drop of the block after it.
    for block in reversed(decision.blocks):
        for first, second in block.nodes:
            node, other = rewriter.node(first), rewriter.node(second)
            path = rewriter.fresh_path(f"{DROPS}.{block.path.replace('.', '_')}")
            if decision.form == "branch":
                drop = StochasticDepth(block.p, decision.mode)
                made = rewriter.call_module(
                    path, drop, (other,), before=node, scope=node.meta["scope"]
                )
                rewriter.replace_uses(other, made, only={node}.__contains__)
            else:
                passed = LayerDrop(block.p, decision.mode)
                made = rewriter.call_module(
                    path, passed, (node, other), after=other, scope=other.meta["scope"]
                )
                rewriter.replace_uses(other, made)
