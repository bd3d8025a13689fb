"""The decision of `quantize.adaround`: unit after unit, from inputs to outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.nn.packing import pack
from fxcompress.pipeline.context import Batch as ModelBatch
from passes._layers.frontier import Frontier
from passes.quantize._adaround.gradients import output_gradients
from passes.quantize._adaround.learn import Batch, Learned, learn
from passes.quantize._adaround.units import Unit, find_units
from passes.quantize._adaround.weights import QuantisedWeight, find_weights
from passes.quantize.adaround import AdaroundDecision, RoundedWeight, UnitEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.adaround import AdaroundOptions

__all__ = ["decide"]


def decide(program: Program, options: AdaroundOptions, context: Context) -> AdaroundDecision:
    """Return the decision of `quantize.adaround`."""
    # Units are parts of the graph that is run: a private copy, whose weights are rounded.
    program = program.copy()
    found = find_weights(program, options, context)
    units, unplaced = find_units(program, found.chosen, options)
    declined = (*found.declined, *unplaced)
    if not units:
        raise UsageError(
            "there is no unit to reconstruct",
            reason="; ".join(f"{each.node}: {each.reason}" for each in declined[:3]),
            hint="take `unit: layer`, or other `blocks`",
        )
    ids = node_ids(program)
    if context.planning or any(each.value.is_meta for each in found.chosen):
        samples = f"known after calibration ({options.calibration} samples)"
        pending = tuple(f"{each.tensor}: rounding {samples}" for each in found.chosen)
        return AdaroundDecision(
            units=tuple(_entry(unit, ids, None) for unit in units),
            declined=declined,
            pending=pending,
        )
    batches = _in_batches(
        program, list(context.samples("calibration", options.calibration)), options.batch, context
    )
    entries: list[UnitEntry] = []
    arrays: dict[str, Any] = {}
    for unit, learned in _reconstruct(program, units, found.chosen, batches, options, context):
        entries.append(_entry(unit, ids, learned))
        for each in unit.weights:
            unsigned = learned.integers[each.path] - each.fake.qmin
            arrays[f"{each.path}.integers"] = pack(unsigned.to(torch.uint8), each.fake.bits)
    return AdaroundDecision(units=tuple(entries), declined=declined, arrays=arrays)


def _entry(unit: Unit, ids: Mapping[fx.Node, str], learned: Learned | None) -> UnitEntry:
    weights = tuple(
        RoundedWeight(
            path=each.path,
            tensor=each.tensor,
            bits=each.fake.bits,
            moved=0
            if learned is None
            else int((learned.integers[each.path] != learned.nearest[each.path]).sum()),
        )
        for each in unit.weights
    )
    return UnitEntry(
        name=unit.name,
        outputs=tuple(ids[node] for node in unit.outputs),
        weights=weights,
        before=None if learned is None else learned.before,
        after=None if learned is None else learned.after,
    )


def _reconstruct(
    program: Program,
    units: Sequence[Unit],
    weights: Sequence[QuantisedWeight],
    batches: Sequence[ModelBatch],
    options: AdaroundOptions,
    context: Context,
) -> Iterable[tuple[Unit, Learned]]:
    """Yield each unit with its rounding, both models being run side by side up to it."""
    generator = torch.Generator().manual_seed(context.seed)
    exact, twins = _float_copy(program, weights)
    outputs = {twins[node] for unit in units for node in unit.outputs}
    rounded, given = Frontier(program, batches), Frontier(exact, batches, outputs)
    gradients = output_gradients(exact, batches, generator) if options.weighted else None
    nodes = list(program.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    reached = 0
    for number, unit in enumerate(units):
        rounded.run_to(unit.nodes[0])
        end = place[unit.nodes[-1]] + 1
        if end > reached:
            given.run_to(twins[nodes[end]])
            reached = end
        wanted = [twins[node] for node in unit.outputs]
        scales = None if gradients is None else gradients(wanted)
        data = [
            Batch(
                {node: values[node] for node in unit.inputs if node in values},
                tuple(exactly[node].float() for node in wanted),
                () if scales is None else scales[index],
            )
            for index, (values, exactly) in enumerate(
                zip(rounded.values, given.values, strict=True)
            )
        ]
        learned = learn(program.module, unit, data, options, generator)
        for each in unit.weights:
            value = each.fake.dequantize(learned.integers[each.path], each.value.dtype)
            for name in _names(program, each.tensor):
                rounded.set_tensor(name, value)
            for values in rounded.values:
                values.update({node: value for node in each.nodes if node in values})
        for node in unit.outputs:
            if max(place[user] for user in node.users) < reached:
                for values in given.values:
                    values.pop(twins[node], None)
        context.progress("learning to round", number + 1, len(units))
        yield unit, learned


def _float_copy(
    program: Program, weights: Sequence[QuantisedWeight]
) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """Return a copy that rounds nothing, and each node's counterpart in it."""
    made = program.copy()
    twins = dict(zip(program.nodes, made.nodes, strict=True))
    for node in made.nodes:
        if op_name(node) == "fake_quant" and node.op == "call_module":
            made.module.set_submodule(str(node.target), nn.Identity())
    for each in weights:
        for name in _names(made, each.tensor):
            owner, _, leaf = name.rpartition(".")
            module = made.module.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(each.value, requires_grad=False)
    return made, twins


def _names(program: Program, tensor: str) -> list[str]:
    """Return all names of a tensor."""
    return [tensor, *(alias for alias, name in program.ties.items() if name == tensor)]


def _in_batches(
    program: Program, batches: list[ModelBatch], size: int, context: Context
) -> list[ModelBatch]:
    """Return the samples in batches of `size`, mixed, where the model takes any batch size.

    Where samples differ in their other sizes, or the batch size is fixed, batches stay as given.
    """
    leaves = [program.signature.leaves_of(each) for each in batches]
    shapes = {tuple(tuple(leaf.shape[1:]) for leaf in each) for each in leaves}
    free = all(each.shape and isinstance(each.shape[0], str) for each in program.signature.inputs)
    if not free or len(shapes) != 1 or any(leaf.dim() == 0 for leaf in leaves[0]):
        return batches
    joined = [torch.cat(parts) for parts in zip(*leaves, strict=True)]
    order = torch.randperm(len(joined[0]), generator=torch.Generator().manual_seed(context.seed))
    count = max(1, round(len(order) / size))
    return [
        _like(batches[0], [leaf[part] for leaf in joined], program)
        for part in order.tensor_split(count)
    ]


def _like(batch: ModelBatch, leaves: Sequence[Any], program: Program) -> ModelBatch:
    """Return a batch of the same structure with other tensors."""
    from torch.utils import _pytree as pytree

    flat, tree = pytree.tree_flatten(batch)
    places = iter(leaves)
    swapped = [next(places) if isinstance(each, Tensor) else each for each in flat]
    made: ModelBatch = pytree.tree_unflatten(swapped, tree)
    return made
