"""What comes after an early exit: its nodes, what it reads, and where samples stand in that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.ir.ops import module_of, op_name

__all__ = ["Entangled", "Later", "check_samples", "later_of", "sample_dims"]


@dataclass(frozen=True)
class Later:
    """What is computed for the later answer of an exit alone.

    Attributes:
        choice: The node that chooses between both answers.
        early: The early answer, `[batch, classes]`.
        answer: The later one.
        nodes: In graph order.
        operands: The tensors from outside that are read, also for the sizes read of them. Tensors
            that are made of the size of the batch alone, such as the numbers of its samples, are
            none: they are made again.
        sizes: Numbers from outside that are a size of such a tensor: number -> (tensor, dim).
    """

    choice: fx.Node
    early: fx.Node
    answer: fx.Node
    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    sizes: Mapping[fx.Node, tuple[fx.Node, int]]


class Entangled(Exception):
    """Why samples cannot leave the batch one by one: the reason, and the node that shows it."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def later_of(choice: fx.Node) -> Later:
    """Return what only the later answer of an exit needs."""
    early, answer = cast(Sequence[fx.Node], choice.args)
    region = _only_for(answer, choice)
    nodes = tuple(node for node in choice.graph.nodes if node in region)
    outer = list(_outer(nodes, region))
    read = _reading(choice.graph, _name(early.meta["val"].shape[0]))
    tensors = [node for node in outer if node in read]
    found = dict.fromkeys(tensors)
    sizes: dict[fx.Node, tuple[fx.Node, int]] = {}

    def need(node: fx.Node) -> None:
        if node.op == "get_attr" or node in sizes:
            return
        if node in read:
            found[node] = None
        elif (place := _place_of(node, tensors)) is not None:
            sizes[node] = place
        else:
            for each in node.all_input_nodes:
                need(each)

    for node in outer:
        need(node)
    return Later(choice, early, answer, nodes, tuple(found), sizes)


def sample_dims(later: Later) -> tuple[int | None, ...]:
    """Return for each operand the dimension that samples stand in, None for one that has none.

    Samples are what the first dimension of the early answer counts.

    Raises:
        Entangled: It is not known where they are.
    """
    batch = _batch(later)
    return tuple(_sample_dim(node, batch) for node in later.operands)


def check_samples(later: Later) -> None:
    """Check that each sample can be computed without the others.

    Every tensor that is computed from samples must hold them in one of its dimensions, so that none
    of it is about several. Operators that mix along that dimension need a run to be found.

    Raises:
        Entangled: It is not known where samples are, or what is computed of one reads others.
    """
    batch, dims = _batch(later), sample_dims(later)
    carrying = {n for n, dim in zip(later.operands, dims, strict=True) if dim is not None}
    for node in later.nodes:
        if _tensors(node) and any(source in carrying for source in node.all_input_nodes):
            _check_carries(node, batch)
            carrying.add(node)
    early, answer = later.early.meta["val"], later.answer.meta["val"]
    if _mentions(answer, batch) != [0] or answer.dtype != early.dtype:
        raise Entangled("the later answer is not of the early one's type", later.answer)


def _only_for(late: fx.Node, choice: fx.Node) -> set[fx.Node]:
    """Return what is computed for the later answer alone."""
    found: set[fx.Node] = set()
    pending = [late]
    while pending:
        node = pending.pop()
        if node in found or node.op in ("placeholder", "output"):
            continue
        if all(user in found or (user is choice and node is late) for user in node.users):
            found.add(node)
            # An operand that has other users inside comes again through the last of them.
            pending.extend(node.all_input_nodes)
    return found


def _outer(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> Iterator[fx.Node]:
    seen: set[fx.Node] = set()
    for node in nodes:
        for each in node.all_input_nodes:
            if each not in inside and each not in seen and each.op != "get_attr":
                seen.add(each)
                yield each


def _reading(graph: fx.Graph, batch: str | None) -> set[fx.Node]:
    """Return the tensors that can be read from outside: all but those made of the batch's size."""
    found: set[fx.Node] = set()
    holding: set[fx.Node] = set()
    for node in graph.nodes:
        if not _tensors(node):
            continue
        if node.op == "placeholder" or not holding.isdisjoint(node.all_input_nodes):
            holding.add(node)
        counted = batch is not None and any(_mentions(each, batch) for each in _tensors(node))
        if _is_tensor(node) and (node in holding or not counted):
            found.add(node)
    return found


def _place_of(node: fx.Node, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """Return a tensor and its dimension that has the size that a node is."""
    size = node.meta.get("val")
    if not isinstance(size, torch.SymInt):
        return None
    for tensor in tensors:
        sizes: Sequence[Any] = tensor.meta["val"].shape
        for dim, each in enumerate(sizes):
            if isinstance(each, torch.SymInt) and each.node.expr == size.node.expr:
                return tensor, dim
    return None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _name(size: Any) -> str | None:
    """Return the symbol that a dynamic size is, None for a number or a formula."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return str(expression) if getattr(expression, "is_Symbol", False) else None


def _batch(later: Later) -> str:
    size = later.early.meta["val"].shape[0]
    batch = _name(size)
    if batch is None:
        raise Entangled(f"the size of the batch is no free number but {size}", later.early)
    return batch


def _mentions(value: Tensor, batch: str) -> list[int]:
    """Return the dimensions whose size depends on the number of samples."""
    sizes: Sequence[Any] = value.shape
    return [
        dim
        for dim, size in enumerate(sizes)
        if isinstance(size, torch.SymInt) and batch in map(str, size.node.expr.free_symbols)
    ]


def _sample_dim(node: fx.Node, batch: str) -> int | None:
    value = node.meta["val"]
    found = _mentions(value, batch)
    if not found:
        return None
    if len(found) > 1:
        raise Entangled("samples stand in several of its dimensions", node)
    if _name(value.shape[found[0]]) != batch:
        raise Entangled(f"samples share dimension {found[0]} with something else", node)
    return found[0]


def _check_carries(node: fx.Node, batch: str) -> None:
    for value in _tensors(node):
        found = _mentions(value, batch)
        if not found:
            raise Entangled("it is computed from all samples of a batch at once", node)
        if len(found) > 1:
            raise Entangled("it compares samples of a batch with each other", node)
    if op_name(node) == "batch_norm" and _of_the_batch(node):
        raise Entangled("it normalises by the mean and the variance of the batch", node)


def _of_the_batch(node: fx.Node) -> bool:
    """Whether a batch norm in eval mode takes its statistics from what it reads."""
    if node.op == "call_module":
        return getattr(module_of(node), "running_mean", None) is None
    given = dict(zip(("input", "running_mean", "running_var", "weight", "bias", "training"),
                     node.args, strict=False))  # fmt: skip
    given |= node.kwargs
    return given.get("running_mean") is None or bool(given.get("training", False))
