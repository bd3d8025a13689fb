"""Decide where early exits go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.analysis.cost import cost
from fxcompress.errors import UsageError
from fxcompress.ir._types import same_type
from fxcompress.ir.naming import node_ids
from fxcompress.ir.text import type_text
from fxcompress.ir.walk import upstream
from fxcompress.rewrite import early_exits
from passes.depth._blocks import Region, ends, find_regions
from passes.depth._exits.head import Head, answer_of, downstream, head_of
from passes.depth.early_exit import EarlyExitDecision, ExitPlace

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.depth.early_exit import EarlyExitOptions

__all__ = ["decide_exits"]


def decide_exits(program: Program, options: EarlyExitOptions) -> EarlyExitDecision:
    """Return the decision of `depth.early_exit`."""
    if known := early_exits(program):
        raise UsageError(
            "the model has early exits already",
            reason=f"there are {', '.join(each.name for each in known)}",
            hint="add all of them in one step",
        )
    regions = find_regions(program, options.blocks)
    places = sorted(options.after) or _spaced(options.count or 1, len(regions))
    states = [_state(regions, place) for place in places]
    if regions[-1].refusal:
        last = regions[-1]
        raise UsageError(
            "the last block makes no state that a head could read",
            reason=last.refusal,
            where=last.path,
        )
    final, answer = ends(regions[-1])[1], answer_of(program)
    head = None
    if options.head == "linear":
        for state in states:
            _check_linear(program, state, answer)
    else:
        head = head_of(program, final)
        for place, state in zip(places, states, strict=True):
            _check_read(program, head, state, regions[place].path)
    ids = node_ids(program)
    shares = _shares(program, states, head, answer)
    return EarlyExitDecision(
        exits=tuple(
            ExitPlace(
                name=f"exit_{index}",
                block=place,
                path=regions[place].path,
                state=ids[state],
                share=share,
            )
            for index, (place, state, share) in enumerate(zip(places, states, shares, strict=True))
        ),
        head=options.head,
        last=ids[final],
        output=ids[answer],
    )


def _spaced(count: int, blocks: int) -> list[int]:
    """Return `count` places that part the blocks into runs as equal as can be."""
    if count >= blocks:
        raise UsageError(
            f"{count} exits do not fit between {blocks} blocks",
            reason="the last block is followed by the model's own head",
            hint=f"ask for at most {blocks - 1}",
        )
    return [(index + 1) * blocks // (count + 1) - 1 for index in range(count)]


def _state(regions: Sequence[Region], place: int) -> fx.Node:
    """Return what a block makes."""
    if place >= len(regions):
        raise UsageError(
            f"there is no block {place}",
            reason=f"the model has {len(regions)} blocks, {regions[0].path} being block 0",
        )
    region = regions[place]
    if place == len(regions) - 1:
        raise UsageError(
            f"an exit after block {place} is none",
            reason="it is the last block, and the model's own head follows it",
            hint="leave it out",
            where=region.path,
        )
    if region.refusal:
        raise UsageError(
            f"block {place} cannot have an exit", reason=region.refusal, where=region.path
        )
    return ends(region)[1]


def _check_read(program: Program, head: Head, state: fx.Node, path: str) -> None:
    """Check that the model's own head can read a state.

    Raises:
        UsageError: The types differ, or it reads something that is computed later.
    """
    mine, its = state.meta["val"], head.state.meta["val"]
    if not same_type(mine, its):
        raise UsageError(
            "the model's own head cannot read the state of this block",
            reason=f"it is {type_text(mine, program)}, and the head reads "
            f"{type_text(its, program)}",
            hint="use `head: linear`",
            where=path,
        )
    later = downstream(state)
    inside = {head.state, *head.nodes}
    ids = node_ids(program)
    for node in head.nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand in later:
                raise UsageError(
                    "the model's own head reads more than the last state",
                    reason=f"{ids[node]} reads {ids[operand]}, which is computed after this block",
                    hint="use `head: linear`",
                    where=path,
                )


def _check_linear(program: Program, state: fx.Node, answer: fx.Node) -> None:
    """Check that a mean and a linear layer make what the model answers of a state.

    Raises:
        UsageError: They do not.
    """
    given, wanted = state.meta["val"], answer.meta["val"]
    classes = isinstance(wanted.shape[-1], int) and wanted.is_floating_point()
    pooled = wanted.dim() == 2 and given.dim() in (2, 3, 4)
    tokens = wanted.dim() == 3 and given.dim() == 3
    # The mean is over places, so samples must come first, as they do in the answer.
    first = str(given.shape[0]) == str(wanted.shape[0])
    if not classes or not first or not (pooled or tokens) or not isinstance(_width(given), int):
        raise UsageError(
            "a linear head cannot make what the model answers",
            reason=f"the answer is {type_text(wanted, program)}, the state "
            f"{type_text(given, program)}",
            hint="use `head: copy`",
            where=node_ids(program)[state],
        )


def _width(state: torch.Tensor) -> object:
    return state.shape[1] if state.dim() == 4 else state.shape[-1]


def _shares(
    program: Program, states: Sequence[fx.Node], head: Head | None, answer: fx.Node
) -> list[float]:
    """Return the share of the multiply-accumulates of a sample that stops at each exit."""
    ids = node_ids(program)
    macs = {each.id: each.macs for each in cost(program).per_node}

    def total(nodes: set[fx.Node]) -> int:
        return sum(macs.get(ids[node], 0) for node in nodes)

    whole = max(total({answer, *upstream(answer)}), 1)
    own = total(set(head.nodes)) if head is not None else 0
    found = []
    for index, state in enumerate(states, start=1):
        linear = int(_width(state.meta["val"])) * int(answer.meta["val"].shape[-1])  # type: ignore[call-overload]
        heads = index * (own if head is not None else linear)
        found.append((total({state, *upstream(state)}) + heads) / whole)
    return found
