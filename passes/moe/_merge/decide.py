"""Group the experts of each mixture, weigh them, and match their hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import UsageError
from passes.moe._lift.decide import lifted_first, touched
from passes.moe._merge.align import distance, hidden_values, match_units, need_scipy, units
from passes.moe._merge.groups import led, linked
from passes.moe._routing import Mixture, find_mixtures, refuse_quantized
from passes.moe._use import Use, measure
from passes.moe.merge_experts import Group, Merged, MergeExpertsDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.nn import Experts
    from fxcompress.pipeline.context import Context
    from passes.moe.merge_experts import MergeExpertsOptions, Merging

__all__ = ["decide", "join", "use_of"]


def decide(
    program: Program, options: MergeExpertsOptions, context: Context
) -> MergeExpertsDecision:
    """Return the decision of `moe.merge_experts`."""
    program, first = lifted_first(program)
    mixtures = find_mixtures(program, options)
    refuse_quantized(mixtures, "merged")
    lifted = touched(first, (each.path for each in mixtures))
    counts = [_count(each, options) for each in mixtures]
    by_weights = not options.groups and options.similarity == "weights"
    if options.align != "none" or by_weights:
        need_scipy("moe.merge_experts")
    if context.planning:
        merged = [
            _planned(mixture, count, options)
            for mixture, count in zip(mixtures, counts, strict=True)
        ]
        what = "which become one" if not options.groups else "how alike they are"
        pending = (f"experts of {len(mixtures)} mixtures: known after a run, {what}",)
        return MergeExpertsDecision(
            mixtures=tuple(merged), lifted=lifted, declined=first.declined, pending=pending
        )
    use = use_of(program, mixtures, options, context) if options.needs_data else {}
    found: list[Merged] = []
    arrays: dict[str, Tensor] = {}
    for mixture, count in zip(mixtures, counts, strict=True):
        own = use.get(mixture.path)
        groups = _groups(mixture, count, options, own)
        entries, order = join(mixture, groups, options, own)
        arrays[mixture.path] = order
        found.append(
            Merged(
                path=mixture.path,
                before=mixture.experts.experts,
                groups=entries,
                usage=() if own is None else tuple(own.shares.tolist()),
            )
        )
    return MergeExpertsDecision(
        mixtures=tuple(found), lifted=lifted, declined=first.declined, arrays=arrays
    )


def use_of(
    program: Program, mixtures: Sequence[Mixture], options: Merging, context: Context
) -> dict[str, Use]:
    """Return how experts are used on calibration data, with tokens where these are compared."""
    return measure(
        program,
        mixtures,
        context.samples("calibration", options.calibration),
        inputs=options.tokens if options.align == "activations" else 0,
    )


def join(
    mixture: Mixture, groups: Sequence[Sequence[int]], options: Merging, use: Use | None
) -> tuple[tuple[Group, ...], Tensor]:
    """Return the groups with what each expert counts, and the order of its hidden units.

    Returns:
        The groups, and `[experts, hidden]`: the unit that stands in each place.
    """
    experts, path = mixture.experts, mixture.path
    order = torch.arange(experts.hidden).repeat(experts.experts, 1)
    weight = _weight(options, use, experts.experts)
    entries = []
    for members in groups:
        leader = max(members, key=lambda each: (float(weight[each]), -each))
        group = [leader, *(each for each in members if each != leader)]
        rows = (
            {each: _rows(experts, each, options, use) for each in group} if len(group) > 1 else {}
        )
        for expert in group[1:]:
            if options.align != "none":
                order[expert] = match_units(rows[leader], rows[expert], path)
        total = float(weight[group].sum())
        shares = [float(weight[each]) / total if total else 1 / len(group) for each in group]
        apart = [distance(experts, leader, each, order[each]) for each in group[1:]]
        entries.append(
            Group(experts=tuple(group), shares=tuple(shares), distance=max(apart, default=0.0))
        )
    return tuple(entries), order


def _rows(experts: Experts, expert: int, options: Merging, use: Use | None) -> Tensor:
    """Return what hidden units are matched by."""
    if options.align != "activations":
        return units(experts, expert)
    assert use is not None, "activations are compared on data"
    with torch.no_grad():
        return hidden_values(experts, expert, torch.cat(use.inputs))


def _weight(options: Merging, use: Use | None, count: int) -> Tensor:
    if options.weighting == "uniform" or use is None:
        return torch.ones(count, dtype=torch.float64)
    return use.counts if options.weighting == "usage" else use.mass


def _groups(
    mixture: Mixture, count: int, options: MergeExpertsOptions, use: Use | None
) -> list[list[int]]:
    experts = mixture.experts
    if options.groups:
        return _given(options.groups, experts.experts)
    if count == experts.experts:
        return [[each] for each in range(count)]
    similarity = None
    if options.similarity == "router_logits":
        assert use is not None, "scores are read from data"
        similarity = use.similarity()
        if similarity is None:
            raise UsageError(
                f"there are no scores of the experts of {mixture.path}",
                reason="no top-k over as many numbers as there are experts chooses them",
                hint="say `similarity: weights`, or give `groups`",
                where=mixture.path,
            )
    else:
        similarity = _alike(experts, mixture.path)
    if options.weighting == "uniform" or use is None:
        return linked(similarity, count)
    return led(similarity, _weight(options, use, experts.experts), count)


def _alike(experts: Experts, path: str) -> Tensor:
    """Return the cosine of each two experts' weights, hidden units matched to the first's."""
    first = units(experts, 0)
    rows = [first.flatten()]
    for expert in range(1, experts.experts):
        own = units(experts, expert)
        rows.append(own[match_units(first, own, path)].flatten())
    matrix = F.normalize(torch.stack(rows).double(), dim=1)
    return matrix @ matrix.T


def _given(groups: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    taken = {each for group in groups for each in group}
    return sorted([*map(sorted, groups), *([each] for each in range(count) if each not in taken)])


def _count(mixture: Mixture, options: MergeExpertsOptions) -> int:
    """Return how many experts of a mixture are left.

    Raises:
        UsageError: There are not so many, or a ratio merges none.
    """
    there = mixture.experts.experts
    refused = f"the experts of {mixture.path} cannot be merged so"
    most = max((each for group in options.groups for each in group), default=0)
    if most >= there:
        raise UsageError(
            refused,
            reason=f"there is no expert {most}: there are {there}",
            hint=f"give numbers from 0 to {there - 1}",
            where=mixture.path,
        )
    if options.groups:
        return there - sum(len(group) - 1 for group in options.groups)
    if options.ratio is not None:
        gone = int(options.ratio * there)
        if not gone:
            raise UsageError(
                refused,
                reason=f"a ratio of {options.ratio} of {there} experts is none",
                hint=f"give at least {1 / there:.3f}",
                where=mixture.path,
            )
        return there - gone
    assert options.experts is not None, "one of three is given"
    if options.experts > there:
        raise UsageError(
            refused,
            reason=f"{options.experts} are to be left of {there}",
            hint=f"give at most {there}",
            where=mixture.path,
        )
    return options.experts


def _planned(mixture: Mixture, count: int, options: MergeExpertsOptions) -> Merged:
    """Return groups of the right number: which they are is known after a run."""
    there = mixture.experts.experts
    if options.groups:
        groups = _given(options.groups, there)
    else:
        groups = [[each] for each in range(count - 1)] + [list(range(count - 1, there))]
    entries = (
        Group(experts=tuple(group), shares=tuple(1 / len(group) for _ in group)) for group in groups
    )
    return Merged(path=mixture.path, before=there, groups=tuple(entries))
