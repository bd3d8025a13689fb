"""Cut tables of words, or put two layers in the place of each."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.errors import PassError
from fxcompress.ir.ops import bind
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.factorize.embedding import EmbeddingDecision, Table

__all__ = ["check_tables", "insert"]


def insert(rewriter: GraphRewriter, decision: EmbeddingDecision) -> None:
    """Do what was decided for each table."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)
    for table in decision.tables:
        if table.rank is not None:
            _factorise(rewriter, table, decision)
        elif table.kept is not None:
            kept = torch.as_tensor(decision.arrays[f"{table.path}.kept"])
            _cut(rewriter, table, kept, decision.fill)


# -- fewer tokens ------------------------------------------------------------------------------


def _cut(rewriter: GraphRewriter, table: Table, kept: Tensor, fill: float) -> None:
    """Keep the rows of some tokens; ids are looked up before, and logits put back after."""
    assert table.kept is not None, "tokens are dropped"
    assert table.unknown is not None, "and read as something"
    value = rewriter.get_tensor(table.tensor)
    rows = value[kept.to(value.device)]
    if table.unknown == table.kept:
        dropped = torch.ones(table.rows, dtype=torch.bool)
        dropped[kept] = False
        mean = value[dropped.to(value.device)].double().mean(0, keepdim=True).to(value.dtype)
        rows = torch.cat([rows, mean])
    places = torch.full((table.rows,), table.unknown)
    places[kept] = torch.arange(table.kept)
    ids = f"{table.path}_ids"
    rewriter.add_tensor(ids, places, trainable=False)
    for name in table.nodes:
        node = rewriter.node(name)
        index: Any = bind(node)["input"]
        scope = scope_beside(node)
        read = rewriter.get_attr(ids, before=node, scope=scope)
        new = rewriter.call_function(operator.getitem, (read, index), after=read, scope=scope)
        _swap(rewriter, node, index, new)
        _resize(rewriter, node, len(rows), places)
    for name in table.heads:
        _expand(rewriter, table, rewriter.node(name), kept, len(rows), fill)
    rewriter.set_tensor(table.tensor, rows, tied=True)


def _swap(rewriter: GraphRewriter, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
    rewriter.replace_uses(old, new, only=lambda user: user is node)


def _resize(rewriter: GraphRewriter, node: fx.Node, rows: int, places: Tensor) -> None:
    """Give the embedding that a node calls its number of rows, and the new padding id."""
    if node.op != "call_module":
        padding = bind(node).get("padding_idx")
        if isinstance(padding, int) and padding >= 0:
            place = int(places[padding])
            kwargs = {k: place if k == "padding_idx" else v for k, v in node.kwargs.items()}
            args = tuple(place if k == 2 else v for k, v in enumerate(node.args))
            rewriter.set_args(node, args, kwargs)
        return
    path = str(node.target)
    module: Any = rewriter.get_module(path)
    if module.num_embeddings == rows:
        return
    made = _copied(module)
    made.num_embeddings = rows
    if module.padding_idx is not None:
        made.padding_idx = int(places[module.padding_idx])
    rewriter.set_module(path, made)


def _copied(module: nn.Module) -> Any:
    """Return a module of the same tensors with attributes of its own."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    return made


def _expand(
    rewriter: GraphRewriter, table: Table, node: fx.Node, kept: Tensor, rows: int, fill: float
) -> None:
    """Let an output layer give the kept logits, and put them where they were."""
    scope = scope_beside(node)
    bias = _bias(rewriter, node)
    if bias is not None:
        value = rewriter.get_tensor(bias)
        shorter = value[kept.to(value.device)]
        rewriter.set_tensor(bias, F.pad(shorter, (0, rows - len(kept))), tied=True)
    if node.op == "call_module":
        made = _copied(rewriter.get_module(str(node.target)))
        made.out_features = rows
        rewriter.set_module(str(node.target), made)
    places = torch.full((table.rows,), rows)
    places[kept] = torch.arange(len(kept))
    name = f"{table.path}_logits"
    if not any(name == each for each, _ in rewriter.program.module.named_buffers()):
        _add_once(rewriter, name, places)
    filled = rewriter.call_function(
        F.pad, (node, (0, 1)), {"mode": "constant", "value": fill}, after=node, scope=scope
    )
    read = rewriter.get_attr(name, after=filled, scope=scope)
    whole = rewriter.call_function(torch.index_select, (filled, -1, read), after=read, scope=scope)
    rewriter.replace_uses(node, whole)


def _add_once(rewriter: GraphRewriter, name: str, value: Tensor) -> None:
    if rewriter.tree.tensor(name) is None:
        rewriter.add_tensor(name, value, trainable=False)


def _bias(rewriter: GraphRewriter, node: fx.Node) -> str | None:
    if node.op == "call_module":
        held: Any = rewriter.get_module(str(node.target))
        return None if held.bias is None else f"{node.target}.bias"
    found = bind(node).get("bias")
    return str(found.target) if isinstance(found, fx.Node) else None


# -- lower rank --------------------------------------------------------------------------------


def _factorise(rewriter: GraphRewriter, table: Table, decision: EmbeddingDecision) -> None:
    """Let embeddings be A then B, and tied output layers Bᵀ then the same A."""
    assert table.rank is not None, "the rank is lowered"
    old = rewriter.program.state()[table.tensor]
    parts = _parts(rewriter, table, old, decision)
    modules: dict[str, nn.Module | None] = dict(parts)
    for name in table.nodes:
        node = rewriter.node(name)
        scope = scope_beside(node)
        last, value = node, bind(node)["input"]
        for part in ("A", "B"):
            module, modules[part] = modules[part], None
            path = f"{table.path}.{part}"
            value = last = rewriter.call_module(path, module, (value,), after=last, scope=scope)
        rewriter.replace_uses(node, value)
    for name in table.heads:
        node = rewriter.node(name)
        scope, bound = scope_beside(node), bind(node)
        module, modules["down"] = modules["down"], None
        down = rewriter.call_module(
            f"{table.path}.down", module, (bound["input"],), after=node, scope=scope
        )
        weight = rewriter.get_attr(f"{table.path}.A.weight", after=down, scope=scope)
        bias = _bias(rewriter, node)
        args: list[Any] = [down, weight]
        last = weight
        if bias is not None:
            kept = f"{table.path}.bias"
            trainable = rewriter.program.state()[bias].requires_grad
            if rewriter.tree.tensor(kept) is None:
                rewriter.add_tensor(kept, rewriter.get_tensor(bias), trainable=trainable)
            last = rewriter.get_attr(kept, after=weight, scope=scope)
            args.append(last)
        logits = rewriter.call_function(F.linear, tuple(args), after=last, scope=scope)
        rewriter.replace_uses(node, logits)


def _parts(
    rewriter: GraphRewriter, table: Table, old: Tensor, decision: EmbeddingDecision
) -> dict[str, nn.Module]:
    """Return A, B and what an output layer has in B's place; of no values yet in a plan."""
    rank = table.rank or 0
    padding = None
    for name in table.nodes:
        node = rewriter.node(name)
        if node.op == "call_module":
            held: Any = rewriter.get_module(str(node.target))
            padding = held.padding_idx if padding is None else padding
    with torch.device("meta"):
        made: dict[str, nn.Module] = {
            "A": nn.Embedding(table.rows, rank, padding_idx=padding),
            "B": nn.Linear(rank, table.width, bias=False),
        }
        if table.heads:
            made["down"] = nn.Linear(table.width, rank, bias=False)
    for name, module in made.items():
        held = decision.arrays.get(f"{table.path}.{'A' if name == 'A' else 'B'}.weight")
        shape = module.get_parameter("weight").shape
        if held is None:
            value = torch.zeros(shape, dtype=old.dtype, device=old.device)
        else:
            value = torch.as_tensor(held).to(old.dtype).to(old.device)
            value = (value.T if name == "down" else value).reshape(shape).clone()
        module.weight = nn.Parameter(value, requires_grad=old.requires_grad)
    return made


def check_tables(after: Program, decision: EmbeddingDecision) -> None:
    """Check that tables have the rows and ranks of the decision.

    Raises:
        PassError: One has not.
    """
    state = after.state()
    for table in decision.tables:
        if table.rank is not None:
            found = state.get(f"{table.path}.A.weight")
            if found is None or found.shape != (table.rows, table.rank):
                raise PassError(f"{table.tensor} is not of rank {table.rank}", where=table.path)
            if table.tensor in state:
                raise PassError(f"the table {table.tensor} is left", where=table.path)
        elif table.kept is not None:
            rows = table.kept + (table.unknown == table.kept)
            if len(state[table.tensor]) != rows or f"{table.path}_ids" not in state:
                raise PassError(f"{table.tensor} has not the rows of {rows} tokens")
