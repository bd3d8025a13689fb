"""What a dimension of a tensor is made of: axes, products and concatenations of them.

    Term ::= Axis | Product(Term, …) | Concat(Term, …)

`[batch, 12 · 64]` after a reshape of `[batch, 12, 64]` has the term `Product(head, width)`; the
result of `cat([a, b], 1)` has `Concat(a, b)`. A size-1 dimension is the empty product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes._polynomial import Polynomial
from fxcompress.axes.roles import Role

__all__ = [
    "Axis", "Concat", "Frozen", "Place", "Product", "Role", "Term", "axes_of", "kept", "mask",
    "polynomial", "positions", "show", "size_of",
]  # fmt: skip


@dataclass(frozen=True)
class Frozen:
    """Why an axis cannot change: the reason, and the node that gave it."""

    reason: str
    node: str
    cause: Literal["input", "output", "unknown", "rule"] = "rule"

    def __str__(self) -> str:
        return f"{self.reason} ({self.node})" if self.node else self.reason


@dataclass(frozen=True, eq=False)
class Axis:
    """An independent dimension: wherever it occurs, the same index means the same thing.

    Attributes:
        id: Number within one analysis, in graph order.
        size: How many indices it has (at example sizes, where it is dynamic).
        name: The first parameter dimension that it occurs in, such as `layer1.0.conv1.weight[0]`.
        kind: What it is in the model: `channel`, `neuron`, `head`, `kv_group`, `head_width`,
            `residual`, `embedding`, `expert`, or `other`.
        frozen: Why it cannot change, or None.
        statistics: Whether a mean, a norm or a softmax is taken over it.
        places: Every parameter and buffer dimension in which it occurs.
    """

    id: int
    size: int
    name: str = ""
    kind: str = "other"
    frozen: Frozen | None = None
    statistics: bool = False
    places: tuple[Place, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.name or f"axis{self.id}"


@dataclass(frozen=True)
class Product:
    """Factors in row-major order, outermost first; without any, a dimension of size 1."""

    factors: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Concat:
    """Parts one after another.

    One of single indices has no axis; `frozen` says why it cannot change.
    """

    parts: tuple[Term, ...]
    frozen: Frozen | None = field(default=None, compare=False, repr=False)


Term: TypeAlias = Axis | Product | Concat
_NO_SIZES: Mapping[Axis, int] = {}


@dataclass(frozen=True)
class Place:
    """A dimension of a parameter or buffer: its qualified name, the dimension and its term.

    `role` says what the dimension does for the axis: `out` makes its activations (a weight's
    rows), `in` reads them (its columns), `scale` and `bias` act on each index alone.
    """

    tensor: str
    dim: int
    term: Term = field(repr=False)
    role: Role = "other"

    def __str__(self) -> str:
        return f"{self.tensor}[{self.dim}]"


def axes_of(term: Term) -> Iterator[Axis]:
    """Yield the axes of a term, outermost and first ones first, as often as they occur."""
    if isinstance(term, Axis):
        yield term
    else:
        for each in term.factors if isinstance(term, Product) else term.parts:
            yield from axes_of(each)


def size_of(term: Term, sizes: Mapping[Axis, int] = _NO_SIZES) -> int:
    """Return the size of a dimension, at example sizes or where `sizes` gives axes others."""
    if isinstance(term, Axis):
        return sizes.get(term, term.size)
    if isinstance(term, Concat):
        return sum(size_of(part, sizes) for part in term.parts)
    result = 1
    for factor in term.factors:
        result *= size_of(factor, sizes)
    return result


def polynomial(term: Term) -> Polynomial:
    """Return the size of a term as a polynomial in the sizes of its free axes."""
    if isinstance(term, Axis):
        return Polynomial.constant(term.size) if term.frozen else Polynomial.size_of(term.id)
    if isinstance(term, Concat):
        return Polynomial.total(map(polynomial, term.parts))
    result = Polynomial.constant(1)
    for factor in term.factors:
        result = result * polynomial(factor)
    return result


def mask(
    term: Term, keep: Mapping[Axis, NDArray[np.int64]], sizes: Mapping[Axis, int] = _NO_SIZES
) -> NDArray[np.bool_]:
    """Return, for each position along a dimension, whether it stays.

    `sizes` gives dynamic axes the size they have in a run.
    """
    if isinstance(term, Axis):
        chosen = np.zeros(sizes.get(term, term.size), dtype=bool)
        chosen[keep.get(term, slice(None))] = True
        return chosen
    if isinstance(term, Concat):
        return np.concatenate([mask(part, keep, sizes) for part in term.parts])
    result = np.ones(1, dtype=bool)
    for factor in term.factors:
        result = np.logical_and.outer(result, mask(factor, keep, sizes)).ravel()
    return result


def kept(
    term: Term, keep: Mapping[Axis, NDArray[np.int64]], sizes: Mapping[Axis, int] = _NO_SIZES
) -> NDArray[np.int64]:
    """Return the positions along a dimension that stay when axes keep only some indices.

    Args:
        term: The dimension.
        keep: Axis -> its kept indices, ascending. Other axes stay whole.
        sizes: The sizes of dynamic axes where they are not those of `Axis.size`.
    """
    return np.flatnonzero(mask(term, keep, sizes)).astype(np.int64)


def positions(term: Term, axis: Axis) -> NDArray[np.int64]:
    """Return the positions along a dimension that belong to each index of an axis.

    Returns:
        `[axis.size, n]`, ascending in each row.
    """
    return _positions(term).get(axis, np.empty((axis.size, 0), dtype=np.int64))


@lru_cache(maxsize=1024)
def _positions(term: Term) -> dict[Axis, NDArray[np.int64]]:
    """Return the positions of every axis of a term, found in one walk."""
    if isinstance(term, Axis):
        return {term: np.arange(term.size, dtype=np.int64)[:, None]}
    found: dict[Axis, list[NDArray[np.int64]]] = {}
    if isinstance(term, Concat):
        offset = 0
        for part in term.parts:
            for axis, inside in _positions(part).items():
                found.setdefault(axis, []).append(inside + offset)
            offset += size_of(part)
    else:
        sizes = [size_of(factor) for factor in term.factors]
        for place, factor in enumerate(term.factors):
            before = np.arange(prod(sizes[:place]), dtype=np.int64)[:, None, None]
            after = np.arange(prod(sizes[place + 1 :]), dtype=np.int64)
            for axis, inside in _positions(factor).items():
                # row-major: (outer · size + position) · inner size + inner
                rows = before * sizes[place] + inside[:, None, :, None]
                spread = rows * len(after) + after
                found.setdefault(axis, []).append(spread.reshape(axis.size, -1))
    return {axis: each[0] if len(each) == 1 else _merged(each) for axis, each in found.items()}


def _merged(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Join positions of an axis that occurs more than once; where factors cross, only once."""
    joined = np.sort(np.concatenate(parts, axis=1), axis=1)
    if not (np.diff(joined, axis=1) == 0).any():
        return joined
    return np.stack([np.unique(row) for row in joined])


def show(term: Term) -> str:
    """Return a term as people write it: `12·64`, `[32 | 64]`, with axis names where known."""
    if isinstance(term, Axis):
        return f"{term.name or 'fixed'}({term.size})"
    if isinstance(term, Concat):
        return "[" + " | ".join(map(show, term.parts)) + "]"
    return " · ".join(map(show, term.factors)) if term.factors else "1"
