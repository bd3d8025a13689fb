"""The decision of `quantize.mixed`: measure, solve, and place the quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._choices.outputs import output_losses
from passes._choices.programme import need_scipy
from passes.quantize._mixed.budget import Allocation, allocate
from passes.quantize._mixed.candidates import (
    Candidate,
    Candidates,
    find_candidates,
    static_options,
    weight_only_options,
)
from passes.quantize._mixed.hessian import hessian_losses
from passes.quantize._mixed.insert import insert
from passes.quantize._mixed.judged import Judge, metric_losses
from passes.quantize._mixed.timed import Timer
from passes.quantize._static import decide as decide_static
from passes.quantize._weight_only.decide import decide as decide_weight_only
from passes.quantize.mixed import FLOAT, LayerEntry, MixedDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.mixed import MixedOptions
    from passes.quantize.static import StaticDecision
    from passes.quantize.weight_only import WeightOnlyDecision

__all__ = ["decide"]

_TIMED_SAMPLES: Final = 8


def decide(program: Program, options: MixedOptions, context: Context) -> MixedDecision:
    """Return the decision of `quantize.mixed`."""
    need_scipy("quantize.mixed")
    found = find_candidates(program, options)
    if context.planning or any(program.state()[each.tensor].is_meta for each in found.weights):
        return _planned(program, options, context, found)
    judge = Judge(program, found, options, context) if _judged(options) else None
    timer = _timer(program, options, context, found)
    losses = _monotone(found.weights, _losses(program, found, options, context, judge))
    chosen = allocate(found, losses, options, judge, timer)
    return _decision(program, options, context, found, chosen, losses)


def _judged(options: MixedOptions) -> bool:
    return options.sensitivity == "metric" or options.budget.metric_drop is not None


def _timer(
    program: Program, options: MixedOptions, context: Context, found: Candidates
) -> Timer | None:
    if options.budget.latency is None:
        return None
    # Ranges do not change the time, so that a few samples do; nor do better integers.
    weights = options.weights.model_copy(update={"method": "rtn"})
    samples = min(options.calibration, _TIMED_SAMPLES)
    quick = options.model_copy(update={"calibration": samples, "weights": weights})

    def built(picked: Sequence[int]) -> Program:
        trial = Allocation(tuple(picked), 0, 0.0)
        rewriter = GraphRewriter(program)
        insert(rewriter, _decision(program, quick, context, found, trial, None))
        return rewriter.finish()

    return Timer(program, options.target, options.budget.latency, built, context)


def _planned(
    program: Program, options: MixedOptions, context: Context, found: Candidates
) -> MixedDecision:
    """Return bits as if every weight were as sensitive: noise falls by 6 dB a bit."""
    alike = [
        [0.0 if bits == FLOAT else sum(each.bytes) * 4.0**-bits for bits in each.choices]
        for each in found.weights
    ]
    chosen = allocate(found, alike, options)
    made = _decision(program, options, context, found, chosen, None)
    samples = f"known after calibration ({options.calibration} samples)"
    pending = tuple(f"{each.tensor}: bits {samples}" for each in found.weights)
    return made.model_copy(update={"pending": pending})


def _losses(
    program: Program,
    found: Candidates,
    options: MixedOptions,
    context: Context,
    judge: Judge | None,
) -> list[list[float]]:
    if options.sensitivity == "metric":
        assert judge is not None, "the metric has a judge"
        return metric_losses(program, judge, found.weights, context, options.calibration)
    batches = context.samples("calibration", options.calibration)
    if options.sensitivity == "hessian":
        return hessian_losses(program, found.weights, batches, context, options.probes)
    own = options.sensitivity == "sqnr"
    return output_losses(program, found.weights, batches, context, own=own)


def _monotone(weights: Sequence[Candidate], losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return losses that never rise with the bits: where they do, that is chance."""
    made = []
    for each, row in zip(weights, losses, strict=True):
        worst, found = 0.0, []
        for _, loss in sorted(zip(each.choices, row, strict=True), reverse=True):
            worst = max(worst, loss)
            found.append(worst)
        made.append(found[::-1])
    return made


@torch.no_grad()
def _decision(
    program: Program,
    options: MixedOptions,
    context: Context,
    found: Candidates,
    chosen: Allocation,
    losses: Sequence[Sequence[float]] | None,
) -> MixedDecision:
    layers = tuple(
        LayerEntry(
            tensor=each.tensor,
            layers=each.readers,
            choices=each.choices,
            bytes=each.bytes,
            bitops=each.bitops,
            losses=() if losses is None else tuple(losses[index]),
            bits=each.choices[chosen.picked[index]],
        )
        for index, each in enumerate(found.weights)
    )
    quantised = {each.layers: each.bits for each in layers if each.bits != FLOAT}
    weight_only: WeightOnlyDecision | None = None
    static: StaticDecision | None = None
    arrays: Mapping[str, Any] = {}
    if quantised and options.activations is None:
        made = decide_weight_only(program, weight_only_options(options, quantised), context)
        weight_only, arrays = made, made.arrays
        if options.weights.method in ("rtn", "hqq"):
            # The quantizer finds the nearest integers itself; later passes need the float weights.
            arrays = {name: each for name, each in arrays.items() if ".integers" not in name}
    elif quantised:
        placed = decide_static(program, static_options(options, quantised), context)
        static, arrays = placed, placed.arrays
    kept = [
        Declined(node=name, reason="it stays in float: that is the best use of the budget")
        for each in layers
        if each.bits == FLOAT
        for name in each.layers
    ]
    named = {name for each in layers for name in each.layers}
    declined = [*found.declined, *_others(static, named)]
    return MixedDecision(
        sensitivity=options.sensitivity,
        layers=layers,
        bytes=chosen.bytes,
        loss=None if losses is None else chosen.loss,
        weight_only=weight_only,
        static=static,
        declined=(*declined, *kept),
        arrays=dict(arrays),
    )


def _others(static: StaticDecision | None, named: set[str]) -> list[Declined]:
    """Return what the placement of activations left in float that is no layer of the budget."""
    if static is None:
        return []
    layers = {each.node for each in static.declined if each.reason == "it is not selected"}
    return [each for each in static.declined if each.node not in layers | named]
