"""Choose the experts that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.rewrite.edits import Declined
from passes.moe._lift.decide import lifted_first, touched
from passes.moe._lift.miss import Miss
from passes.moe._lift.products import find_products
from passes.moe._prune.cut import cut
from passes.moe._prune.router import Router, check_follows, check_private, router_of
from passes.moe._prune.scores import ablated, measured, random
from passes.moe._routing import Mixture, find_mixtures
from passes.moe.prune_experts import Pruned, PruneExpertsDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.moe.prune_experts import PruneExpertsOptions

__all__ = ["choose"]

_NAMES = {
    "reap": "weights times norms of outputs", "frequency": "how often each is chosen",
    "mass": "the sums of weights", "metric": "the metric without each",
}  # fmt: skip


def choose(
    program: Program, options: PruneExpertsOptions, context: Context
) -> PruneExpertsDecision:
    """Return the decision of `moe.prune_experts`."""
    program, lifted = lifted_first(program)
    mixtures = find_mixtures(program, options)
    declined = list(lifted.declined)
    routers: dict[str, Router] = {}
    for mixture in mixtures:
        try:
            routers[mixture.path] = _router(program, mixture)
        except Miss as miss:
            declined.append(_declined(program, mixture, miss))
    mixtures = [each for each in mixtures if each.path in routers]
    numbers = _numbers(mixtures, routers, options)
    pending: tuple[str, ...] = ()
    scores: list[Tensor] = []
    if options.experts:
        kept = _listed(mixtures, routers, options.experts)
    elif context.planning and options.needs_data:
        # Experts of a mixture are alike in cost, so that the first ones show what will be saved.
        scores = [-torch.arange(each.experts.experts).double() for each in mixtures]
        kept = _best(mixtures, routers, scores, numbers, "layer")
        scores = []
        pending = (f"which experts: known after measuring {_NAMES[options.criterion]}",)
    else:
        scores = _scores(program, mixtures, routers, options, context)
        kept = _best(mixtures, routers, scores, numbers, options.scope)
    for mixture, each in zip(mixtures, kept, strict=True):
        _check(routers[mixture.path], each, mixture.path)
    return PruneExpertsDecision(
        mixtures=tuple(
            Pruned(
                path=mixture.path,
                before=mixture.experts.experts,
                kept=tuple(each),
                scores=tuple(scores[place].tolist()) if scores else (),
            )
            for place, (mixture, each) in enumerate(zip(mixtures, kept, strict=True))
        ),
        lifted=touched(lifted, (each.path for each in mixtures)),
        declined=tuple(declined),
        pending=pending,
    )


def _router(program: Program, mixture: Mixture) -> Router:
    """Return the router of a mixture; of several calls the first one's, all of them checked."""
    products = find_products(program)
    found = [router_of(call, mixture.experts.experts, products) for call in mixture.calls]
    check_private(program, found)
    return found[0]


def _declined(program: Program, mixture: Mixture, miss: Miss) -> Declined:
    ids: Mapping[fx.Node, str] = node_ids(program)
    because_of = tuple(ids[node] for node in miss.nodes)
    return Declined(node=mixture.path, reason=miss.reason, because_of=because_of)


def _numbers(
    mixtures: Sequence[Mixture], routers: Mapping[str, Router], options: PruneExpertsOptions
) -> list[int]:
    """Return how many experts of each mixture go, on average where the scope is global.

    Raises:
        UsageError: None would, too few would be left, or groups would differ.
    """
    if options.experts:
        return []
    found = []
    for mixture in mixtures:
        router = routers[mixture.path]
        count = options.count or int((options.ratio or 0) * router.count + 1e-9)
        if not count:
            raise UsageError(
                f"no expert of {mixture.path} would go",
                reason=f"a ratio of {options.ratio} of {router.count} experts is none",
                hint=f"give at least {1 / router.count:.3f}",
                where=mixture.path,
            )
        _check_enough(router, router.count - count, mixture.path)
        if router.groups > 1 and (count % router.groups or options.scope == "global"):
            raise UsageError(
                f"{count} experts of {mixture.path} cannot go",
                reason=f"its router chooses among {router.groups} groups of equal size",
                hint=f"take `scope: layer` and a multiple of {router.groups}",
                where=mixture.path,
            )
        found.append(count)
    return found


def _check_enough(router: Router, left: int, path: str) -> None:
    if left < router.k:
        raise UsageError(
            f"top_k {router.k} is above the number of experts left {left}",
            reason=f"each token of {path} takes {router.k} of {router.count} experts",
            hint=f"keep at least {router.k}, or put `use: moe.change_top_k` with "
            f"`top_k: {max(left, 1)}` before",
            where=path,
        )


def _check(router: Router, kept: Sequence[int], path: str) -> None:
    """Check that a router can choose among what is kept as it would with the others at −∞.

    Raises:
        UsageError: It cannot.
    """
    _check_enough(router, len(kept), path)
    try:
        check_follows(router, kept)
    except Miss as miss:
        raise UsageError(
            f"the router of {path} cannot choose among {len(kept)} of {router.count} experts",
            reason=miss.reason,
            hint="let fewer go, or exclude it",
            where=path,
        ) from miss


def _listed(
    mixtures: Sequence[Mixture], routers: Mapping[str, Router], lists: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return what is kept where lists say what goes.

    Raises:
        UsageError: There are not as many lists as mixtures, an expert is not there, or groups
            would differ.
    """
    if len(lists) not in (1, len(mixtures)):
        raise UsageError(
            f"{len(lists)} lists of experts do not fit {len(mixtures)} mixtures",
            hint="give one for each, in graph order, or one for all",
        )
    kept = []
    for place, mixture in enumerate(mixtures):
        gone = set(lists[place] if len(lists) > 1 else lists[0])
        router = routers[mixture.path]
        if max(gone, default=0) >= router.count:
            raise UsageError(
                f"there is no expert {max(gone)} in {mixture.path}",
                reason=f"there are {router.count}",
                hint=f"give numbers from 0 to {router.count - 1}",
                where=mixture.path,
            )
        size = router.count // router.groups
        groups = [sum(each // size == group for each in gone) for group in range(router.groups)]
        if len(set(groups)) > 1:
            raise UsageError(
                f"these experts of {mixture.path} cannot go",
                reason=f"its router chooses among {router.groups} groups of equal size, and they "
                f"would lose {', '.join(map(str, groups))}",
                hint="list as many of each group",
                where=mixture.path,
            )
        kept.append([each for each in range(router.count) if each not in gone])
    return kept


def _scores(
    program: Program,
    mixtures: Sequence[Mixture],
    routers: Mapping[str, Router],
    options: PruneExpertsOptions,
    context: Context,
) -> list[Tensor]:
    if options.criterion == "random":
        return random(mixtures, context.seed)
    if options.criterion != "metric":
        return measured(program, mixtures, options, context)
    for mixture in mixtures:
        router = routers[mixture.path]
        if router.groups > 1:
            raise UsageError(
                f"no expert of {mixture.path} can be left out alone",
                reason=f"its router chooses among {router.groups} groups of equal size",
                hint="take another criterion",
                where=mixture.path,
            )

    def without(rewriter: GraphRewriter, path: str, expert: int) -> None:
        count = routers[path].count
        kept = tuple(each for each in range(count) if each != expert)
        cut(rewriter, [Pruned(path=path, before=count, kept=kept)])

    return ablated(program, mixtures, options, context, without)


def _best(
    mixtures: Sequence[Mixture],
    routers: Mapping[str, Router],
    scores: Sequence[Tensor],
    numbers: Sequence[int],
    scope: str,
) -> list[list[int]]:
    """Return the experts of each mixture with the best scores; of equal ones the first."""
    if scope == "global":
        return _best_of_all(mixtures, routers, scores, sum(numbers))
    kept = []
    for mixture, each, number in zip(mixtures, scores, numbers, strict=True):
        router = routers[mixture.path]
        size, gone = router.count // router.groups, number // router.groups
        found: list[int] = []
        for group in range(router.groups):
            members = range(group * size, (group + 1) * size)
            found += sorted(members, key=lambda e: (-float(each[e]), e))[: size - gone]
        kept.append(sorted(found))
    return kept


def _best_of_all(
    mixtures: Sequence[Mixture],
    routers: Mapping[str, Router],
    scores: Sequence[Tensor],
    number: int,
) -> list[list[int]]:
    """Let those go whose share in their mixture's scores is least, as long as enough are left."""
    shares = [each / each.sum().clamp(min=1e-30) * len(each) for each in scores]
    order = sorted(
        (
            (float(share[e]), -e, place)
            for place, share in enumerate(shares)
            for e in range(len(share))
        )
    )
    kept = [set(range(len(share))) for share in shares]
    for _, negative, place in order:
        if number and len(kept[place]) > routers[mixtures[place].path].k:
            kept[place].discard(-negative)
            number -= 1
    return [sorted(each) for each in kept]
