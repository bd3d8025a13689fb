"""How long a sequence may be: where tables of positions end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind
from fxcompress.ir.walk import upstream

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.distill.prompt import Extended

__all__ = ["longest"]


def longest(
    program: Program,
    size: str,
    tables: Mapping[fx.Node, int],
    inputs: tuple[Extended, ...],
    tokens: int,
) -> int | None:
    """Return the longest sequence that positions leave, or None if they do not end.

    Args:
        program: The Program without the prompt.
        size: The name of the sequence's size.
        tables: Embeddings other than the tokens' own, with their rows.
        inputs: What the inputs hold that have this size.
        tokens: How many virtual tokens come before.

    Raises:
        UsageError: The example is longer already.
    """
    known = program.dims[size]
    limits = []
    if known.maximum is not None:
        limits.append((known.maximum, f"{size} is at most {known.maximum}"))
    names = node_ids(program)
    for node, rows in tables.items():
        first = _offset(program, node, size, inputs)
        if first is not None:
            after = f", of which the first {first} are none" if first else ""
            limits.append((rows - first, f"the table {names[node]} has {rows} rows{after}"))
    if not limits:
        return None
    most, why = min(limits)
    if known.example + tokens > most:
        raise UsageError(
            f"the positions of the model cannot be extended by {tokens}",
            reason=f"{why}, and the example has {known.example}",
            hint="use fewer virtual tokens, or shorter inputs",
        )
    return most - tokens


def _offset(program: Program, node: fx.Node, size: str, inputs: tuple[Extended, ...]) -> int | None:
    """Return the row of the first position; None where an embedding is not one of positions.

    It is one if a sequence that is longer by one reads a row that is further by one.
    """
    length = program.dims[size].example
    source = bind(node)["input"]
    if not isinstance(source, fx.Node):
        return None
    try:
        here, before = (_largest(program, source, size, n, inputs) for n in (length, length - 1))
    except (NotImplementedError, RuntimeError):
        # Tables on the meta device have no values; their names must do.
        return 0 if "position" in node_ids(program)[node] else None
    return here - length + 1 if here - before == 1 else None


def _largest(
    program: Program, source: fx.Node, size: str, length: int, inputs: tuple[Extended, ...]
) -> int:
    """Return the largest row that is read for a whole sequence of a length."""
    sizes = {name: dim.example for name, dim in program.dims.items()} | {size: length}
    entries = {each.name: each for each in inputs}
    values: dict[str, Any] = {}
    for tensor in program.signature.inputs:
        entry = entries.get(tensor.name)
        value = torch.ones(tensor.size(sizes), dtype=tensor.dtype)
        if entry is not None and entry.fill is None:
            places = torch.arange(length).reshape((-1,) + (1,) * (value.dim() - entry.dim - 1))
            value = (torch.zeros_like(value) + places).to(tensor.dtype)
        elif entry is not None:
            value.fill_(entry.fill or 0)
        values[tensor.name] = value
    needed = {source, *upstream(source)}
    runner = fx.Interpreter(program.module)
    with torch.no_grad():
        for node in program.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                runner.env[node] = values[str(node.target)]
            else:
                runner.env[node] = runner.run_node(node)
    return int(runner.env[source].max())
