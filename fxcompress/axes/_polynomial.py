"""Polynomials in axis sizes: what parameters, bytes and MACs cost before anything is removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Polynomial"]

Monomial = tuple[int, ...]


@dataclass(frozen=True)
class Polynomial:
    """A sparse sum of monomials: sorted axis ids -> coefficient.

    `{(): 10, (3,): 64, (3, 7): 9}` is 10 + 64·s₃ + 9·s₃·s₇.
    """

    monomials: Mapping[Monomial, float] = field(default_factory=dict)

    @staticmethod
    def constant(value: float) -> Polynomial:
        """Return the polynomial that is `value` everywhere."""
        return Polynomial({(): value} if value else {})

    @staticmethod
    def size_of(axis: int) -> Polynomial:
        """Return the size of one axis."""
        return Polynomial({(axis,): 1})

    @staticmethod
    def total(terms: Iterable[Polynomial]) -> Polynomial:
        """Add many up."""
        found: dict[Monomial, float] = {}
        for term in terms:
            for ids, coefficient in term.monomials.items():
                found[ids] = found.get(ids, 0) + coefficient
        return Polynomial({ids: value for ids, value in found.items() if value})

    @property
    def axes(self) -> frozenset[int]:
        """The ids of the axes that occur."""
        return frozenset(axis for ids in self.monomials for axis in ids)

    def at(self, sizes: Mapping[int, int]) -> int:
        """Return the value at given axis sizes.

        Raises:
            KeyError: A size is missing.
        """
        total = 0.0
        for ids, coefficient in self.monomials.items():
            value = coefficient
            for axis in ids:
                value *= sizes[axis]
            total += value
        return round(total)

    def gradient(self, sizes: Mapping[int, int]) -> dict[int, float]:
        """Return d/d size for every axis that occurs."""
        slopes: dict[int, float] = {}
        for ids, coefficient in self.monomials.items():
            for place, axis in enumerate(ids):
                value = coefficient
                for other in (*ids[:place], *ids[place + 1 :]):
                    value *= sizes[other]
                slopes[axis] = slopes.get(axis, 0.0) + value
        return slopes

    def __add__(self, other: Polynomial) -> Polynomial:
        return Polynomial.total((self, other))

    def __sub__(self, other: Polynomial) -> Polynomial:
        return Polynomial.total((self, other * -1))

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        if not isinstance(other, Polynomial):
            return Polynomial({ids: value * other for ids, value in self.monomials.items()})
        found: dict[Monomial, float] = {}
        for left, a in self.monomials.items():
            for right, b in other.monomials.items():
                ids = tuple(sorted(left + right))
                found[ids] = found.get(ids, 0) + a * b
        return Polynomial({ids: value for ids, value in found.items() if value})
