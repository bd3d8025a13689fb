"""Which feed-forward layers become experts, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, fx

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.pipeline.selectors import Selector
from passes.moe._upcycle.find import FeedForward, find_feed_forwards
from passes.moe.upcycle import Recipe, Upcycled, UpcycleDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.moe.upcycle import UpcycleOptions

__all__ = ["decide"]


def decide(program: Program, options: UpcycleOptions, context: Context) -> UpcycleDecision:
    """Return the decision of `moe.upcycle`."""
    ids = node_ids(program)
    found, declined = find_feed_forwards(program)
    if not found:
        near = "; ".join(f"{each.node}: {each.reason}" for each in declined[:3])
        raise SelectorError(
            "there is no dense feed-forward layer",
            reason=near or "no linear layer reads an activation of another, back to its width",
        )
    groups = _by_tensors(found)
    chosen = set(Selector.of(options).select(program, [each.down for each in found]))
    if options.layers is not None:
        chosen &= {call.down for place in options.layers for call in _at(groups, place, ids)}
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.model_fields})
    state = program.state()
    layers = []
    for index, calls in enumerate(groups):
        picked = [call for call in calls if call.down in chosen]
        if picked:
            _check(picked, recipe, state, ids)
            layers.append(_entry(index, picked, recipe, state, ids))
    if not layers:
        raise SelectorError(
            "nothing is selected", reason="`layers` and `targets` have no layer in common"
        )
    return UpcycleDecision(
        recipe=recipe, layers=tuple(layers), seed=context.seed, declined=tuple(declined)
    )


def _by_tensors(found: Sequence[FeedForward]) -> list[list[FeedForward]]:
    """Return the calls of each layer, layers in graph order."""
    groups: dict[tuple[object, ...], list[FeedForward]] = {}
    for each in found:
        groups.setdefault(each.tensors, []).append(each)
    return list(groups.values())


def _at(
    groups: Sequence[list[FeedForward]], place: int, ids: Mapping[fx.Node, str]
) -> list[FeedForward]:
    if place >= len(groups):
        first = ids[groups[0][0].down]
        raise UsageError(
            f"there is no feed-forward layer {place}",
            reason=f"the model has {len(groups)}, {first} being that of layer 0",
        )
    return groups[place]


def _check(
    calls: Sequence[FeedForward],
    recipe: Recipe,
    state: Mapping[str, Tensor],
    ids: Mapping[fx.Node, str],
) -> None:
    where = ids[calls[0].down]
    hidden = calls[0].last.matrix(state).shape[1]
    if hidden % recipe.slices:
        raise UsageError(
            f"a hidden width of {hidden} cannot be cut into {recipe.slices} equal slices",
            hint=f"take a divisor of {hidden}, or exclude the layer",
            where=where,
        )
    if recipe.capacity is None:
        return
    for call in calls:
        dims = call.entry.meta["val"].dim()
        if dims not in (2, 3):
            raise UsageError(
                "a capacity counts the tokens of a sequence",
                reason=f"the layer reads a tensor of {dims} dimensions, not [batch, seq, width] or "
                "[tokens, width]",
                hint="leave `capacity` out, or exclude the layer",
                where=where,
            )


def _entry(
    index: int,
    calls: Sequence[FeedForward],
    recipe: Recipe,
    state: Mapping[str, Tensor],
    ids: Mapping[fx.Node, str],
) -> Upcycled:
    call = calls[0]
    layers = [each for each in (call.gate, call.up) if each is not None]
    width, hidden = call.last.matrix(state).shape
    size = hidden // recipe.slices
    inner = sum(1 for each in layers if each.bias is not None)
    one = (len(layers) + 1) * size * width + inner * size
    bias = width if call.last.bias is not None else 0
    shared = recipe.shared * one + (bias if recipe.shared else 0)
    each_expert = one + (0 if recipe.shared else bias)
    router = recipe.experts * width
    return Upcycled(
        index=index,
        path=call.path,
        nodes=tuple(ids[each.down] for each in calls),
        hidden=hidden,
        activation=call.activation,
        gated=call.gate is not None,
        dropout=call.dropout,
        parameters=(
            recipe.slices * one + bias,
            shared + router + recipe.experts * each_expert,
        ),
        active=shared + router + recipe.top_k * each_expert,
    )
