"""Put the quantizers of a decision into the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import (
    DynamicQuantize,
    FakeQuantize,
    take_weight_as_operand,
    take_weights_as_operands,
)
from passes._paths import scope_beside
from passes.quantize._dynamic.layers import activation_of, weight_operand

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.dynamic import DynamicDecision, DynamicEntry, RecurrentEntry
    from passes.quantize.static import WeightEntry

__all__ = ["check", "insert"]


def insert(rewriter: GraphRewriter, decision: DynamicDecision) -> None:
    """Add every quantizer, and give layers their weights as operands."""
    for activation in decision.activations:
        _insert_activation(rewriter, activation)
    for weight in decision.weights:
        _insert_weight(rewriter, weight, decision.arrays)
    for entry in decision.recurrent:
        _insert_matrices(rewriter, entry, decision.arrays)


def _insert_activation(rewriter: GraphRewriter, entry: DynamicEntry) -> None:
    node = rewriter.node(entry.node)
    module = DynamicQuantize(entry.bits, per=entry.per, symmetric=entry.symmetric)
    fake = rewriter.call_module(entry.path, module, (node,), after=node, scope=scope_beside(node))
    readers = {rewriter.node(layer) for layer in entry.layers}
    rewriter.replace_uses(node, fake, only=readers.__contains__)


def _insert_weight(rewriter: GraphRewriter, entry: WeightEntry, arrays: Mapping[str, Any]) -> None:
    readers = [rewriter.node(layer) for layer in entry.layers]
    scope = scope_beside(readers[0])
    fakes: dict[fx.Node | None, fx.Node] = {}
    for reader in readers:
        source = weight_operand(reader)
        if source not in fakes:
            # A second parameter node, or a mask, calls the same quantizer again.
            module = None if fakes else _quantizer(entry, arrays)
            read = source or rewriter.get_attr(entry.tensor, before=readers[0], scope=scope)
            fakes[source] = rewriter.call_module(
                entry.path, module, (read,), after=read, scope=scope
            )
        if source is not None:
            rewriter.replace_uses(source, fakes[source], only={reader}.__contains__)
            continue
        path = str(reader.target)
        if reader is readers[0]:
            rewriter.set_module(path, take_weight_as_operand(rewriter.get_module(path)))
        rewriter.set_args(reader, (activation_of(reader), fakes[source]), {})


def _insert_matrices(
    rewriter: GraphRewriter, entry: RecurrentEntry, arrays: Mapping[str, Any]
) -> None:
    readers = [rewriter.node(layer) for layer in entry.layers]
    scope = scope_beside(readers[0])
    fakes = []
    for weight in entry.weights:
        read = rewriter.get_attr(weight.tensor, before=readers[0], scope=scope)
        fakes.append(
            rewriter.call_module(
                weight.path, _quantizer(weight, arrays), (read,), after=read, scope=scope
            )
        )
    layer = take_weights_as_operands(rewriter.get_module(entry.path), entry.bits)
    rewriter.set_module(entry.path, layer)
    for reader in readers:
        rewriter.set_args(reader, (activation_of(reader), bind(reader).get("hx"), *fakes), {})


def _quantizer(entry: WeightEntry, arrays: Mapping[str, Any]) -> FakeQuantize:
    module = FakeQuantize(entry.bits, narrow=True, axis=entry.axis, shape=entry.shape)
    if entry.path in arrays:
        module.scale.copy_(torch.as_tensor(arrays[entry.path]))
    return module


def check(program: Program, decision: DynamicDecision) -> None:
    """Check that every layer decided on computes with integers.

    Raises:
        PassError: One reads a float weight or a float activation.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    for entry in decision.weights:
        for layer in entry.layers:
            node = nodes.get(layer)
            _demand(layer, node and weight_operand(node), "fake_quant")
            _demand(layer, node and activation_of(node), "dynamic_quant")
    for recurrent in decision.recurrent:
        for layer in recurrent.layers:
            node = nodes.get(layer)
            operands = bind(node).get("weights", ()) if node else ()
            for i in range(len(recurrent.weights)):
                _demand(layer, operands[i] if i < len(operands) else None, "fake_quant")


def _demand(layer: str, read: fx.Node | None, op: str) -> None:
    if read is None or op_name(read) != op:
        raise PassError(
            f"{layer} does not read the output of a {op}",
            reason="every layer of the decision must",
            where=layer,
        )
