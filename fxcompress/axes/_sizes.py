"""Sizes of dimensions as monomials: a whole number times dynamic sizes, cheap to divide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["ONE", "Size", "SizeReader", "divide", "gcd", "is_static"]

Size = tuple[int, tuple[str, ...]]
"""(coefficient, sorted dynamic factors): `8 * batch * seq` is `(8, ("s0", "s1"))`."""

ONE: Size = (1, ())


def is_static(size: Size) -> bool:
    """Whether no dynamic size is in it."""
    return not size[1]


def times(left: Size, right: Size) -> Size:
    """Multiply."""
    if not left[1] and not right[1]:
        return (left[0] * right[0], ())
    return left[0] * right[0], tuple(sorted(left[1] + right[1]))


def divide(left: Size, right: Size) -> Size | None:
    """Return left / right where that is a whole monomial, else None."""
    if right[0] == 0 or left[0] % right[0]:
        return None
    if not right[1]:
        return left[0] // right[0], left[1]
    rest = list(left[1])
    for symbol in right[1]:
        if symbol not in rest:
            return None
        rest.remove(symbol)
    return left[0] // right[0], tuple(rest)


def gcd(left: Size, right: Size) -> Size:
    """Return the greatest common monomial."""
    import math

    rest = list(right[1])
    shared = []
    for symbol in left[1]:
        if symbol in rest:
            rest.remove(symbol)
            shared.append(symbol)
    return math.gcd(left[0], right[0]), tuple(shared)


class SizeReader:
    """Turns sizes of traced tensors into monomials, each expression once."""

    def __init__(self) -> None:
        self._known: dict[Any, Size] = {}
        self._factors: dict[str, tuple[Any, int]] = {}
        """Name -> the expression of a dynamic factor and its value at capture."""
        self._values: dict[str, int] = {}

    def fill_in(self, sizes: Mapping[str, int]) -> None:
        """Value dynamic sizes, by symbol, otherwise than at capture."""
        self._values = {}
        for name, (expression, value) in self._factors.items():
            free = {str(symbol): symbol for symbol in expression.free_symbols}
            if free and free.keys() <= sizes.keys():
                value = int(expression.subs({free[symbol]: sizes[symbol] for symbol in free}))
            self._values[name] = value

    def __call__(self, size: int | torch.SymInt) -> Size:
        if isinstance(size, int):
            return size, ()
        expression = size.node.expr
        found = self._known.get(expression)
        if found is None:
            found = self._known[expression] = self._read(size, expression)
        return found

    def value(self, size: Size) -> int:
        """Return a size at the example sizes of the dynamic dimensions."""
        result = size[0]
        for symbol in size[1]:
            known = self._values.get(symbol)
            result *= self._factors[symbol][1] if known is None else known
        return result

    def _read(self, size: torch.SymInt, expression: Any) -> Size:
        if expression.is_Integer:
            return int(expression), ()
        content, rest = expression.primitive()
        if not content.is_Integer:
            content, rest = 1, expression
        symbols: list[str] = []
        for factor in rest.args if rest.is_Mul else (rest,):
            base, power = factor.as_base_exp()
            repeat = int(power) if power.is_Integer and power > 0 else 1
            part = base if repeat == power else factor
            name = str(part)
            self._factors[name] = part, _example(size.node.shape_env, part)
            symbols += [name] * repeat
        return int(content), tuple(sorted(symbols))


def _example(shape_env: Any, expression: Any) -> int:
    """Return a size's value at capture; 1 where only data tells it."""
    if hasattr(shape_env, "optimization_hint"):
        return int(shape_env.optimization_hint(expression, fallback=1))
    # torch before 2.13
    found = shape_env.size_hint(expression, allow_none=True)
    return 1 if found is None else int(found)
