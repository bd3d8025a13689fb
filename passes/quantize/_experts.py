"""Experts that stay in floating point, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from fxcompress.ir.ops import op_name
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.ir import Program

__all__ = ["experts_in_float"]

_REASON: Final = (
    "its experts stay in floating point: their matrices are stacks inside one leaf, whose inner "
    "values no pass rounds (quantize.weight_only stores the matrices as integers)"
)


def experts_in_float(program: Program, ids: Mapping[fx.Node, str]) -> list[Declined]:
    """Return a refusal for every call of `fxcompress.nn.Experts` with matrices in float."""
    calls = [node for node in program.nodes if op_name(node) == "experts"]
    return [
        Declined(node=ids[node], reason=_REASON)
        for node in calls
        if not any(op_name(each) == "stack_quant" for each in node.all_input_nodes)
    ]
