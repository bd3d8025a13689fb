"""Which weights can be rounded another way: quantised, with their float values still known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.operands import tensor_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.quantize.adaround import AdaroundOptions

__all__ = ["Weights", "find_weights"]

_WIDEST: Final = 8


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight behind a quantizer.

    Attributes:
        path: The quantizer's.
        tensor: The parameter.
        fake: The quantizer.
        nodes: Its calls.
        readers: The layers.
        value: The float weight, masked.
    """

    path: str
    tensor: str
    fake: FakeQuantize
    nodes: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    value: Tensor


@dataclass(frozen=True)
class Weights:
    """The weights in graph order, and why others keep their integers."""

    chosen: tuple[QuantisedWeight, ...]
    declined: tuple[Declined, ...]


def find_weights(program: Program, options: AdaroundOptions, context: Context) -> Weights:
    """Return the quantised weights of the selected layers.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
        UsageError: No weight is quantised, or none can be rounded another way.
    """
    ids = node_ids(program)
    quantizers: dict[str, list[fx.Node]] = {}
    sources: dict[str, fx.Node] = {}
    for node in program.nodes:
        source = _parameter(node)
        if source is not None:
            quantizers.setdefault(str(node.target), []).append(node)
            sources[str(node.target)] = source
    if not quantizers:
        raise UsageError(
            "no weight is quantised yet",
            reason="rounding is learned for weights that have a quantizer",
            hint="run quantize.static, quantize.mixed or quantize.weight_only first",
        )
    readers = {path: [u for n in nodes for u in n.users] for path, nodes in quantizers.items()}
    selected = set(
        Selector.of(options).select(program, [each for group in readers.values() for each in group])
    )
    chosen, declined = [], []
    for path, nodes in quantizers.items():
        reason: str | None = "it is not selected"
        if selected.issuperset(readers[path]):
            reason = _obstacle(program, nodes[0], sources[path], context)
        if reason is None:
            tensor = tensor_of(program, sources[path])
            fake = module_of(nodes[0])
            assert isinstance(fake, FakeQuantize), "an obstacle otherwise"
            value = _masked(program, nodes[0], _float_value(program, tensor, fake, context))
            weight = QuantisedWeight(path, tensor, fake, tuple(nodes), tuple(readers[path]), value)
            chosen.append(weight)
        else:
            declined += [Declined(node=ids[each], reason=reason) for each in readers[path]]
    if not chosen:
        left = [each for each in declined if each.reason != "it is not selected"] or declined
        raise UsageError(
            "there is no weight that can be rounded another way",
            reason="; ".join(f"{each.node}: {each.reason}" for each in left[:3]),
            hint="run it after a pass that leaves the float weights: quantize.static or "
            "quantize.mixed",
        )
    return Weights(tuple(chosen), tuple(declined))


def _parameter(node: fx.Node) -> fx.Node | None:
    """Return the parameter that a quantizer rounds, or None where it rounds something else."""
    if op_name(node) != "fake_quant" or node.op != "call_module":
        return None
    source = node.all_input_nodes[0]
    if op_name(source) == "mask":
        source = source.all_input_nodes[0]
    return source if source.op == "get_attr" else None


def _obstacle(program: Program, node: fx.Node, source: fx.Node, context: Context) -> str | None:
    fake = module_of(node)
    if not isinstance(fake, FakeQuantize):
        return "its quantizer has no grid of integers"
    if fake.learned or fake.tracking:
        return "its quantizer is still trained: end quantisation-aware training first"
    if fake.bits > _WIDEST:
        return f"it has {fake.bits} bits, and learned rounding is for at most {_WIDEST}"
    tensor = tensor_of(program, source)
    value = program.state()[tensor]
    if value.is_meta:
        return None
    if not bool(torch.isfinite(value).all()):
        return f"{tensor} holds a NaN or an infinity"
    if _float_value(program, tensor, fake, context) is None:
        return (
            f"the float values of {tensor} are gone: it holds what its integers stand for, and the "
            "original model has other values"
        )
    return None


@torch.no_grad()
def _float_value(
    program: Program, tensor: str, fake: FakeQuantize, context: Context
) -> Tensor | None:
    """Return the weight before it was rounded: as it is, or where it is on the grid the original's.

    The original's counts if the integers nearest to it are the ones that the weight has.
    """
    value = program.state()[tensor].detach()
    if value.is_meta:
        return value
    integers = fake.quantize(value)
    on_grid = fake.dequantize(integers, value.dtype)
    if not torch.allclose(on_grid, value, rtol=1e-4, atol=0):
        return value
    original = None if context.original is None else context.original.state().get(tensor)
    if original is None or original.shape != value.shape or not original.is_floating_point():
        return None
    original = original.detach().to(value)
    return original if torch.equal(fake.quantize(original), integers) else None


def _masked(program: Program, node: fx.Node, value: Tensor | None) -> Tensor:
    assert value is not None, "an obstacle otherwise"
    mask = node.all_input_nodes[0]
    if op_name(mask) != "mask" or value.is_meta:
        return value
    with torch.no_grad():
        made: Tensor = module_of(mask)(value)
    return made
