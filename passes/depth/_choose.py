"""Choose the blocks to skip: by list, or by block influence measured on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name, op_spec
from fxcompress.rewrite.edits import Declined
from passes._observe import observe
from passes.depth._blocks import Region, find_regions
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
    declined = tuple(
        Declined(
            node=region.path,
            reason=region.refusal,
            because_of=tuple(ids[node] for node in region.because_of),
        )
        for region in regions
        if region.refusal
    )
    legal = {index: region for index, region in enumerate(regions) if not region.refusal}
    pending: tuple[str, ...] = ()
    influence: dict[int, float] = {}
    if options.layers:
        _check_listed(options.layers, regions)
        skipped = set(options.layers)
    else:
        count = _count(options, regions, legal)
        if context.planning:
            # Blocks of a stack are alike in cost, so that the last ones show what will be saved.
            skipped = set(sorted(legal)[-count:])
            which = "which block" if count == 1 else f"which {count} blocks"
            pending = (f"{which}: known after measuring block influence",)
        else:
            influence = _influences(program, options, context, legal, ids)
            skipped = set(sorted(legal, key=lambda index: (influence[index], index))[:count])
    blocks = tuple(
        Block(
            index=index,
            path=region.path,
            entry=ids[_node(region.entry)],
            exit=ids[_node(region.exit)],
            influence=influence.get(index),
            skip=index in skipped,
            sizes=tuple(ids[node] for node in region.sizes),
        )
        for index, region in legal.items()
    )
    return SkipBlocksDecision(blocks=blocks, declined=declined, pending=pending)


def _node(node: fx.Node | None) -> fx.Node:
    assert node is not None, "a region without refusal has its ends"
    return node


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


def _count(options: SkipBlocksOptions, regions: list[Region], legal: dict[int, Region]) -> int:
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


def _influences(
    program: Program,
    options: SkipBlocksOptions,
    context: Context,
    legal: dict[int, Region],
    ids: dict[fx.Node, str],
) -> dict[int, float]:
    """Return the block influence of each region, 1 − mean cos(h_in, h_out)."""
    meters = {index: _Meter(program, region, ids) for index, region in legal.items()}
    observers: dict[fx.Node, list[Callable[[Any], None]]] = {}
    mask = next(
        (n for n in program.graph.find_nodes(op="placeholder") if n.target == "attention_mask"),
        None,
    )
    for meter in meters.values():
        if mask is not None:
            observers.setdefault(mask, []).append(meter.weigh)
        observers.setdefault(meter.entry, []).append(meter.enter)
        observers.setdefault(meter.exit, []).append(meter.leave)

    def all_of(calls: list[Callable[[Any], None]]) -> Callable[[Any], None]:
        def call_all(value: Any) -> None:
            for call in calls:
                call(value)

        return call_all

    batches = context.samples("calibration", options.calibration)
    observe(program, batches, {node: all_of(each) for node, each in observers.items()})
    return {index: meter.influence() for index, meter in meters.items()}


class _Meter:
    """The mean cosine between a block's input and output, over tokens or pixels."""

    def __init__(self, program: Program, region: Region, ids: dict[fx.Node, str]) -> None:
        self.path = region.path
        self.entry, self.exit = _node(region.entry), _node(region.exit)
        self.axis = _feature_axis(region, self.entry)
        self.state: Tensor | None = None
        self.mask: Tensor | None = None
        self.total, self.weight = 0.0, 0.0

    def weigh(self, mask: Tensor) -> None:
        """Take the attention mask of a batch, `[batch, seq]`."""
        self.mask = mask

    def enter(self, state: Tensor) -> None:
        """Take h_in."""
        self.state = state

    def leave(self, state: Tensor) -> None:
        """Take h_out, and let h_in go."""
        assert self.state is not None, "the entry comes before the exit"
        cosine = torch.cosine_similarity(self.state.float(), state.float(), dim=self.axis)
        self.state = None
        if not bool(torch.isfinite(cosine).all()):
            raise NumericsError(
                f"a NaN or an infinity in the hidden state of {self.path}",
                hint="check the data and the weights",
                where=self.path,
            )
        mask = self.mask
        if mask is not None and mask.shape == cosine.shape:
            kept = cosine * (mask > 0)
            self.total += float(kept.double().sum())
            self.weight += float((mask > 0).sum())
        else:
            self.total += float(cosine.double().sum())
            self.weight += cosine.numel()

    def influence(self) -> float:
        """Return 1 − the mean cosine; 0 for a block that changes nothing."""
        return 1.0 - self.total / max(self.weight, 1.0)


def _feature_axis(region: Region, entry: fx.Node) -> int:
    """Return the axis of the features: 1 where a convolution or its norm reads the input."""
    inside = set(region.nodes)
    for user in entry.users:
        if user not in inside:
            continue
        name = op_name(user)
        spec = op_spec(name)
        if name.startswith("conv") or name in ("batch_norm", "group_norm", "instance_norm"):
            return 1
        if name in ("linear", "layer_norm", "rms_norm"):
            return -1
        if spec is not None and spec.kind == "pool":
            return 1
    value = entry.meta.get("val")
    return 1 if isinstance(value, Tensor) and value.dim() == 4 else -1
