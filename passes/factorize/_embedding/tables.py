"""The tables of words of a graph, who reads them, and which ids they are read with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import DataError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.ir.walk import upstream
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.operands import weight_operand
from passes._paths import free_path, path_beside
from passes.factorize.embedding import Table
from passes.quantize._weight_only.layers import readers_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection
    from fxcompress.pipeline.context import Batch

__all__ = ["count_tokens", "find_tables", "reads_inputs"]

_MOVES: Final = frozenset(
    {"view", "reshape", "flatten", "unsqueeze", "squeeze", "to", "contiguous", "clone", "getitem"}
)


def find_tables(
    program: Program, options: Selection, suffix: str, *, inputs: bool
) -> tuple[tuple[Table, ...], tuple[Declined, ...]]:
    """Return the tables of the selected embeddings, and why others stay as they are.

    Args:
        program: The model.
        options: The selection.
        suffix: What paths of new parts end in.
        inputs: Only tables that are read with ids of the inputs.

    Raises:
        SelectorError: The selection fits no embedding, or not as many as expected.
    """
    ids = node_ids(program)
    nodes = [node for node in program.nodes if op_name(node) == "embedding"]
    selected = set(Selector.of(options).select(program, nodes))
    sources: dict[str, list[fx.Node]] = {}
    declined: list[Declined] = []
    for node in nodes:
        operand = weight_operand(program, node, "weight")
        reason = _obstacle(node, operand, selected, inputs=inputs)
        if reason:
            declined.append(Declined(node=ids[node], reason=reason))
        else:
            assert operand is not None, "an obstacle otherwise"
            sources.setdefault(operand.tensor, []).append(node)
    readers, state = readers_of(program), program.state()
    taken = {*state, *(path for path, _ in program.module.named_modules())}
    found = []
    for tensor, embeddings in sources.items():
        heads = [node for node in readers[tensor] if node not in embeddings]
        others = [node for node in heads if not _is_head(program, node, tensor)]
        if others:
            because = tuple(ids[node] for node in others)
            reason = f"its table {tensor} is also read by something that is no output layer"
            declined += [
                Declined(node=ids[node], reason=reason, because_of=because) for node in embeddings
            ]
            continue
        path = free_path(path_beside(tensor.removesuffix(".weight"), suffix), taken)
        taken.add(path)
        rows, width = state[tensor].shape
        found.append(
            Table(
                tensor=tensor,
                path=path,
                nodes=tuple(ids[node] for node in embeddings),
                heads=tuple(ids[node] for node in heads),
                rows=int(rows),
                width=int(width),
            )
        )
    return tuple(found), tuple(declined)


def _obstacle(node: fx.Node, operand: Any, selected: set[fx.Node], *, inputs: bool) -> str:
    if node not in selected:
        return "it is not selected"
    if operand is None or operand.picked or operand.dims != (0, 1):
        return "its table is computed in the graph"
    bound = bind(node)
    if isinstance(bound.get("weight"), fx.Node) and bound["weight"].op != "get_attr":
        return f"its table is read through {op_name(bound['weight'])}"
    if bound.get("max_norm") is not None:
        return "it renormalises its rows"
    if inputs and not reads_inputs(node):
        return "its ids are not those of an input"
    return ""


def _is_head(program: Program, node: fx.Node, tensor: str) -> bool:
    """Whether a node is `x · tableᵀ`: a linear layer on the table itself."""
    if op_name(node) != "linear":
        return False
    read = bind(node).get("weight")
    if isinstance(read, fx.Node) and read.op != "get_attr":
        return False
    operand = weight_operand(program, node, "weight")
    return operand is not None and operand.tensor == tensor and operand.dims == (0, 1)


def reads_inputs(node: fx.Node) -> bool:
    """Return whether an embedding is read with an input, but for its shape."""
    index = bind(node)["input"]
    while isinstance(index, fx.Node) and op_name(index) in _MOVES:
        index = index.all_input_nodes[0]
    return isinstance(index, fx.Node) and index.op == "placeholder"


@torch.no_grad()
def count_tokens(
    program: Program, tables: Sequence[Table], batches: Iterable[Batch]
) -> dict[str, Counter[int]]:
    """Return tensor -> how often each id is read; nothing but the ids is computed.

    Raises:
        DataError: There are no batches, or an id is out of range.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    indices = {t.tensor: [bind(nodes[name])["input"] for name in t.nodes] for t in tables}
    wanted = {each for found in indices.values() for each in found}
    needed = wanted.union(*(upstream(each) for each in wanted))
    inputs = [node for node in program.nodes if node.op == "placeholder"]
    order = [node for node in program.nodes if node in needed and node.op != "placeholder"]
    runner = fx.Interpreter(program.module, garbage_collect_values=False)
    found: dict[str, Counter[int]] = {table.tensor: Counter() for table in tables}
    seen = 0
    for batch in batches:
        leaves = program.signature.leaves_of(batch)
        runner.env = dict(zip(inputs, leaves, strict=True))
        for node in order:
            runner.env[node] = runner.run_node(node)
        seen += 1
        for table in tables:
            for index in indices[table.tensor]:
                found[table.tensor].update(_ids(runner.env[index], table))
    if not seen:
        raise DataError("there is no text to count tokens in", hint="name a split with samples")
    return found


def _ids(value: Tensor, table: Table) -> list[int]:
    ids: list[int] = value.flatten().tolist()
    if ids and not 0 <= min(ids) <= max(ids) < table.rows:
        raise DataError(
            f"token id {max(ids)} is no row of {table.tensor}",
            reason=f"it has {table.rows} rows",
            hint="take the tokenizer that belongs to the model",
        )
    return ids
