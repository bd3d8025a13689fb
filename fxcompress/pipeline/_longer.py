"""Outputs whose sequence became longer by a number: virtual tokens that stay in (`keep: all`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Longer", "Outputs", "Types", "cut", "lengthened", "output_types"]

Outputs: TypeAlias = tuple[tuple[object, ...], ...]
"""Flat outputs per probe."""
Types: TypeAlias = tuple[tuple[Any, ...] | None, ...]
"""Of each flat output, its sizes: numbers, and terms of the Program's named dims."""
Longer: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""Of each flat output, the dims that became longer, and by how much."""


def output_types(program: Program) -> Types:
    """Return the sizes of a Program's flat outputs; None for what is no tensor."""
    (output,) = program.graph.find_nodes(op="output")
    leaves = output.args[0]
    assert isinstance(leaves, (tuple, list)), "a Program's output is one flat tuple"
    # Programs from files have symbols of their own: names tell which sizes are the same.
    names = {dim.symbol: dim.name for dim in program.dims.values()}
    values = (leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
    return tuple(_sizes(value, names) if isinstance(value, Tensor) else None for value in values)


def _sizes(value: Tensor, names: Mapping[str, str]) -> tuple[Any, ...]:
    shape: tuple[Any, ...] = tuple(value.shape)
    return tuple(
        _term(size.node.expr, names) if isinstance(size, torch.SymInt) else int(size)
        for size in shape
    )


def _term(expression: Any, names: Mapping[str, str]) -> Any:
    import sympy

    symbols = {
        symbol: sympy.Symbol(names.get(str(symbol), str(symbol)), integer=True)
        for symbol in expression.free_symbols
    }
    return expression.subs(symbols)


def lengthened(before: Types, after: Types) -> Longer:
    """Return which dynamic dims are longer than before by a number, whatever their size."""
    if len(before) != len(after):
        return ()
    return tuple(tuple(_dims(old, new)) for old, new in zip(before, after, strict=True))


def _dims(before: Sequence[Any] | None, after: Sequence[Any] | None) -> Iterator[tuple[int, int]]:
    if before is None or after is None or len(before) != len(after):
        return
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if not isinstance(old, int) and not isinstance(new, int):
            more = new - old
            if more.is_Integer and more > 0:
                yield dim, int(more)


def cut(outputs: Outputs, like: Outputs, longer: Longer) -> Outputs:
    """Return outputs without what stands before the places of `like`."""
    if not any(longer):
        return outputs
    return tuple(
        tuple(
            _last(value, other, dims) for value, other, dims in zip(own, its, longer, strict=True)
        )
        for own, its in zip(outputs, like, strict=True)
    )


def _last(value: object, like: object, dims: Sequence[tuple[int, int]]) -> object:
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        for dim, more in dims:
            size = like.shape[dim]
            if value.shape[dim] == size + more:
                value = value.narrow(dim, more, size)
    return value
