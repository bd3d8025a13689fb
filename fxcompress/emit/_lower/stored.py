"""Weights as stored integers, and what plain torch operations say of quantizers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

from torch import fx, nn

from fxcompress.emit._dynamic_recurrent import ScannedLSTM
from fxcompress.emit._integers import IntegerWeight, PackedWeight, Rounding
from fxcompress.emit._lower.graph import LAYERS, RECURRENT, quantizer_of, tensor_at
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import OperandExperts, OperandLSTM

__all__ = [
    "Lowered",
    "count",
    "drop_unread",
    "freeze",
    "is_small",
    "store",
    "write_rounding",
    "write_scans",
]


@dataclass
class Lowered:
    """What a lowering did: layers whose weight is stored as integers, and what it left out."""

    convolutions: int = 0
    linears: int = 0
    recurrent: int = 0
    embeddings: int = 0
    notes: list[str] = field(default_factory=list)


def freeze(module: fx.GraphModule) -> None:
    """Replace quantizers that are being trained by copies that hold what they have come to."""
    for node in module.graph.nodes:
        quantizer = quantizer_of(node)
        if quantizer is not None and (quantizer.learned or quantizer.tracking):
            module.set_submodule(str(node.target), copy.deepcopy(quantizer).freeze())


def count(module: fx.GraphModule, done: Lowered) -> None:
    """Count the layers, modules or functions, whose weight is quantised."""
    for node in module.graph.nodes:
        op = op_name(node)
        if not op.startswith(("conv", "embedding", "linear")):
            continue
        weight = bind(node).get("weight")
        if isinstance(weight, fx.Node) and quantizer_of(weight):
            done.linears += op == "linear"
            done.embeddings += op.startswith("embedding")
            done.convolutions += op.startswith("conv")


def is_small(node: fx.Node) -> bool:
    """Whether a weight takes less than a byte each, or has scales for groups."""
    quantizer = quantizer_of(node)
    return quantizer is not None and (quantizer.bits < 8 or quantizer.group is not None)


def store(module: fx.GraphModule, node: fx.Node, *, packed: bool = False) -> nn.Module:
    """Put a module that holds integers in the place of a weight's quantizer; return it."""
    quantizer = quantizer_of(node)
    assert quantizer is not None, "only fake-quantize nodes are stored"
    source = cast(fx.Node, node.args[0])
    form = PackedWeight if packed and quantizer.bits <= 8 else IntegerWeight
    stored = form(quantizer, tensor_at(module, str(source.target)).detach())
    module.set_submodule(str(node.target), stored)
    return stored


def write_rounding(module: fx.GraphModule) -> None:
    """Write quantizers of activations as plain torch operations."""
    for node in module.graph.nodes:
        quantizer = quantizer_of(node)
        if quantizer is not None and quantizer.axis is None:
            # Called again where the scale passes through an op: by then it is replaced already.
            module.set_submodule(str(node.target), Rounding(quantizer))


def write_scans(module: fx.GraphModule, done: Lowered) -> None:
    """Let LSTMs run their steps in a `scan`, so that any length can be exported."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if type(layer) is OperandLSTM:
                module.set_submodule(str(node.target), ScannedLSTM.of(layer))
                done.notes.append(
                    f"{node.target}: its steps are a loop in plain torch, slower than nn.LSTM"
                )


def drop_unread(module: fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads, such as the float form of a weight."""
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        path, _, attribute = name.rpartition(".")
        inside = any(path == c or path.startswith(f"{c}.") for c in called)
        owner = module.get_submodule(path)
        # An operand layer computes with what it is given; its own weight is the graph's business.
        if name not in read and (not inside or _is_operand(owner, attribute)):
            delattr(owner, attribute)


def _is_operand(owner: nn.Module, attribute: str) -> bool:
    """Whether a layer is given such a parameter by the graph."""
    if isinstance(owner, RECURRENT):
        return attribute.startswith("weight_")
    if isinstance(owner, OperandExperts):
        return attribute in ("gate", "up", "down")
    return isinstance(owner, LAYERS) and attribute == "weight"
