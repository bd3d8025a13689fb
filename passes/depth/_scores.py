"""What a model loses with each of its blocks: the least important go first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import DataError, NumericsError
from fxcompress.ir.naming import node_ids
from fxcompress.train.data import Split
from passes._loss import loss_of, one_by_one
from passes._observe import observe
from passes.depth._blocks import Region, ends
from passes.depth._influence import Influence

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.depth.skip_blocks import SkipBlocksOptions

__all__ = ["Scores", "all_of", "mask_of", "score"]

Scores = dict[int, float]
"""By place of a block: what skipping it costs."""


def score(
    program: Program, regions: Mapping[int, Region], options: SkipBlocksOptions, context: Context
) -> Scores:
    """Return what each block is worth, by the criterion.

    Raises:
        DataError: The calibration split is missing or too small, or there is no metric.
        NumericsError: A hidden state, or a gradient, holds a NaN or an infinity.
    """
    by: dict[str, Callable[..., Scores]] = {
        "block_influence": _influence,
        "taylor": _taylor,
        "metric": _ablation,
        "random": _random,
    }
    return by[options.criterion](program, regions, options, context)


def _influence(
    program: Program, regions: Mapping[int, Region], options: SkipBlocksOptions, context: Context
) -> Scores:
    meters = {index: Influence(region) for index, region in regions.items()}
    observers: dict[fx.Node, list[Callable[[Any], None]]] = defaultdict(list)
    for meter in meters.values():
        if (mask := mask_of(program)) is not None:
            observers[mask].append(meter.weigh)
        observers[meter.entry].append(meter.enter)
        observers[meter.exit].append(meter.leave)
    batches = context.samples("calibration", options.calibration)
    observe(program, batches, {node: all_of(each) for node, each in observers.items()})
    return {index: meter.value() for index, meter in meters.items()}


def all_of(calls: Sequence[Callable[[Any], None]]) -> Callable[[Any], None]:
    """Return what makes all the calls with one value."""

    def call_all(value: Any) -> None:
        for call in calls:
            call(value)

    return call_all


def mask_of(program: Program) -> fx.Node | None:
    """Return the input that says which tokens are no padding."""
    inputs = program.graph.find_nodes(op="placeholder")
    return next((node for node in inputs if node.target == "attention_mask"), None)


def _random(
    program: Program, regions: Mapping[int, Region], options: SkipBlocksOptions, context: Context
) -> Scores:
    generator = torch.Generator().manual_seed(context.seed)
    drawn = torch.rand(len(regions), generator=generator).tolist()
    return dict(zip(regions, drawn, strict=True))


# -- one block left out --------------------------------------------------------------------------


@torch.no_grad()
def _ablation(
    program: Program, regions: Mapping[int, Region], options: SkipBlocksOptions, context: Context
) -> Scores:
    metric = context.metric
    if metric is None:
        raise DataError(
            "there is no metric to rank blocks by",
            hint="add `metric:` to the spec, or take another criterion",
        )
    samples = list(context.labelled_samples("calibration", options.calibration))
    data = {metric.split: Split("calibration", samples)}
    original = None if context.original is None else context.original.module
    whole = metric.evaluate(program.copy().module.eval(), data, original)
    found = {}
    for done, (index, region) in enumerate(regions.items(), start=1):
        context.progress("leaving out blocks", done, len(regions))
        value = metric.evaluate(_without(program, region), data, original)
        found[index] = whole - value if metric.higher_is_better else value - whole
    return found


def _without(program: Program, region: Region) -> fx.GraphModule:
    """Return a model in eval mode that lacks a block; to be run, not to be kept."""
    entry, exit_ = ends(region)
    ids = node_ids(program)
    copy = program.copy()
    nodes = {name: node for node, name in node_ids(copy).items()}
    nodes[ids[exit_]].replace_all_uses_with(nodes[ids[entry]])
    copy.graph.eliminate_dead_code()
    copy.module.recompile()
    return copy.module.eval()


# -- gradients -----------------------------------------------------------------------------------


class _Gated(fx.Interpreter):
    """Adds a zero to every block's output, so that the loss has a gradient there."""

    def __init__(self, module: fx.GraphModule, exits: Mapping[fx.Node, int]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.exits = exits
        self.zeros: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.exits:
            return value
        zero = self.zeros[self.exits[n]] = torch.zeros_like(value, requires_grad=True)
        return value + zero


def _taylor(
    program: Program, regions: Mapping[int, Region], options: SkipBlocksOptions, context: Context
) -> Scores:
    """Return the mean over samples of |∂L/∂g|, g = 1 being a factor on what a block adds.

    ∂L/∂g = Σ ∂L/∂h_out · (h_out − h_in): the first-order change of the loss without the block.
    """
    ids = node_ids(program)
    scratch = program.copy()
    scratch.module.eval()
    nodes = {name: node for node, name in node_ids(scratch).items()}
    pairs = {i: tuple(nodes[ids[each]] for each in ends(r)) for i, r in regions.items()}
    total, count = dict.fromkeys(regions, 0.0), 0
    samples = context.labelled_samples("calibration", options.calibration)
    for batch, target in one_by_one(program, samples):
        runner = _Gated(scratch.module, {pair[1]: index for index, pair in pairs.items()})
        with torch.enable_grad():
            leaves: list[Any] = scratch.signature.leaves_of(batch)
            flat = runner.run(*leaves, enable_io_processing=False)
            output = scratch.signature.unflatten(pytree.tree_leaves(flat))
            loss = loss_of(output, target, batch)
            gradients = torch.autograd.grad(loss, list(runner.zeros.values()), allow_unused=True)
        for index, gradient in zip(runner.zeros, gradients, strict=True):
            entry, exit_ = (runner.env[node].detach().double() for node in pairs[index])
            change = 0.0 if gradient is None else float((gradient * (exit_ - entry)).sum())
            if not math.isfinite(change):
                raise NumericsError(
                    f"a NaN or an infinity in the gradient of {regions[index].path}",
                    hint="check the data and the weights",
                    where=regions[index].path,
                )
            total[index] += abs(change)
        count += 1
    return {index: each / max(count, 1) for index, each in total.items()}
