"""What a graph with weights of few levels keeps to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from passes._layers.quantizer import QUANTIZERS, weight_node
from passes.quantize._weight_only.layers import input_operand

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._levels.options import LevelWeight
    from passes.quantize.binary import Sign

__all__ = ["check_signs", "check_weights"]


def check_weights(program: Program, entries: Iterable[LevelWeight], *, levels: int) -> None:
    """Check that every layer reads a quantised weight, of at most so many values per scale.

    Raises:
        PassError: One does not.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    state = program.state()
    for entry in entries:
        for layer in entry.layers:
            read = weight_node(nodes[layer]) if layer in nodes else None
            if read is None or op_name(read) not in QUANTIZERS:
                raise PassError(
                    f"{layer} does not read a quantised weight",
                    reason="every layer of the decision must",
                    where=layer,
                )
        value = state[entry.tensor].detach()
        if value.is_meta:
            continue
        with torch.no_grad():
            read_back = program.module.get_submodule(entry.path)(value)
        rows = read_back.reshape(1, -1)
        if entry.axis is not None:
            rows = read_back.movedim(entry.axis, 0).flatten(1)
        most = max(len(row.unique()) for row in rows)
        if most > levels:
            raise PassError(
                f"{entry.tensor} is read with {most} values a scale",
                reason=f"there are {levels}",
                where=entry.tensor,
            )


def check_signs(program: Program, signs: Iterable[Sign]) -> None:
    """Check that layers read signs.

    Raises:
        PassError: One does not.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    for sign in signs:
        for layer in sign.layers:
            read = bind(nodes[layer]).get(input_operand(nodes[layer])) if layer in nodes else None
            if not isinstance(read, fx.Node) or op_name(read) != "binarize":
                raise PassError(
                    f"{layer} does not read signs",
                    reason="every layer of the decision must",
                    where=layer,
                )
