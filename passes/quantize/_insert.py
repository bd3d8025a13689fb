"""Put the quantizers of a decision into the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import take_weight_as_operand
from passes._paths import scope_beside
from passes.quantize._build import Quantizer, activation_quantizer, weight_quantizer

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.static import ActivationEntry, WeightEntry

__all__ = ["check_inserted", "insert_activations", "insert_weights"]


_QUANTIZED: Final = ("fake_quant", "float_quant")
Prepare: TypeAlias = Callable[[Quantizer], object]
"""What is done to a quantizer before it goes into the graph."""


def insert_activations(
    rewriter: GraphRewriter, entries: Iterable[ActivationEntry], prepare: Prepare = lambda _: None
) -> None:
    """Add a quantizer per entry, called on each of its tensors."""
    for entry in entries:
        module = None if entry.exists else activation_quantizer(entry)
        if module is not None:
            prepare(module)
        for call in entry.calls:
            node = rewriter.node(call.node)
            fake = rewriter.call_module(
                entry.path, module, (node,), after=node, scope=scope_beside(node)
            )
            module = None
            readers = None if call.readers is None else set(map(rewriter.node, call.readers))
            if readers is None:
                rewriter.replace_uses(node, fake)
            else:
                rewriter.replace_uses(node, fake, only=readers.__contains__)


def insert_weights(
    rewriter: GraphRewriter,
    entries: Iterable[WeightEntry],
    arrays: Mapping[str, Any],
    prepare: Prepare = lambda _: None,
) -> None:
    """Add a quantizer per weight, and let the layers take their weight as an operand."""
    for entry in entries:
        module = weight_quantizer(entry)
        if entry.path in arrays:
            module.scale.copy_(torch.as_tensor(arrays[entry.path]))
        prepare(module)
        layers = [rewriter.node(layer) for layer in entry.layers]
        if "weight" not in bind(layers[0]):
            _insert_before_modules(rewriter, entry, module, layers)
        else:
            _insert_before_operands(rewriter, entry, module, layers)


def _insert_before_modules(
    rewriter: GraphRewriter, entry: WeightEntry, module: Quantizer, layers: list[fx.Node]
) -> None:
    scope = scope_beside(layers[0])
    weight = rewriter.get_attr(entry.tensor, before=layers[0], scope=scope)
    fake = rewriter.call_module(entry.path, module, (weight,), after=weight, scope=scope)
    path = str(layers[0].target)
    rewriter.set_module(path, take_weight_as_operand(rewriter.get_module(path)))
    for layer in layers:
        rewriter.set_args(layer, (layer.args[0], fake), {})


def _insert_before_operands(
    rewriter: GraphRewriter, entry: WeightEntry, module: Quantizer, layers: list[fx.Node]
) -> None:
    weight = bind(layers[0])["weight"]
    fake = rewriter.call_module(
        entry.path, module, (weight,), after=weight, scope=scope_beside(layers[0])
    )
    rewriter.replace_uses(weight, fake, only=lambda user: user in layers)


def check_inserted(program: Program, entries: Iterable[WeightEntry]) -> None:
    """Check that every layer reads quantised values.

    Raises:
        PassError: One reads a float weight or a float activation.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    for entry in entries:
        for layer in entry.layers:
            node = nodes.get(layer)
            bound = {} if node is None else bind(node)
            for operand in ("input", "weight"):
                read = bound.get(operand)
                if isinstance(read, fx.Node) and op_name(read) == "mul":
                    # In training, a norm's scale goes on after the quantizer.
                    read = read.all_input_nodes[0]
                if not isinstance(read, fx.Node) or op_name(read) not in _QUANTIZED:
                    raise PassError(
                        f"{layer} does not read a quantised {operand}",
                        reason="the placement promises that every integer layer does",
                        where=layer,
                    )
