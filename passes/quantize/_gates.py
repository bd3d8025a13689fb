"""SiLU in integers: x · σ(x) as an integer look-up and an integer product.

σ(x) lies between 0 and 1, so that its scale is 1/256 whatever the data; that rounding changes the
result by at most |x|/512.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from fxcompress.ir.ops import op_name
from fxcompress.nn import FakeQuantize
from passes._paths import free_path, path_beside, scope_beside
from passes.quantize.static import GateEntry

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize._placement import Placement
    from passes.quantize._targets import PlacementRules

__all__ = ["gate_entries", "insert_gates"]

_SCALE: Final = 1 / 256


def gate_entries(
    placement: Placement, rules: PlacementRules, ids: Mapping[fx.Node, str], taken: set[str]
) -> tuple[GateEntry, ...]:
    """Return the SiLUs whose operand and result everybody reads quantised."""
    if not rules.gates:
        return ()
    quantised = {
        node for site in placement.sites for node, users in site.calls.items() if users is None
    }
    found = []
    for node in ids:
        if op_name(node) == "silu" and node in quantised and node.args[0] in quantised:
            path = free_path(path_beside(ids[node], "_gate_fq"), taken)
            taken.add(path)
            found.append(GateEntry(node=ids[node], path=path))
    return tuple(found)


def insert_gates(rewriter: GraphRewriter, entries: Iterable[GateEntry]) -> None:
    """Write each SiLU as σ, its quantizer and a product; its operand is quantised already."""
    for entry in entries:
        node = rewriter.node(entry.node)
        source, scope = node.args[0], scope_beside(node)
        gate = rewriter.call_function(torch.sigmoid, (source,), after=node, scope=scope)
        quantizer = FakeQuantize(8, signed=False, symmetric=False)
        quantizer.scale.fill_(_SCALE)
        rounded = rewriter.call_module(entry.path, quantizer, (gate,), after=gate, scope=scope)
        product = rewriter.call_function(torch.mul, (source, rounded), after=rounded, scope=scope)
        rewriter.replace_uses(node, product)
        rewriter.remove(node)
