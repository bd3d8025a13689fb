"""Put the quantizers of a decision into the graph, and the integers into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import FakeQuantize, take_weight_as_operand
from fxcompress.nn.packing import unpack
from passes._paths import scope_beside

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
        _insert(rewriter, entry, fake)
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


def _insert(rewriter: GraphRewriter, entry: WeightEntry, fake: FakeQuantize) -> None:
    readers = [rewriter.node(layer) for layer in entry.layers]
    scope = scope_beside(readers[0])
    operands = {reader: _operand(reader) for reader in readers}
    made: dict[fx.Node | None, fx.Node] = {}
    changed: set[str] = set()
    for reader in readers:
        source = operands[reader]
        if source not in made:
            # A second parameter node, or a mask, calls the same quantizer again.
            module = fake if not made else None
            read = source or rewriter.get_attr(entry.tensor, before=readers[0], scope=scope)
            made[source] = rewriter.call_module(
                entry.path, module, (read,), after=read, scope=scope
            )
        if source is None:
            path = str(reader.target)
            if path not in changed:
                rewriter.set_module(path, take_weight_as_operand(rewriter.get_module(path)))
                changed.add(path)
            rewriter.set_args(reader, (reader.args[0], made[source]), {})
        else:
            rewriter.replace_uses(source, made[source], only=lambda user: user in readers)


def _operand(reader: fx.Node) -> fx.Node | None:
    """Return the node that a reader takes its weight from; None where it has its own."""
    name = "mat2" if op_name(reader) == "addmm" else "weight"
    found = bind(reader).get(name)
    return found if isinstance(found, fx.Node) else None


def check(program: Program, entries: Iterable[WeightEntry], arrays: Mapping[str, Any]) -> None:
    """Check that every layer reads a quantised weight, and every weight holds its integers.

    Raises:
        PassError: One does not.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    state = program.state()
    for entry in entries:
        for layer in entry.layers:
            read = _operand(nodes[layer]) if layer in nodes else None
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
