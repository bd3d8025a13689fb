"""Decide which blocks stay, what is narrower and what is shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fxcompress.axes import analyze
from fxcompress.errors import SelectorError, UsageError
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes.depth._blocks import Region, find_regions
from passes.depth._share import check_alike
from passes.depth.skip_blocks import SkipBlocks, SkipBlocksOptions
from passes.distill._student.other import other_model
from passes.distill._student.rewrite import rewrite
from passes.distill.student import Layer, StudentDecision
from passes.prune._criteria.options import Criterion
from passes.prune.channels import Channels, ChannelsDecision, ChannelsOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.distill.student import StudentOptions

__all__ = ["decide", "parameters_of"]


def decide(program: Program, options: StudentOptions, context: Context) -> StudentDecision:
    """Return the decision of `distill.student`."""
    if options.model is not None:
        decision = other_model(program, options.model, context)
    else:
        decision = _derived(program, options, context)
    rewriter = GraphRewriter(program)
    rewrite(rewriter, decision)
    counts = {"before": parameters_of(program), "after": parameters_of(rewriter.finish())}
    return decision.model_copy(update=counts)


def parameters_of(program: Program) -> int:
    """Return how many parameters a Program has, shared ones once."""
    return sum(parameter.numel() for parameter in program.module.parameters())


def _derived(program: Program, options: StudentOptions, context: Context) -> StudentDecision:
    found: dict[str, Any] = {"shared": options.shared}
    declined: list[Declined] = []
    if options.layers or options.every or options.share is not None or options.blocks:
        regions = find_regions(program, options.blocks)
        places = _places(options, regions)
        layers = _layers(options, regions, places)
        groups = StudentDecision(layers=layers).groups
        check_alike(program, groups, {region.path: region for region in regions})
        found["layers"] = layers
        if len(places) < len(regions):
            skipped = tuple(i for i in range(len(regions)) if i not in places)
            skip = SkipBlocksOptions.model_validate({"layers": skipped, "blocks": options.blocks})
            skipping = SkipBlocks().decide(program, skip, context)
            declined += skipping.declined
            found["skip"] = skipping.model_dump(mode="json")
    arrays: dict[str, Any] = {}
    if options.width is not None:
        channels, widths = _narrowed(program, options, context)
        arrays = channels.arrays
        declined += channels.declined
        found |= {"channels": channels.model_dump(mode="json"), "widths": widths}
        found["pending"] = channels.pending
    return StudentDecision(**found, declined=tuple(declined), arrays=arrays)


def _places(options: StudentOptions, regions: list[Region]) -> list[int]:
    """Return which blocks stay.

    Raises:
        UsageError: There is no such block.
    """
    if not options.layers:
        return list(range(0, len(regions), options.every or 1))
    if options.layers[-1] >= len(regions):
        raise UsageError(
            f"there is no layer {options.layers[-1]}",
            reason=f"the model has {len(regions)}, from {regions[0].path} to {regions[-1].path}",
        )
    return list(options.layers)


def _layers(options: StudentOptions, regions: list[Region], places: list[int]) -> tuple[Layer, ...]:
    """Return the student's layers, each with the one whose tensors it uses.

    Raises:
        UsageError: A group names a layer that the student has not.
    """
    shares = {new: new for new in range(len(places))}
    groups: tuple[tuple[int, ...], ...] = ()
    if isinstance(options.share, int):
        size = options.share
        groups = tuple(
            tuple(range(start, min(start + size, len(places))))
            for start in range(0, len(places), size)
        )
    elif options.share is not None:
        groups = options.share
    for group in groups:
        for new in group:
            if new not in shares:
                raise UsageError(
                    f"there is no layer {new} to share",
                    reason=f"the student has {len(places)} layers",
                )
            shares[new] = min(group)
    return tuple(
        Layer(path=regions[old].path, old=old, new=new, shares=shares[new])
        for new, old in enumerate(places)
    )


def _narrowed(
    program: Program, options: StudentOptions, context: Context
) -> tuple[ChannelsDecision, tuple[str, ...]]:
    """Return the axes that shrink and the indices that stay, and what is said of them.

    Raises:
        SelectorError: There is no axis of a kind.
    """
    width = options.width
    by_kinds: dict[tuple[str, ...], float | None]
    if isinstance(width, dict):
        by_kinds = {(kind,): part for kind, part in width.items()}
    else:
        by_kinds = {_usual(program): width}
    joined: ChannelsDecision | None = None
    for kinds, part in by_kinds.items():
        raw = {
            "ratio": 1.0 - (part or 0.0),
            "kinds": kinds,
            "max_ratio": 1.0,
            "exclude": options.exclude,
            "criterion": Criterion(),
        }
        decision = Channels().decide(program, ChannelsOptions.model_validate(raw), context)
        joined = decision if joined is None else _joined(joined, decision)
    assert joined is not None
    if not any(axis.kept < axis.size for axis in joined.axes):
        raise SelectorError(
            "the width makes no axis narrower",
            reason="; ".join(f"{each.node}: {each.reason}" for each in joined.declined[:3]),
            hint="`fxcompress explain axes` says which axes there are",
        )
    if options.indices == "first":
        first = {
            f"keep/{axis.name}": np.arange(axis.kept, dtype=np.int64)
            for axis in joined.axes
            if f"keep/{axis.name}" in joined.arrays
        }
        axes = tuple(axis.model_copy(update={"lost": None}) for axis in joined.axes)
        joined = joined.model_copy(
            update={"arrays": {**joined.arrays, **first}, "axes": axes, "pending": ()}
        )
    return joined, joined.summary()


def _usual(program: Program) -> tuple[str, ...]:
    """Return the kinds that a narrower model has less of: heads as they are, but fewer."""
    present = {axis.kind for axis in analyze(program).axes}
    heads = "kv_group" if "kv_group" in present else "head"
    wanted = ("residual", "embedding", "channel", "neuron", heads)
    return tuple(kind for kind in wanted if kind in present)


def _joined(one: ChannelsDecision, other: ChannelsDecision) -> ChannelsDecision:
    known = {axis.name for axis in one.axes}
    return one.model_copy(
        update={
            "axes": (*one.axes, *(axis for axis in other.axes if axis.name not in known)),
            "arrays": {**other.arrays, **one.arrays},
            "declined": tuple(dict.fromkeys((*one.declined, *other.declined))),
        }
    )
