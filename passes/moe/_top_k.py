"""Give top-k nodes another number, and weights a sum of 1 or none."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.rewrite.edits import Declined
from passes._paths import scope_beside
from passes.moe._lift.decide import lift, lifted_first, touched
from passes.moe._routing import Call, choice_of, find_mixtures, scores_of, sum_of
from passes.moe.change_top_k import Changed, ChangeTopKDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.moe.change_top_k import ChangeTopKOptions

__all__ = ["change", "decide"]


def decide(program: Program, options: ChangeTopKOptions) -> ChangeTopKDecision:
    """Return the decision of `moe.change_top_k`."""
    program, first = lifted_first(program)
    ids = node_ids(program)
    changed: list[Changed] = []
    declined: list[Declined] = list(first.declined)
    for mixture in find_mixtures(program, options):
        choices = [choice_of(call.indices) for call in mixture.calls]
        if any(choice is None for choice in choices):
            reason = "its experts are not chosen by a top-k"
            declined.append(Declined(node=mixture.path, reason=reason))
            continue
        choice = choices[0]
        assert choice is not None, "all calls have a top-k"
        count = int(scores_of(choice).meta["val"].shape[-1])
        if options.top_k > count:
            raise UsageError(
                f"top_k {options.top_k} is above the number of experts {count}",
                reason=f"the router of {mixture.path} chooses among {count}",
                hint=f"take at most {count}, or exclude it",
                where=mixture.path,
            )
        if options.renormalize == "never":
            for call in mixture.calls:
                _check_sum(call, mixture.path, ids)
        changed.append(
            Changed(
                path=mixture.path,
                experts=count,
                before=int(bind(choice)["k"]),
                after=options.top_k,
            )
        )
    return ChangeTopKDecision(
        renormalize=options.renormalize,
        mixtures=tuple(changed),
        lifted=touched(first, (each.path for each in changed)),
        declined=tuple(declined),
    )


def _check_sum(call: Call, path: str, ids: dict[fx.Node, str]) -> None:
    """Check that weights that sum to 1 do so by a division."""
    if sum_of(call.weights) is None and op_name(call.weights) == "softmax":
        raise UsageError(
            f"the weights of {path} cannot be left without a sum of 1",
            reason=f"{ids[call.weights]} is a softmax over the chosen experts alone",
            hint="say `renormalize: keep`",
            where=path,
        )


def change(rewriter: GraphRewriter, decision: ChangeTopKDecision) -> None:
    """Give each top-k its number, and weights their sum."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason)
    lift(rewriter, decision.lifted)
    wanted = {each.path: each for each in decision.mixtures}
    for mixture in find_mixtures(rewriter.program):
        if mixture.path not in wanted:
            continue
        for call in mixture.calls:
            choice = choice_of(call.indices)
            assert choice is not None, "it was there when it was decided"
            if bind(choice)["k"] != wanted[mixture.path].after:
                _set(rewriter, choice, wanted[mixture.path].after)
            _renormalize(rewriter, call, decision.renormalize)


def _set(rewriter: GraphRewriter, choice: fx.Node, k: int) -> None:
    if "k" in choice.kwargs:
        rewriter.set_args(choice, choice.args, {**choice.kwargs, "k": k})
    else:
        rewriter.set_args(choice, (choice.args[0], k, *choice.args[2:]))


def _renormalize(rewriter: GraphRewriter, call: Call, how: str) -> None:
    found = sum_of(call.weights)
    if how == "never" and found is not None:
        values, division = found
        rewriter.replace_uses(division, values)
    if how == "always" and found is None and op_name(call.weights) != "softmax":
        weights, scope = call.weights, scope_beside(call.node)
        total = rewriter.call_function(
            torch.sum, (weights, -1), {"keepdim": True}, before=call.node, scope=scope
        )
        divided = rewriter.call_function(
            operator.truediv, (weights, total), before=call.node, scope=scope
        )
        rewriter.replace_uses(weights, divided, only=lambda user: user is call.node)
