"""Blocks that become one: which, and the weights of their sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.rewrite import GraphRewriter
from passes.depth._blocks import Region, ends, find_regions
from passes.depth._groups import at, check_untied
from passes.depth._share import check_alike, combine
from passes.depth._skip import skip
from passes.depth.merge_layers import Merge, MergeLayersDecision
from passes.depth.skip_blocks import Block

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.depth.merge_layers import MergeLayersOptions

__all__ = ["decide_merged", "merge"]


def decide_merged(
    program: Program, options: MergeLayersOptions, context: Context
) -> MergeLayersDecision:
    """Return the decision of `depth.merge_layers`."""
    regions = find_regions(program, options.blocks)
    if options.groups:
        for group in options.groups:
            _check(program, regions, group)
        merges = [_merged([*map(_alone, group)], options.formula) for group in options.groups]
        return _decision(program, regions, merges)
    if context.planning:
        last = range(max(0, len(regions) - options.size), len(regions))
        _check(program, regions, last)
        made = _decision(program, regions, [_merged([*map(_alone, last)], options.formula)])
        pending = ("which blocks: known after comparing outputs",)
        return made.model_copy(update={"pending": pending})
    return _by_similarity(program, regions, options, context)


def _check(program: Program, regions: Sequence[Region], places: Sequence[int]) -> None:
    """Check that blocks can become one.

    Raises:
        UsageError: They cannot.
    """
    blocks = [at(regions, place) for place in places]
    for region in blocks:
        if region.refusal:
            raise UsageError(
                f"{region.path} cannot be merged", reason=region.refusal, where=region.path
            )
    for one, other in pairwise(blocks):
        if ends(one)[1] is not ends(other)[0]:
            raise UsageError(
                f"{one.path} and {other.path} cannot be merged",
                reason=f"{other.path} does not read what {one.path} makes",
                where=other.path,
            )
    paths = [region.path for region in blocks]
    check_alike(program, [paths], {region.path: region for region in blocks})
    check_untied(program, [paths])


@dataclass(frozen=True)
class _Merged:
    """Blocks that become one: their places, and by what their tensors are multiplied."""

    places: tuple[int, ...]
    factors: tuple[float, ...]
    similarity: float | None = None


def _merged(parts: Sequence[_Merged], formula: str) -> _Merged:
    """Return blocks, some of which may be merged ones, as one."""
    count = len(parts)
    if formula == "mean":
        outer = [1.0 / count] * count
    else:
        # θ₁ + Σ (θ_k − θ₁), every difference to the same θ₁.
        outer = [2.0 - count, *[1.0] * (count - 1)]
    return _Merged(
        tuple(place for part in parts for place in part.places),
        tuple(f * inner for f, part in zip(outer, parts, strict=True) for inner in part.factors),
    )


def _alone(place: int) -> _Merged:
    return _Merged((place,), (1.0,))


def _decision(
    program: Program, regions: Sequence[Region], merges: Iterable[_Merged]
) -> MergeLayersDecision:
    ids = node_ids(program)
    every = sorted(merges, key=lambda each: each.places)
    blocks = []
    for place in (place for each in every for place in each.places[1:]):
        region = regions[place]
        entry, exit_ = ends(region)
        sizes = tuple(ids[node] for node in region.sizes)
        blocks.append(
            Block(
                index=place, path=region.path, entry=ids[entry], exit=ids[exit_], skip=True,
                sizes=sizes,
            )
        )  # fmt: skip
    return MergeLayersDecision(
        merges=tuple(
            Merge(
                paths=tuple(regions[place].path for place in each.places),
                factors=each.factors,
                similarity=each.similarity,
            )
            for each in every
        ),
        skipped=tuple(blocks),
    )


def merge(rewriter: GraphRewriter, decision: MergeLayersDecision) -> None:
    """Combine the tensors of merged blocks, and skip all but the first of each."""
    for each in decision.merges:
        combine(rewriter, each.paths, each.factors)
    skip(rewriter, decision.skipped)


@torch.no_grad()
def _by_similarity(
    program: Program, regions: Sequence[Region], options: MergeLayersOptions, context: Context
) -> MergeLayersDecision:
    """Merge from the last block backwards, as long as the outputs stay similar."""
    assert options.threshold is not None, "there are no groups"
    batches = list(context.samples("calibration", options.calibration))
    wanted = _outputs(program, batches)
    low, high = options.range or (0, len(regions) - 1)
    at(regions, high)
    # The blocks of the model as merged so far, from `low` to `high`.
    stack = [_alone(place) for place in range(low, high + 1)]
    best = -1.0
    start = len(stack) - options.size
    while start >= 0:
        context.progress("merging blocks", len(stack) - options.size - start + 1, len(stack))
        trial = _merged(stack[start : start + options.size], options.formula)
        _check(program, regions, trial.places)
        shorter = [*stack[:start], trial, *stack[start + options.size :]]
        rewriter = GraphRewriter(program)
        merge(rewriter, _decision(program, regions, _several(shorter)))
        path = regions[trial.places[0]].path
        found = _cosine(wanted, _outputs(rewriter.finish(), batches), path)
        best = max(best, found)
        if found > options.threshold:
            stack = [replace(each, similarity=found) if each is trial else each for each in shorter]
            start = min(start - options.interval, len(stack) - options.size)
        else:
            start -= 1
    if not _several(stack):
        raise UsageError(
            f"no merge keeps a cosine above {options.threshold:g}",
            reason=f"the best one has {best:.4f}",
            hint="lower the threshold, or merge fewer blocks at a time",
        )
    return _decision(program, regions, _several(stack))


def _several(stack: Iterable[_Merged]) -> list[_Merged]:
    return [each for each in stack if len(each.places) > 1]


def _outputs(program: Program, batches: Sequence[Any]) -> list[Tensor]:
    """Return the floating point outputs of a model for each batch, features last."""
    module = program.copy().module.eval()
    found = []
    for batch in batches:
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        found += [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return found


def _cosine(wanted: Sequence[Tensor], got: Sequence[Tensor], where: str) -> float:
    """Return the mean cosine of all rows of outputs."""
    rows = [
        torch.cosine_similarity(a.double(), b.double(), dim=-1).flatten()
        for a, b in zip(wanted, got, strict=True)
    ]
    value = float(torch.cat(rows).mean())
    if value != value:
        raise NumericsError(
            f"a NaN or an infinity in the outputs with {where} merged",
            hint="check the data and the weights",
            where=where,
        )
    return value
