"""All experts of a mixture as one dense layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.ops import is_tap, op_name
from passes._paths import free_path, scope_beside
from passes.moe._dense import Matrices, insert_dense
from passes.moe._lift.decide import lift, lifted_first, touched
from passes.moe._merge.align import need_scipy
from passes.moe._merge.decide import join, use_of
from passes.moe._merge.insert import merged
from passes.moe._routing import (
    Call,
    Mixture,
    choice_of,
    find_mixtures,
    refuse_quantized,
    scores_of,
    sum_of,
)
from passes.moe.merge_experts import Group
from passes.moe.to_dense import Densified, ToDenseDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.nn import Experts
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.moe._use import Use
    from passes.moe.to_dense import ToDenseOptions

__all__ = ["check_dense", "decide", "insert"]


def decide(program: Program, options: ToDenseOptions, context: Context) -> ToDenseDecision:
    """Return the decision of `moe.to_dense`."""
    program, first = lifted_first(program)
    mixtures = find_mixtures(program, options)
    refuse_quantized(mixtures, "made dense")
    if options.how == "merge" and options.align != "none":
        need_scipy("moe.to_dense")
    if not options.needs_data:
        for mixture in mixtures:
            _check_sums(mixture)
    known = options.needs_data and not context.planning
    use = use_of(program, mixtures, options, context) if known else {}
    taken = {name for name, _ in program.module.named_modules()}
    layers: list[Densified] = []
    arrays: dict[str, Tensor] = {}
    for mixture in mixtures:
        path = free_path(f"{mixture.path}_dense", taken)
        taken.add(path)
        own = use.get(mixture.path)
        if options.how == "concat":
            layers.append(_concatenated(mixture, path, own))
        elif context.planning:
            layers.append(_entry(mixture, path, {i: 1.0 for i in range(_count(mixture))}, 1))
        else:
            entry, arrays[mixture.path] = _mean(mixture, path, options, own)
            layers.append(entry)
    pending = (f"{len(layers)} layers: known after a run",) if context.planning else ()
    return ToDenseDecision(
        how=options.how,
        layers=tuple(layers),
        lifted=touched(first, (each.path for each in mixtures)),
        declined=first.declined,
        arrays=arrays,
        pending=pending,
    )


def _count(mixture: Mixture) -> int:
    return mixture.experts.experts


def _mean(
    mixture: Mixture, path: str, options: ToDenseOptions, use: Use | None
) -> tuple[Densified, Tensor]:
    (group,), order = join(mixture, [list(range(_count(mixture)))], options, use)
    total = 1.0 if use is None else float(use.mass.sum()) / max(use.tokens, 1)
    error = group.distance
    if use is not None and error is not None:
        error = max(error, use.sums[1] - use.sums[0])
    pairs = zip(group.experts, group.shares, strict=True)
    factors = {expert: share * total for expert, share in pairs}
    return _entry(mixture, path, factors, 1, error), order


def _concatenated(mixture: Mixture, path: str, use: Use | None) -> Densified:
    count = _count(mixture)
    if use is None:
        return _entry(mixture, path, {each: 1 / count for each in range(count)}, count)
    means = use.means.tolist()
    factors = {expert: mean for expert, mean in enumerate(means) if mean}
    error = float((use.spread[1] - use.spread[0]).max())
    return _entry(mixture, path, factors, len(factors), error)


def _entry(
    mixture: Mixture,
    path: str,
    factors: dict[int, float],
    wide: int,
    error: float | None = None,
) -> Densified:
    """Return the layer of these experts; it is `wide` times as wide as an expert."""
    experts = mixture.experts
    own = {name: p.numel() // experts.experts for name, p in experts.named_parameters()}
    bias = own.get("down_bias", 0)
    return Densified(
        path=mixture.path,
        dense=path,
        experts=tuple(factors),
        factors=tuple(factors.values()),
        hidden=wide * experts.hidden,
        before=sum(own.values()) * experts.experts,
        after=wide * (sum(own.values()) - bias) + bias,
        error=error,
    )


def _check_sums(mixture: Mixture) -> None:
    """Check that the graph makes a token's weights sum to 1.

    Raises:
        UsageError: It does not.
    """
    for call in mixture.calls:
        if sum_of(call.weights) is None and not _is_whole(call):
            raise UsageError(
                f"what the weights of {mixture.path} sum to is not known",
                reason="the graph does not divide them by their sum",
                hint="count on data: `weighting: usage`",
                where=mixture.path,
            )


def _is_whole(call: Call) -> bool:
    """Whether weights are a softmax over just the chosen experts."""
    return op_name(call.weights) == "softmax" and choice_of(call.weights) is not None


def insert(rewriter: GraphRewriter, decision: ToDenseDecision) -> None:
    """Let every call of these experts be one of a dense layer."""
    lift(rewriter, decision.lifted)
    wanted = {each.path: each for each in decision.layers}
    for mixture in find_mixtures(rewriter.program):
        entry = wanted.get(mixture.path)
        if entry is None:
            continue
        experts = mixture.experts
        order = decision.arrays.get(entry.path)
        layer: Matrices | None = (
            _side_by_side(experts, entry)
            if decision.how == "concat"
            else _one(experts, entry, order)
        )
        for call in mixture.calls:
            made = insert_dense(
                rewriter,
                entry.dense,
                layer,
                call.x,
                experts.activation,
                gated=experts.gated,
                limit=experts.limit,
                dropout=experts.dropout,
                trainable=experts.up.requires_grad,
                before=call.node,
                scope=scope_beside(call.node),
            )
            layer = None
            rewriter.replace_uses(call.node, made)
            _untap(rewriter, call)


def _untap(rewriter: GraphRewriter, call: Call) -> None:
    """Remove taps on the logits of a router that nothing else reads any more."""
    choice = choice_of(call.indices)
    for node in () if choice is None else list(scores_of(choice).users):
        if is_tap(node):
            rewriter.replace_uses(node, node.all_input_nodes[0])
            rewriter.remove(node)


def _one(experts: Experts, entry: Densified, order: Any) -> Matrices:
    """Return the weighted mean of the experts, times the sum of their factors."""
    total = sum(entry.factors)
    shares = tuple(factor / total for factor in entry.factors)
    made = merged(experts, [Group(experts=entry.experts, shares=shares)], order)
    tensors = {name: tensor[0] for name, tensor in made.items()}
    if abs(total - 1) > 1e-6:
        for name in ("down", "down_bias"):
            if name in tensors:
                tensors[name] = tensors[name] * total
    return Matrices(**tensors)


def _side_by_side(experts: Experts, entry: Densified) -> Matrices:
    """Return all experts as one, each times its factor."""
    chosen = list(entry.experts)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()[chosen].flatten(0, 1)

    down = experts.down.detach()[chosen]
    factors = torch.tensor(entry.factors, dtype=down.dtype, device=down.device)
    bias = None
    if experts.down_bias is not None:
        bias = (experts.down_bias.detach()[chosen] * factors[:, None]).sum(0)
    up = rows(experts.up)
    assert up is not None, "experts have values"
    return Matrices(
        up=up,
        down=(down * factors[:, None, None]).movedim(0, 1).flatten(1),
        gate=rows(experts.gate),
        gate_bias=rows(experts.gate_bias),
        up_bias=rows(experts.up_bias),
        down_bias=bias,
    )


def check_dense(after: Program, decision: ToDenseDecision) -> None:
    """Check that none of the experts is left.

    Raises:
        PassError: Some are.
    """
    gone = {each.path for each in decision.layers}
    left: list[fx.Node] = [
        node for node in after.nodes if op_name(node) == "experts" and str(node.target) in gone
    ]
    if left:
        raise PassError(f"{left[0].target} is left", where=str(left[0].target))
