"""Put the quantizers of a mixed decision into the graph, and check their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.ir.walk import upstream
from passes.quantize import _insert
from passes.quantize._gates import insert_gates
from passes.quantize._weight_only import insert as weight_only
from passes.quantize.mixed import FLOAT

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.mixed import MixedDecision

__all__ = ["check", "insert"]


def insert(rewriter: GraphRewriter, decision: MixedDecision) -> None:
    """Insert the quantizers and set the weights."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    if decision.weight_only is not None:
        weight_only.fold(rewriter, decision.weight_only.folds, decision.arrays)
        weight_only.insert(rewriter, decision.weight_only.weights, decision.arrays)
    if decision.static is not None:
        _insert.insert_activations(rewriter, decision.static.activations)
        insert_gates(rewriter, decision.static.gates)
        _insert.insert_weights(rewriter, decision.static.weights, decision.arrays)


def check(program: Program, decision: MixedDecision) -> None:
    """Check that every layer reads its weight in the bits that it was given.

    Raises:
        PassError: One does not.
    """
    if decision.weight_only is not None:
        weight_only.check(program, decision.weight_only.weights, decision.arrays)
    if decision.static is not None:
        _insert.check_inserted(program, decision.static.weights)
    nodes = {name: node for node, name in node_ids(program).items()}
    for entry in decision.layers:
        for layer in entry.layers:
            read = [n for n in nodes[layer].all_input_nodes if op_name(n) == "fake_quant"]
            widths: list[Any] = [
                program.module.get_submodule(str(node.target)).bits
                for node in read
                if not _from_activations(node)
            ]
            wanted = [] if entry.bits == FLOAT else [entry.bits]
            if widths != wanted:
                raise PassError(
                    f"{layer} reads its weight in {widths or 'float'}, not in {wanted or 'float'}",
                    reason="the budget was solved for these bits",
                    where=layer,
                )


def _from_activations(node: fx.Node) -> bool:
    """Whether a quantizer's operand depends on an input."""
    return any(each.op == "placeholder" for each in upstream(node))
