"""Dimensions while rules run: variables, what they are bound to, and what is known of them.

A dimension is a tuple of factors in row-major order; a factor is a `Variable` or a `Joined` (a
concatenation of dimensions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from fxcompress.axes._sizes import ONE, Size, SizeReader, times
from fxcompress.axes.terms import Frozen

__all__ = ["UNIT", "Dim", "Dims", "Factor", "Joined", "Variable"]


class Variable:
    """An unknown: free, frozen, or bound to a dimension."""

    __slots__ = ("bound", "frozen", "number", "size", "statistics", "tags")

    def __init__(self, number: int, size: Size) -> None:
        self.number = number
        self.size = size
        self.bound: Dim | None = None
        self.frozen: Frozen | None = None
        self.tags: frozenset[str] = _NO_TAGS
        self.statistics = False

    def __repr__(self) -> str:
        return f"v{self.number}({self.size[0]}{''.join(self.size[1])})"


class Joined:
    """Dimensions one after another; its size is static.

    One of single indices has no variable that could be frozen, so it knows the reason itself, and
    the node that made it.
    """

    __slots__ = ("frozen", "node", "parts", "size")

    def __init__(self, parts: tuple[Dim, ...], size: Size, node: str) -> None:
        self.parts = parts
        self.size = size
        self.node = node
        self.frozen: Frozen | None = None

    def __repr__(self) -> str:
        return f"[{' | '.join(map(repr, self.parts))}]"


Factor: TypeAlias = Variable | Joined
Dim: TypeAlias = tuple[Factor, ...]
UNIT: Dim = ()
_NO_TAGS: frozenset[str] = frozenset()


class Dims:
    """Makes, reads and marks dimensions. `node` names what is being read, for reasons."""

    def __init__(self) -> None:
        self.sizes = SizeReader()
        self.count = 0
        self.node = ""

    # -- making ----------------------------------------------------------------------------------

    def variable(self, size: Size) -> Variable:
        """Return a new free variable."""
        self.count += 1
        return Variable(self.count, size)

    def fresh(self, size: Size) -> Dim:
        """Return a new dimension: nothing for size 1."""
        return UNIT if size == ONE else (self.variable(size),)

    def fixed(self, size: Size, reason: str | Frozen) -> Dim:
        """Return a new frozen dimension."""
        dim = self.fresh(size)
        self.freeze(dim, reason)
        return dim

    def join(self, parts: Sequence[Dim]) -> Dim:
        """Return the concatenation of static dimensions."""
        flat: list[Dim] = []
        merged: list[Joined] = []
        for part in parts:
            part = self.flat(part)
            if len(part) == 1 and isinstance(part[0], Joined):
                merged.append(part[0])
                flat += part[0].parts
            elif self.size(part) != (0, ()):
                flat.append(part)
        if len(flat) == 1:
            return flat[0]
        made = Joined(tuple(flat), (sum(self.size(part)[0] for part in flat), ()), self.node)
        if not any(True for _ in self.leaves((made,))):
            made.frozen = next((each.frozen for each in merged if each.frozen), None)
        return (made,)

    # -- reading ---------------------------------------------------------------------------------

    def flat(self, dim: Dim) -> Dim:
        """Return a dimension with every bound variable replaced."""
        for factor in dim:
            if isinstance(factor, Variable) and factor.bound is not None:
                break
        else:
            return dim
        found: list[Factor] = []
        for factor in dim:
            if isinstance(factor, Variable) and factor.bound is not None:
                factor.bound = self.flat(factor.bound)
                found += factor.bound
            else:
                found.append(factor)
        return tuple(found)

    def size(self, dim: Dim) -> Size:
        """Return the size of a dimension."""
        if len(dim) == 1:
            return dim[0].size
        result = ONE
        for factor in dim:
            result = times(result, factor.size)
        return result

    def leaves(self, dim: Dim) -> Iterable[Variable]:
        """Yield the variables of a dimension."""
        for factor in self.flat(dim):
            if isinstance(factor, Variable):
                yield factor
            else:
                for part in factor.parts:
                    yield from self.leaves(part)

    def is_frozen(self, dim: Dim) -> bool:
        """Whether nothing in a dimension can change."""
        return all(leaf.frozen is not None for leaf in self.leaves(dim))

    # -- saying ----------------------------------------------------------------------------------

    def freeze(self, dim: Dim, reason: str | Frozen) -> None:
        """Fix every variable of a dimension; the first reason stays."""
        for holder in self._holders(dim):
            if holder.frozen is None:
                holder.frozen = reason if isinstance(reason, Frozen) else Frozen(reason, self.node)

    def _holders(self, dim: Dim) -> Iterator[Factor]:
        """Yield the variables of a dimension, and concatenations without any."""
        for factor in self.flat(dim):
            if isinstance(factor, Variable):
                yield factor
                continue
            inner = [each for part in factor.parts for each in self._holders(part)]
            yield from inner or (factor,)

    def tag(self, dim: Dim, tag: str) -> None:
        """Note what a dimension is in the model."""
        for leaf in self.leaves(dim):
            if tag not in leaf.tags:
                leaf.tags = leaf.tags | {tag}

    def tag_heads(self, dims: Iterable[Dim]) -> None:
        """Note heads; where keys are copied for several queries, those copied are groups."""
        leaves = {leaf for dim in dims for leaf in self.leaves(dim)}
        copied = {leaf for leaf in leaves if "copy" in leaf.tags}
        for leaf in leaves:
            grouped = bool(copied) and leaf not in copied
            self.tag((leaf,), "kv_group" if grouped else "head")

    def span(self, dim: Dim) -> None:
        """Note that a statistic is taken over a dimension."""
        for leaf in self.leaves(dim):
            leaf.statistics = True
