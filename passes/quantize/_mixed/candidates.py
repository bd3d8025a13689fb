"""The weights that share a budget: their choices, and what each choice costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from glob import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.analysis.cost import cost
from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.base import Selection
from fxcompress.pipeline.context import Context
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes.quantize._layers import choose_layers
from passes.quantize._options import Override as StaticOverride
from passes.quantize._options import StaticOptions, WeightOptions, WeightOverride
from passes.quantize._static import decide as decide_static
from passes.quantize._weight_only.grids import Width
from passes.quantize._weight_only.layers import Weight, choose
from passes.quantize._weight_only.solve import solve
from passes.quantize._weights import weight_entries, weight_scales
from passes.quantize.mixed import FLOAT
from passes.quantize.static import WeightEntry
from passes.quantize.weight_only import Override, WeightOnlyOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.mixed import MixedOptions

__all__ = ["Candidate", "Candidates", "find_candidates", "static_options", "weight_only_options"]

# A scale is a float32, a zero point one byte.
_SCALE_BYTES = 5


@dataclass(frozen=True)
class Candidate:
    """A weight that may get any of some numbers of bits.

    Attributes:
        tensor: Its canonical name.
        readers: The ids of the nodes that read it, in graph order.
        choices: Bits, ascending; 16 leaves it in float.
        bytes: What it takes at each.
        bitops: Multiply-accumulates times bits, at each.
        rounded: Bits -> the weight as that many bits give it back.
    """

    tensor: str
    readers: tuple[str, ...]
    choices: tuple[int, ...]
    bytes: tuple[int, ...]
    bitops: tuple[int, ...]
    rounded: Callable[[int], Tensor]

    def changed(self, bits: int) -> Tensor | None:
        """Return the weight as that many bits give it back; None where it stays in float."""
        return None if bits == FLOAT else self.rounded(bits)


@dataclass(frozen=True)
class Candidates:
    """The weights in graph order, what is left alone and why, and what all else costs.

    Attributes:
        weights: What may be quantised.
        declined: The other layers.
        whole: Bytes of the model as it is.
        rest: Bytes of it that are no candidate's, and of quantizers of activations.
    """

    weights: tuple[Candidate, ...]
    declined: tuple[Declined, ...]
    whole: int
    rest: int


@dataclass(frozen=True)
class _Format:
    """A weight as one of the two ways to quantise sees it."""

    tensor: str
    readers: tuple[fx.Node, ...]
    scales: int
    rounded: Callable[[int], Tensor]


def find_candidates(program: Program, options: MixedOptions) -> Candidates:
    """Return the weights that the budget is shared by.

    Raises:
        SelectorError: A selection fits no layer, or not as many as expected.
        UsageError: There is no layer to quantise, or what is kept has no choice.
    """
    ids = node_ids(program)
    if options.activations is None:
        formats, declined = _weight_only_formats(program, options)
    else:
        formats, declined = _static_formats(program, options, ids)
    if not formats:
        left = [each for each in declined if each.reason != "it is not selected"]
        raise UsageError(
            "there is no weight to quantise",
            reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
            hint="select other layers, or take this pass out",
        )
    choices = _choices(program, formats, options)
    costs = cost(program)
    macs = {each.id: each.macs for each in costs.per_node}
    state = program.state()
    width = 32 if options.activations is None else options.activations.bits
    weights, taken = [], 0
    for each in formats:
        value = state[each.tensor]
        work = sum(macs.get(ids[node], 0) for node in each.readers)
        own = value.element_size() * 8
        taken += value.numel() * value.element_size()
        weights.append(
            Candidate(
                each.tensor,
                tuple(ids[node] for node in each.readers),
                choices[each.tensor],
                tuple(_bytes(value, each.scales, bits) for bits in choices[each.tensor]),
                tuple(
                    work * (own * own if bits == FLOAT else bits * min(width, own))
                    for bits in choices[each.tensor]
                ),
                each.rounded,
            )
        )
    rest = costs.bytes - taken + _quantizer_bytes(program, options)
    return Candidates(tuple(weights), declined, costs.bytes, rest)


def _quantizer_bytes(program: Program, options: MixedOptions) -> int:
    """Return what the quantizers of activations take where every layer is quantised."""
    if options.activations is None:
        return 0
    planned = decide_static(program, static_options(options, {}), Context(planning=True))
    return _SCALE_BYTES * sum(not each.exists for each in planned.activations)


def _bytes(value: Tensor, scales: int, bits: int) -> int:
    if bits == FLOAT:
        return value.numel() * value.element_size()
    return (value.numel() * bits + 7) // 8 + scales * _SCALE_BYTES


def _choices(
    program: Program, formats: list[_Format], options: MixedOptions
) -> dict[str, tuple[int, ...]]:
    nodes = [node for each in formats for node in each.readers]
    kept = set(Selector(options.keep).select(program, nodes)) if options.keep else set()
    others = [
        (set(Selector(each.targets).select(program, nodes)), each.choices)
        for each in options.overrides
    ]
    found = {}
    for each in formats:
        chosen = next(
            (bits for hit, bits in others if hit.intersection(each.readers)), options.choices
        )
        chosen = (FLOAT,) if kept.intersection(each.readers) else chosen
        found[each.tensor] = tuple(sorted(set(chosen)))
    return found


def _weight_only_formats(
    program: Program, options: MixedOptions
) -> tuple[list[_Format], tuple[Declined, ...]]:
    plain = weight_only_options(options, {})
    layers = choose(program, plain)
    state = program.state()

    def rounder(weight: Weight) -> Callable[[int], Tensor]:
        def rounded(bits: int) -> Tensor:
            value = state[weight.tensor].detach()
            wide = replace(weight, width=Width(bits, plain.symmetric))
            found = solve(wide, value, plain)
            return weight.restored(found.grid.values(found.integers), value).to(value.dtype)

        return rounded

    formats = []
    for weight in layers.weights:
        value = state[weight.tensor]
        rows = value.shape[weight.axis]
        groups = 1 if weight.group is None else -(-value.numel() // rows // weight.group)
        formats.append(_Format(weight.tensor, weight.readers, rows * groups, rounder(weight)))
    return formats, layers.declined


def _static_formats(
    program: Program, options: MixedOptions, ids: Mapping[fx.Node, str]
) -> tuple[list[_Format], tuple[Declined, ...]]:
    plain = static_options(options, {})
    layers = choose_layers(program, plain, ids)
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    entries = weight_entries(program, layers.chosen, plain.weights, ids, taken)
    nodes = {name: node for node, name in ids.items()}
    state = program.state()

    def rounder(entry: WeightEntry) -> Callable[[int], Tensor]:
        def rounded(bits: int) -> Tensor:
            wide = entry.model_copy(update={"bits": bits})
            scale = weight_scales(program, [wide], plain.weights, lambda _: None)[entry.path]
            fake = FakeQuantize(bits, narrow=True, axis=entry.axis, shape=entry.shape)
            fake.scale.copy_(scale)
            with torch.no_grad():
                made: Tensor = fake(state[entry.tensor].detach())
            return made

        return rounded

    formats = []
    for entry in entries:
        scales = entry.shape[0] if entry.shape else 1
        readers = tuple(nodes[layer] for layer in entry.layers)
        formats.append(_Format(entry.tensor, readers, scales, rounder(entry)))
    return formats, layers.declined


def weight_only_options(
    options: MixedOptions, bits: Mapping[tuple[str, ...], int]
) -> WeightOnlyOptions:
    """Return options of `quantize.weight_only` for the readers in `bits`; for all, if it is empty.

    Args:
        options: Of the pass.
        bits: Readers of a weight -> bits of that weight.
    """
    weights = options.weights
    selection = _selection(options, bits)
    return WeightOnlyOptions(
        targets=selection.targets,
        types=selection.types,
        exclude=selection.exclude,
        expect=selection.expect,
        group=weights.group,
        symmetric=weights.symmetric,
        method=weights.method,
        search=weights.search,
        embeddings=options.embeddings,
        calibration=options.calibration,
        overrides=tuple(
            Override(targets=tuple(escape(name) for name in readers), bits=each)
            for readers, each in bits.items()
        ),
    )


def static_options(options: MixedOptions, bits: Mapping[tuple[str, ...], int]) -> StaticOptions:
    """Return options of `quantize.static` for the readers in `bits`; for all, if it is empty."""
    assert options.activations is not None, "activations are quantised"
    selection = _selection(options, bits)
    return StaticOptions(
        targets=selection.targets,
        types=selection.types,
        exclude=selection.exclude,
        expect=selection.expect,
        target=options.target,
        weights=WeightOptions(observer=options.weights.search),
        activations=options.activations,
        calibration=options.calibration,
        overrides=tuple(
            StaticOverride(
                targets=tuple(escape(name) for name in readers), weights=WeightOverride(bits=each)
            )
            for readers, each in bits.items()
        ),
    )


def _selection(options: MixedOptions, bits: Mapping[tuple[str, ...], int]) -> Selection:
    if not bits:
        return options
    return Selection(targets=tuple(escape(name) for readers in bits for name in readers))
