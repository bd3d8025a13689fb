"""Let the output choose between the exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.nn import Exit
from fxcompress.rewrite import early_exits
from fxcompress.rewrite.exits import EXITS

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.depth.exit_when import ExitWhenDecision

__all__ = ["insert_choices"]


def insert_choices(rewriter: GraphRewriter, decision: ExitWhenDecision) -> None:
    """Put a choice for each exit before the output, the earliest exit's last."""
    answer = rewriter.node(decision.output)
    (output,) = rewriter.graph.find_nodes(op="output")
    heads = {each.name: each for each in early_exits(rewriter.program)}
    value = answer
    for chosen in reversed(decision.exits):
        head = heads[chosen.name]
        choice = Exit(chosen.name, chosen.threshold, decision.criterion, decision.batch)
        path = rewriter.fresh_path(f"{EXITS}.{chosen.name}.choice")
        value = rewriter.call_module(path, choice, (head.logits, value), before=output, scope=())
        assert head.tap is not None, "decide refused exits that have thresholds"
        rewriter.remove(head.tap)
    rewriter.replace_uses(answer, value, only=lambda user: user is output)
