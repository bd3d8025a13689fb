"""Put the quantizers of a decision into the graph, and the integers into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.nn import FakeQuantize
from fxcompress.nn.packing import unpack
from passes._layers.quantizer import insert_quantizer, weight_node

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.weight_only import Fold, WeightEntry

__all__ = ["check", "fold", "insert"]


def fold(rewriter: GraphRewriter, folds: Iterable[Fold], arrays: Mapping[str, Any]) -> None:
    """Divide parameters along a dimension."""
    for each in folds:
        value = rewriter.get_tensor(each.tensor)
        shape = [1] * value.dim()
        shape[each.dim] = -1
        divisor = torch.as_tensor(arrays[f"{each.tensor}.divisor"]).to(value.device)
        made = (value.detach().float() / divisor.reshape(shape)).to(value.dtype)
        rewriter.set_tensor(each.tensor, made, tied=True)


def insert(
    rewriter: GraphRewriter, entries: Iterable[WeightEntry], arrays: Mapping[str, Any]
) -> None:
    """Add a quantizer per weight, give its readers the weight as an operand, and set the weight."""
    for entry in entries:
        fake = _build(entry, arrays)
        readers = [rewriter.node(layer) for layer in entry.layers]
        insert_quantizer(rewriter, fake, entry.path, entry.tensor, readers)
        if f"{entry.path}.integers" in arrays:
            value = rewriter.get_tensor(entry.tensor)
            made = fake.dequantize(_integers(entry, fake, value, arrays), value.dtype)
            rewriter.set_tensor(entry.tensor, made, tied=True)


def _build(entry: WeightEntry, arrays: Mapping[str, Any]) -> FakeQuantize:
    fake = FakeQuantize(
        entry.bits,
        signed=entry.symmetric,
        symmetric=entry.symmetric,
        axis=entry.axis,
        group=entry.group,
        shape=entry.shape,
    )
    if f"{entry.path}.scale" in arrays:
        fake.scale.copy_(torch.as_tensor(arrays[f"{entry.path}.scale"]))
        fake.zero_point.copy_(torch.as_tensor(arrays[f"{entry.path}.zero_point"]))
    return fake


def _integers(
    entry: WeightEntry, fake: FakeQuantize, like: Tensor, arrays: Mapping[str, Any]
) -> Tensor:
    moved = like.movedim(entry.axis, 0).shape
    packed = torch.as_tensor(arrays[f"{entry.path}.integers"])
    unsigned = unpack(packed, entry.bits, like.numel()).to(torch.int32)
    return (unsigned + fake.qmin).reshape(moved).movedim(0, entry.axis)


def check(program: Program, entries: Iterable[WeightEntry], arrays: Mapping[str, Any]) -> None:
    """Check that every layer reads a quantised weight, and every weight holds its integers.

    Raises:
        PassError: One does not.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    state = program.state()
    for entry in entries:
        for layer in entry.layers:
            read = weight_node(nodes[layer]) if layer in nodes else None
            if read is None or op_name(read) != "fake_quant":
                raise PassError(
                    f"{layer} does not read a quantised weight",
                    reason="every layer of the decision must",
                    where=layer,
                )
        value = state[entry.tensor].detach()
        if f"{entry.path}.integers" in arrays and value.dtype == torch.float32:
            fake: Any = program.module.get_submodule(entry.path)
            wanted = _integers(entry, fake, value, arrays)
            if not torch.equal(fake.quantize(value), wanted):
                raise PassError(
                    f"{entry.tensor} is not read back as the integers that were decided",
                    reason="its quantizer rounds it to others",
                    where=entry.tensor,
                )
