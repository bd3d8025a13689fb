"""What of a block follows its tokens: data, per-token values from elsewhere, and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from fxcompress.ir.ops import bind, is_scalar, op_name, op_spec
from passes.depth._blocks import Region, ends

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Gathered", "Tokens", "TokensError", "is_causal", "size_text", "tokens_of"]

_RANK: Final = 3
# Besides element-wise ops: the reader takes a value that lines up with its result from the right.
_ALIGNED: Final = frozenset({"where", "masked_fill", "sdpa", "logical_and"})
_TRIANGLES: Final = frozenset({"tril", "triu"})
_ORDERING: Final = frozenset({"le", "lt", "ge", "gt"})
_SHAPED: Final = frozenset({"view", "reshape", "expand", "unflatten", "repeat"})


class TokensError(Exception):
    """A block cannot be routed: why, and the nodes that explain it."""

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.nodes = reason, nodes


@dataclass(frozen=True)
class Gathered:
    """A value with an entry per token that a node of the block reads.

    Attributes:
        reader: Who reads it.
        value: What is read.
        rank: The rank of what it lines up with.
        dims: Which of its dims, counted from the end (−1 is the last), are tokens.
    """

    reader: fx.Node
    value: fx.Node
    rank: int
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """What of a block follows its tokens.

    Attributes:
        data: Nodes of the block that are computed from the state's values.
        gathered: What they read per token from elsewhere.
    """

    data: frozenset[fx.Node]
    gathered: tuple[Gathered, ...]


def tokens_of(region: Region) -> Tokens:
    """Return what of a block follows its tokens.

    Raises:
        TokensError: It cannot be routed.
    """
    entry, _ = ends(region)
    state = entry.meta["val"]
    if state.dim() != _RANK or not state.is_floating_point():
        raise TokensError("its state is no [batch, tokens, width]", entry)
    if any(op_name(node) == "top_tokens" for node in region.nodes):
        raise TokensError("it is routed already", entry)
    data = _data(region, entry)
    tokens = size_text(state.shape[1])
    _check_numbers(region, data, tokens, state)
    gathered = tuple(_gathered(region, data, tokens, state))
    return Tokens(frozenset(data), gathered)


def size_text(size: Any) -> str:
    """Return a size as text, by which sizes are compared."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _data(region: Region, entry: fx.Node) -> set[fx.Node]:
    """Return the tensors that are computed from the state's values, not from its sizes alone."""
    found = {entry}
    for node in region.nodes:
        if not is_scalar(node) and any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found - {entry}


def _check_numbers(region: Region, data: set[fx.Node], tokens: str, state: Tensor) -> None:
    """Refuse a number of tokens that is fixed and also a number of something else."""
    if not tokens.isdigit():
        return
    shaped = [node for node in region.nodes if node in data and _literals(node, int(tokens))]
    if not shaped:
        return
    widths = {int(state.shape[2])} if isinstance(state.shape[2], int) else set()
    for node in region.nodes:
        if node.op == "call_module" and (owner := node.graph.owning_module) is not None:
            for parameter in owner.get_submodule(str(node.target)).parameters():
                widths.update(map(int, parameter.shape))
    if int(tokens) in widths:
        raise TokensError(
            f"{tokens} is its number of tokens and one of its widths, so that sizes cannot be "
            "told apart: declare the tokens dynamic",
            shaped[0],
        )


def _literals(node: fx.Node, size: int) -> bool:
    if op_name(node) not in _SHAPED:
        return False
    flat: list[Any] = []
    fx.node.map_aggregate((node.args[1:], node.kwargs), flat.append)
    return any(type(each) is int and each == size for each in flat)


def _gathered(region: Region, data: set[fx.Node], tokens: str, state: Tensor) -> Iterator[Gathered]:
    entry, _ = ends(region)
    for node in region.nodes:
        if node not in data:
            continue
        for value in dict.fromkeys(node.all_input_nodes):
            if value in data or value is entry:
                continue
            found = value.meta.get("val")
            if not isinstance(found, Tensor) or (value.op == "get_attr" and found.dim() < 1):
                continue
            dims = tuple(
                dim - found.dim()
                for dim, size in enumerate(found.shape)
                if size_text(size) == tokens
            )
            if not dims or _is_weight(node, value):
                continue
            yield _checked(node, value, found, dims, state)


def _is_weight(node: fx.Node, value: fx.Node) -> bool:
    """Whether a value is a weight that only happens to have as many rows as there are tokens."""
    return value.op == "get_attr" and op_name(node) in ("linear", "addmm", "matmul", "layer_norm")


def _checked(
    node: fx.Node, value: fx.Node, found: Tensor, dims: tuple[int, ...], state: Tensor
) -> Gathered:
    """Return a value to gather.

    Raises:
        TokensError: How it lines up with the tokens is not known.
    """
    result = node.meta["val"]
    spec = op_spec(op_name(node))
    aligned = op_name(node) in _ALIGNED or (spec is not None and spec.kind == "elementwise")
    fits = isinstance(result, Tensor) and size_text(result.shape[0]) == size_text(state.shape[0])
    # Of all that is read so, the last three dims at most are tokens, queries and keys.
    if not aligned or not fits or len(dims) > 2 or found.dim() > result.dim():
        raise TokensError(
            "it reads a value for each token in a way that cannot be gathered", node, value
        )
    return Gathered(node, value, result.dim(), dims)


def is_causal(program: Program, tokens: str) -> bool:
    """Whether tokens attend to none after them, as far as attention and masks show it.

    The whole model is looked at, since a block without attention has no mask of its own.

    Args:
        program: The model.
        tokens: The number of tokens as text.
    """
    for node in program.nodes:
        if op_name(node) == "sdpa" and bind(node).get("is_causal") is True:
            return True
        if _orders(node) and _square(node.meta["val"], tokens):
            return True
    return any(map(_is_triangle, program.state().values()))


def _orders(node: fx.Node) -> bool:
    """Whether a node cuts a triangle out, or compares places with one another."""
    if op_name(node) in _TRIANGLES:
        return True
    return op_name(node) in _ORDERING and len(node.all_input_nodes) == 2


def _square(value: Any, tokens: str) -> bool:
    """Whether a value has an entry for each pair of tokens."""
    sizes = value.shape[-2:] if isinstance(value, Tensor) else ()
    return len(sizes) == 2 and all(size_text(size) == tokens for size in sizes)


def _is_triangle(value: Tensor) -> bool:
    """Whether a buffer is a mask: one number above the diagonal, and another one elsewhere."""
    if isinstance(value, nn.Parameter) or value.is_meta or value.dim() < 2:
        return False
    rows, columns = value.shape[-2:]
    if rows != columns or rows < 2 or value.numel() != rows * columns:
        return False
    above = torch.ones(rows, columns, dtype=torch.bool, device=value.device).triu(1)
    upper, lower = value.reshape(rows, columns)[above], value.reshape(rows, columns)[~above]
    return bool((upper == upper[0]).all() & (lower == lower[0]).all() & (upper[0] != lower[0]))
