"""Unification of dimensions: variables, what they are bound to, and what froze them.

While rules run, a dimension is a tuple of factors in row-major order; a factor is a `Variable` or a
`Joined` (a concatenation of dimensions). Unifying two dimensions splits and binds variables until
their factors and boundaries line up. What does not line up is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.axes._dims import UNIT, Dim, Dims, Factor, Joined, Variable
from fxcompress.axes._sizes import ONE, Size, divide, gcd, is_static

__all__ = ["UNIT", "Dim", "Joined", "Solver", "Variable"]


class Solver(Dims):
    """Unifies dimensions, regroups and cuts them."""

    def unify(self, left: Dim, right: Dim) -> None:
        """Make two dimensions one, or freeze what does not line up."""
        if left is right:
            return
        left, right = self.flat(left), self.flat(right)
        if left == right:
            return
        self._align(list(left), list(right))

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[Size]) -> list[Dim]:
        """Return the dimensions of a reshape: the same factors in row-major order, regrouped."""
        factors = [factor for dim in dims for factor in self.flat(dim)]
        result: list[Dim] = []
        stack = factors[::-1]
        for place, size in enumerate(sizes):
            group: list[Factor] = []
            need = size
            while need != ONE:
                if not stack:
                    return self._misaligned(result, group, stack, sizes[place:])
                factor = stack.pop()
                rest = divide(need, factor.size)
                if rest is not None:
                    group.append(factor)
                    need = rest
                    continue
                shared = gcd(need, factor.size)
                if shared in (ONE, (0, ())):
                    stack.append(factor)
                    return self._misaligned(result, group, stack, sizes[place:])
                stack += reversed(self.split(factor, shared))
            result.append(tuple(group))
        if stack:
            self.freeze(tuple(stack), "a reshape cuts across it")
        return result

    def _misaligned(
        self, done: list[Dim], group: list[Factor], stack: list[Factor], sizes: Sequence[Size]
    ) -> list[Dim]:
        """Match what can be matched from the right, and freeze the rest."""
        tail: list[Dim] = []
        remaining = list(sizes)
        while remaining and stack and remaining[-1] in (ONE, stack[0].size):
            size = remaining.pop()
            tail.append(UNIT if size == ONE else (stack.pop(0),))
        self.freeze((*group, *stack), "a reshape cuts across it")
        middle = [self.fixed(size, "a reshape cuts across it") for size in remaining]
        return [*done, *middle, *reversed(tail)]

    def split(self, factor: Factor, outer: Size) -> Dim:
        """Split a factor into `(outer, rest)`, row-major; `outer` divides its size."""
        inner = divide(factor.size, outer)
        assert inner is not None, f"{outer} does not divide {factor.size}"
        head, tail = self.variable(outer), self.variable(inner)
        if isinstance(factor, Variable):
            self._bind(factor, (head, tail))
            return (head, tail)
        self._rows(factor, (head,), (tail,))
        return self.flat((head, tail))

    def cut(self, dim: Dim, at: Sequence[int]) -> list[Dim]:
        """Cut a static dimension at positions; returns one part more than there are positions.

        Where a cut goes through a factor that cannot be cut there, the dimension is frozen.
        """
        parts: list[Dim] = []
        rest = self.flat(dim)
        for low, high in zip([0, *at], at, strict=False):
            first, rest = self._cut(rest, high - low)
            parts.append(first)
        return [*parts, rest]

    def _nothing(self) -> Dim:
        return (Joined((), (0, ()), self.node),)

    def _cut(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        """Return `dim[:at]` and `dim[at:]`."""
        dim = self.flat(dim)
        size = self.size(dim)[0]
        if at == 0:
            return self._nothing(), dim
        if at == size:
            return dim, self._nothing()
        head, inner = dim[0], self.size(dim[1:])[0]
        if isinstance(head, Joined) and len(dim) == 1:
            return self._cut_joined(head, at)
        if at % inner == 0:
            first, second = self._cut_factor(head, at // inner)
            return first + dim[1:], second + dim[1:]
        row = at // inner
        return self._cut_inside(dim, row, at - row * inner)

    def _cut_inside(self, dim: Dim, row: int, offset: int) -> tuple[Dim, Dim]:
        """Cut a product within one row of its outer factor: that row stands for itself."""
        outer = self.size(dim[:1])[0]
        before, rest = self._cut_factor(dim[0], row) if row else (self._nothing(), dim[:1])
        if self.size(rest)[0] > 1:
            _, after = self._cut(rest, 1)
        else:
            after = self._nothing()
        left, right = self._cut(dim[1:], offset)
        first = [before + dim[1:]] if row else []
        last = [after + dim[1:]] if outer - row - 1 else []
        return self.join([*first, left]), self.join([right, *last])

    def _cut_factor(self, factor: Factor, at: int) -> tuple[Dim, Dim]:
        if isinstance(factor, Joined):
            return self._cut_joined(factor, at)
        first, second = self.fresh((at, ())), self.fresh((factor.size[0] - at, ()))
        self._bind(factor, (Joined((first, second), factor.size, self.node),))
        return first, second

    def _cut_joined(self, joined: Joined, at: int) -> tuple[Dim, Dim]:
        first, second = self._parted(joined, at)
        if joined.frozen is not None:
            self.freeze((*first, *second), joined.frozen)
        return first, second

    def _parted(self, joined: Joined, at: int) -> tuple[Dim, Dim]:
        before: list[Dim] = []
        for place, part in enumerate(joined.parts):
            size = self.size(part)[0]
            if at < size:
                if at == 0:
                    return self.join(before), self.join(joined.parts[place:])
                first, second = self._cut(part, at)
                return self.join([*before, first]), self.join([second, *joined.parts[place + 1 :]])
            before.append(part)
            at -= size
        return self.join(before), self._nothing()

    def _align(self, left: list[Factor], right: list[Factor]) -> None:
        """Unify two factor lists of the same total size, outermost first."""
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = left.pop(), right.pop()
            if a is b:
                continue
            if a.size == b.size:
                self._unify_factors(a, b)
                left, right = self._reflat(left), self._reflat(right)
                continue
            shared = gcd(a.size, b.size)
            if shared in (ONE, (0, ())):
                self.freeze((a, b, *left, *right), "its factors do not line up")
                return
            if a.size != shared:
                left += reversed(self.split(a, shared))
                right.append(b)
            else:
                right += reversed(self.split(b, shared))
                left.append(a)
            left, right = self._reflat(left), self._reflat(right)
        if left or right:
            self.freeze((*left, *right), "its factors do not line up")

    def _reflat(self, stack: list[Factor]) -> list[Factor]:
        """Replace what was bound meanwhile in a reversed factor list."""
        return list(self.flat(tuple(stack[::-1])))[::-1]

    def _unify_factors(self, a: Factor, b: Factor) -> None:
        if isinstance(a, Variable) and isinstance(b, Variable):
            old, new = (a, b) if a.number > b.number else (b, a)
            self._bind(old, (new,))
        elif isinstance(a, Variable):
            self._bind(a, (b,))
        elif isinstance(b, Variable):
            self._bind(b, (a,))
        else:
            self._unify_joined(a, b)

    def _unify_joined(self, a: Joined, b: Joined) -> None:
        left, right = list(a.parts)[::-1], list(b.parts)[::-1]
        while left and right:
            p, q = self.flat(left.pop()), self.flat(right.pop())
            m, n = self.size(p)[0], self.size(q)[0]
            if m == n:
                self.unify(p, q)
            elif m > n:
                first, rest = self._cut(p, n)
                left.append(rest)
                self.unify(first, q)
            else:
                first, rest = self._cut(q, m)
                right.append(rest)
                self.unify(p, first)
        reason = a.frozen or b.frozen
        if reason is not None:
            self.freeze((a, b), reason)

    def _rows(self, joined: Joined, head: Dim, row: Dim) -> None:
        """Unify a concatenation with `head` rows of one `row` each."""
        if not is_static(self.size(head)) or not is_static(self.size(row)):
            self.freeze((joined, *head, *row), "its factors do not line up")
            return
        if joined.frozen is not None:
            self.freeze((*head, *row), joined.frozen)
        width = self.size(row)[0]
        pieces: list[Dim] = []
        partial: list[Dim] = []
        filled = 0
        queue = list(joined.parts)[::-1]
        while queue:
            part = self.flat(queue.pop())
            size = self.size(part)[0]
            if not partial and size % width == 0:
                piece = self.fresh((size // width, ()))
                pieces.append(piece)
                self.unify(part, (*piece, *row))
                continue
            take = min(size, width - filled)
            first, rest = self._cut(part, take)
            partial.append(first)
            filled += take
            if size > take:
                queue.append(rest)
            if filled == width:
                pieces.append(UNIT)
                self.unify(self.join(partial), row)
                partial, filled = [], 0
        self.unify(head, self.join(pieces))

    def _bind(self, variable: Variable, dim: Dim) -> None:
        """Replace a variable, handing what is known about it on."""
        variable.bound = dim
        if variable.frozen is not None:
            self.freeze(dim, variable.frozen)
        if not variable.tags and not variable.statistics:
            return
        for leaf in self.leaves(dim):
            leaf.tags = leaf.tags | variable.tags
            leaf.statistics = leaf.statistics or variable.statistics
