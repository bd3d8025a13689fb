"""Choose the blocks to skip: by list, or by a criterion as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.analysis.cost import cost
from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes.depth._angular import distances
from passes.depth._blocks import Region, ends, find_regions
from passes.depth._scores import Scores, score
from passes.depth._skip import skip
from passes.depth.skip_blocks import Block, SkipBlocksDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.depth.skip_blocks import SkipBlocksOptions

__all__ = ["choose"]


def choose(program: Program, options: SkipBlocksOptions, context: Context) -> SkipBlocksDecision:
    """Return the decision of `depth.skip_blocks`."""
    ids = node_ids(program)
    regions = find_regions(program, options.blocks)
    legal = {index: region for index, region in enumerate(regions) if not region.refusal}
    scores: Scores = {}
    pending: tuple[str, ...] = ()
    if options.layers:
        _check_listed(options.layers, regions)
        skipped = set(options.layers)
    else:
        enough = _Enough(program, options, regions, legal)
        if context.planning:
            # Blocks of a stack are alike in cost, so that the last ones show what will be saved.
            skipped = enough.first(sorted(legal, reverse=True))
            which = "which block" if len(skipped) == 1 else f"which {len(skipped)} blocks"
            pending = (f"{which}: known after measuring {_NAMES[options.criterion]}",)
        elif options.criterion == "angular":
            skipped, scores = _run(program, legal, enough, options, context)
        elif options.iterative:
            skipped, scores = _one_after_another(program, legal, enough, options, context)
        else:
            scores = score(program, legal, options, context)
            skipped = enough.first(sorted(legal, key=lambda index: (scores[index], index)))
    blocks = [_block(index, region, ids) for index, region in legal.items()]
    return SkipBlocksDecision(
        blocks=tuple(
            each.model_copy(update={"score": scores.get(each.index), "skip": each.index in skipped})
            for each in blocks
        ),
        declined=_declined(regions, ids),
        pending=pending,
    )


_NAMES = {
    "block_influence": "block influence",
    "angular": "angular distances",
    "taylor": "gradients",
    "metric": "the metric",
    "random": "nothing: chance decides",
}


def _block(index: int, region: Region, ids: Mapping[fx.Node, str]) -> Block:
    entry, exit_ = ends(region)
    sizes = tuple(ids[node] for node in region.sizes)
    return Block(index=index, path=region.path, entry=ids[entry], exit=ids[exit_], sizes=sizes)


def _declined(regions: Iterable[Region], ids: Mapping[fx.Node, str]) -> tuple[Declined, ...]:
    return tuple(
        Declined(
            node=region.path,
            reason=region.refusal,
            because_of=tuple(ids[node] for node in region.because_of),
        )
        for region in regions
        if region.refusal
    )


def _check_listed(layers: tuple[int, ...], regions: list[Region]) -> None:
    for index in layers:
        if index >= len(regions):
            raise UsageError(
                f"there is no block {index}",
                reason=f"the model has {len(regions)} blocks, {regions[0].path} being block 0",
            )
        if regions[index].refusal:
            raise UsageError(
                f"block {index} cannot be skipped",
                reason=regions[index].refusal,
                where=regions[index].path,
            )


# -- how many ------------------------------------------------------------------------------------


class _Enough:
    """Whether blocks are as many as is asked for, or save as much.

    Raises:
        UsageError: All blocks that can be skipped are too few.
    """

    def __init__(
        self,
        program: Program,
        options: SkipBlocksOptions,
        regions: list[Region],
        legal: Mapping[int, Region],
    ) -> None:
        self.count: int | None = None
        self.over: dict[str, float] = {}
        self.saved: dict[str, dict[int, int]] = {}
        if options.budget is None:
            self.count = _count(options, regions, legal)
            return
        whole = cost(program)
        now = {"parameters": whole.parameters, "macs": whole.macs}
        nodes = {each.id: each for each in whole.per_node}
        ids = node_ids(program)
        for name, amount in options.budget.costs.items():
            self.over[name] = now[name] - amount.of(now[name])
            self.saved[name] = {
                index: sum(getattr(nodes[ids[n]], name) for n in region.nodes if ids[n] in nodes)
                for index, region in legal.items()
            }
            least = now[name] - sum(self.saved[name].values())
            if sum(self.saved[name].values()) < self.over[name]:
                raise UsageError(
                    f"{amount} of {name} cannot be met",
                    reason=f"without all {len(legal)} blocks that can be skipped there are "
                    f"{least:,} ({least / max(now[name], 1):.1%})",
                    hint=f"give at least {least}",
                )

    def __call__(self, chosen: Iterable[int]) -> bool:
        """Whether these blocks are enough."""
        picked = list(chosen)
        if self.count is not None:
            return len(picked) >= self.count
        return all(
            sum(self.saved[name][index] for index in picked) >= over
            for name, over in self.over.items()
        )

    def first(self, order: Sequence[int]) -> set[int]:
        """Return as many of these, in their order, as are enough."""
        return next(set(order[:n]) for n in range(len(order) + 1) if self(order[:n]))


def _count(options: SkipBlocksOptions, regions: list[Region], legal: Mapping[int, Region]) -> int:
    count = options.count
    if count is None:
        count = int((options.ratio or 0) * len(regions))
        if count == 0:
            raise UsageError(
                f"a ratio of {options.ratio} skips none of {len(regions)} blocks",
                hint=f"give at least {1 / len(regions):.3f}",
            )
    if count > len(legal):
        refused = [region for region in regions if region.refusal]
        raise UsageError(
            f"{count} blocks are to be skipped, and {len(legal)} can be",
            reason="; ".join(f"{each.path}: {each.refusal}" for each in refused[:3]),
        )
    return count


# -- which ---------------------------------------------------------------------------------------


def _one_after_another(
    program: Program,
    legal: Mapping[int, Region],
    enough: _Enough,
    options: SkipBlocksOptions,
    context: Context,
) -> tuple[set[int], Scores]:
    """Skip the least block, measure the others on what is left, and so on."""
    skipped: list[int] = []
    scores: Scores = {}
    now, left = program, dict(legal)
    while True:
        measured = score(now, left, options, context)
        scores.update(measured)
        least = min(left, key=lambda index: (measured[index], index))
        skipped.append(least)
        if enough(skipped):
            return set(skipped), scores
        rewriter = GraphRewriter(now)
        skip(rewriter, [_block(least, left[least], node_ids(now))])
        now = rewriter.finish()
        paths = {legal[index].path: index for index in legal if index not in skipped}
        found = find_regions(now, [escape(path) for path in paths])
        left = {paths[each.path]: each for each in found if not each.refusal}
        if not left:
            raise UsageError(
                "no further block can be skipped",
                reason=f"after {len(skipped)} blocks were; {found[0].path}: {found[0].refusal}",
            )


def _run(
    program: Program,
    legal: Mapping[int, Region],
    enough: _Enough,
    options: SkipBlocksOptions,
    context: Context,
) -> tuple[set[int], Scores]:
    """Skip the shortest run of blocks that is enough, the one whose ends differ least."""
    chains = _chains(legal)
    blocks = [[legal[index] for index in chain] for chain in chains]
    angles = distances(program, blocks, options.calibration, context)
    longest = max(map(len, chains))
    for length in range(1, longest + 1):
        found = {
            chain[start]: (float(table[start, start + length]), chain[start : start + length])
            for chain, table in zip(chains, angles, strict=True)
            for start in range(len(chain) - length + 1)
        }
        fitting = {first: (d, run) for first, (d, run) in found.items() if enough(run)}
        if fitting:
            _, run = min(fitting.values())
            return set(run), {first: d for first, (d, _) in found.items()}
    raise UsageError(
        "no run of blocks is long enough",
        reason=f"the longest in which each block reads what the one before makes has {longest}",
        hint="ask for less, or take another criterion",
    )


def _chains(legal: Mapping[int, Region]) -> list[list[int]]:
    """Return the longest runs of blocks of which each reads what the one before makes."""
    found: list[list[int]] = []
    for index, region in legal.items():
        last = legal[found[-1][-1]] if found else None
        if last is not None and ends(last)[1] is ends(region)[0]:
            found[-1].append(index)
        else:
            found.append([index])
    return found
