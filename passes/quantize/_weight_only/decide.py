"""The decision of `quantize.weight_only`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.nn.packing import pack
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.edits import Declined
from passes._paths import free_path, path_beside
from passes.moe._routing import find_mixtures
from passes.moe._use import measure
from passes.quantize._weight_only.layers import Layers, Weight, choose, readers_of
from passes.quantize._weight_only.solve import Solution, Solved, solve, solve_with_data
from passes.quantize._weight_only.stack_entries import stack_arrays, stack_entries
from passes.quantize._weight_only.stacks import Stack, choose_stacks, loose_stacks, stack_parts
from passes.quantize.weight_only import Fold, WeightEntry, WeightOnlyDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize._weight_only.awq import Scaling
    from passes.quantize.weight_only import WeightOnlyOptions

__all__ = ["decide"]


@torch.no_grad()
def decide(program: Program, options: WeightOnlyOptions, context: Context) -> WeightOnlyDecision:
    """Return the decision of `quantize.weight_only`."""
    scratch = GraphRewriter(program)
    parts = stack_parts(scratch.program)
    layers = choose(scratch.program, options, [each.candidate for each in parts])
    usage = _usage(scratch.program, options, context)
    stacks, declined = choose_stacks(
        scratch.program, layers.ids, parts, layers.chosen, options,
        readers_of(scratch.program), usage,
    )  # fmt: skip
    declined = [*layers.declined, *declined, *loose_stacks(scratch.program, layers.ids)]
    if not layers.weights and not stacks:
        raise _nothing(declined)
    pending = _pending(program, layers, stacks, options, context)
    if pending:
        return WeightOnlyDecision(
            method=options.method,
            weights=_entries(program, layers, {}),
            stacks=stack_entries(program, stacks, layers.ids),
            declined=tuple(declined),
            pending=pending,
        )
    state = program.state()
    if options.method in ("rtn", "hqq"):
        solved = Solved(
            {each.tensor: solve(each, state[each.tensor], options) for each in layers.weights}
        )
    else:
        solved = solve_with_data(scratch, layers.weights, stacks, options, context)
    entries = _entries(program, layers, solved.unscaled)
    folds, divisors = _folds(solved.scalings, {each.tensor for each in layers.weights})
    arrays: dict[str, Any] = {f"{name}.divisor": value for name, value in folds.items()}
    for entry in entries:
        elements = state[entry.tensor].numel() // entry.shape[0]
        solution, divisor = solved.solutions[entry.tensor], divisors.get(entry.tensor)
        arrays.update(_arrays(entry, solution, elements, divisor))
    stacked = stack_entries(program, stacks, layers.ids, solved.experts)
    for stack, own in zip(stacks, stacked, strict=True):
        known = solved.experts.get(own.experts)
        known_here = {} if known is None else known.solutions[own.matrix]
        arrays.update(stack_arrays(stack, own, state[stack.tensor], options, known_here))
    return WeightOnlyDecision(
        method=options.method,
        weights=entries,
        stacks=stacked,
        folds=tuple(Fold(tensor=name, dim=0) for name in folds),
        declined=tuple(declined),
        arrays=arrays,
    )


def _usage(
    program: Program, options: WeightOnlyOptions, context: Context
) -> dict[str, list[float]] | None:
    """Return how often experts are chosen, where overrides ask for it and it can be known."""
    if context.planning or all(each.rarest is None for each in options.overrides):
        return None
    if any(tensor.is_meta for tensor in program.state().values()):
        return None
    mixtures = find_mixtures(program)
    batches = context.samples("calibration", options.calibration)
    return {path: use.counts.tolist() for path, use in measure(program, mixtures, batches).items()}


def _nothing(declined: Iterable[Declined]) -> UsageError:
    left = [each for each in declined if each.reason != "it is not selected"]
    return UsageError(
        "there is no weight to quantise",
        reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
        hint="select other layers, or take this pass out",
    )


def _pending(
    program: Program,
    layers: Layers,
    stacks: Sequence[Stack],
    options: WeightOnlyOptions,
    context: Context,
) -> tuple[str, ...]:
    """Return what cannot be known now, per weight."""
    state = program.state()
    tensors = [*(each.tensor for each in layers.weights), *(each.tensor for each in stacks)]
    what, when = "integers", ""
    if options.method not in ("rtn", "hqq") and context.planning:
        when = f"known after calibration ({options.calibration} samples)"
    elif any(state[each].is_meta for each in tensors):
        when = "known once the weights have values"
    elif stacks and context.planning and any(each.rarest for each in options.overrides):
        what = "which of its experts are rare, and integers"
        when = f"known after calibration ({options.calibration} samples)"
    return tuple(f"{each}: {what} {when}" for each in tensors) if when else ()


def _entries(
    program: Program, layers: Layers, unscaled: Mapping[fx.Node, str]
) -> tuple[WeightEntry, ...]:
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    state = program.state()
    entries = []
    for weight in layers.weights:
        path = free_path(_path(weight), taken)
        taken.add(path)
        rows = state[weight.tensor].movedim(weight.axis, 0)
        elements = rows[0].numel()
        count = () if weight.group is None else (-(-elements // weight.group),)
        reasons = [unscaled[each] for each in weight.readers if each in unscaled]
        entries.append(
            WeightEntry(
                path=path,
                tensor=weight.tensor,
                layers=tuple(layers.ids[each] for each in weight.readers),
                bits=weight.width.bits,
                symmetric=weight.width.symmetric,
                axis=weight.axis,
                group=weight.group,
                shape=(rows.shape[0], *count),
                unscaled=reasons[0] if reasons else None,
            )
        )
    return tuple(entries)


def _path(weight: Weight) -> str:
    """Return `layer1.0.conv1_weight_fq`: beside the layer, which must stay without children."""
    first = weight.readers[0]
    if first.op == "call_module":
        return path_beside(str(first.target), "_weight_fq")
    return path_beside(weight.tensor, "_fq")


def _folds(
    scalings: Iterable[Scaling], quantised: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return divisors of tensors that stay in float, and of rows of those that do not."""
    folds: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for scaling in scalings:
        factors = scaling.factors
        if factors is None or bool((factors == 1).all()):
            continue
        for tensor in scaling.divided:
            (rows if tensor in quantised else folds)[tensor] = factors
    return folds, rows


def _arrays(
    entry: WeightEntry, solution: Solution, elements: int, divisor: Tensor | None
) -> dict[str, Tensor]:
    scale, zero_point = solution.grid.scale, solution.grid.zero_point
    if divisor is not None:
        # The rows of what is divided afterwards keep their integers.
        scale = scale / divisor[:, None]
    # The last group of a row may be filled up.
    unsigned = solution.integers.flatten(1)[:, :elements] - solution.grid.width.qmin
    return {
        f"{entry.path}.scale": scale.reshape(entry.shape),
        f"{entry.path}.zero_point": zero_point.reshape(entry.shape).to(torch.int32),
        f"{entry.path}.integers": pack(unsigned.to(torch.uint8), entry.bits),
    }
