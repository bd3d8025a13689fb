"""Cost polynomials as sparse arrays: values, slopes and exact differences for all axes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Polynomial

__all__ = ["CostArrays"]

Floats = NDArray[np.float64]


class CostArrays:
    """A polynomial in the sizes of some axes, those of all others being constant.

    Each monomial is a run of (axis, power) pairs, so that one `reduceat` gives all their values,
    whatever their degree.
    """

    def __init__(
        self, polynomial: Polynomial, order: Sequence[int], fixed: Mapping[int, int]
    ) -> None:
        """Take the polynomial apart.

        Args:
            polynomial: The cost.
            order: Ids of the axes that vary, in the order of all arrays.
            fixed: Id -> size of the others.
        """
        place = {axis: index for index, axis in enumerate(order)}
        merged: dict[tuple[int, ...], float] = {}
        for ids, coefficient in polynomial.monomials.items():
            value = float(coefficient)
            varying = []
            for axis in ids:
                if axis in place:
                    varying.append(place[axis])
                else:
                    value *= fixed[axis]
            key = tuple(sorted(varying))
            merged[key] = merged.get(key, 0.0) + value
        self.constant = merged.pop((), 0.0)
        self.size = len(order)
        self._coefficients = np.fromiter(merged.values(), np.float64, len(merged))
        axes: list[int] = []
        powers: list[int] = []
        starts: list[int] = []
        for varying_key in merged:
            starts.append(len(axes))
            for axis in dict.fromkeys(varying_key):
                axes.append(axis)
                powers.append(varying_key.count(axis))
        self._axes = np.array(axes, dtype=np.int64)
        self._powers = np.array(powers, dtype=np.float64)
        self._starts = np.array(starts, dtype=np.int64)
        counts = np.diff(np.append(self._starts, len(axes)))
        self._monomial = np.repeat(np.arange(len(starts)), counts)

    def at(self, sizes: Floats) -> float:
        """Return the cost at sizes `[axes]`."""
        return self.constant + float(self._values(sizes).sum())

    def gradient(self, sizes: Floats) -> Floats:
        """Return d cost / d size, `[axes]`, at positive sizes."""
        parts = self._values(sizes)[self._monomial] * self._powers / sizes[self._axes]
        return self._summed(parts)

    def differences(self, sizes: Floats, change: Floats) -> Floats:
        """Return, for each axis, by how much the cost rises if its size alone changes so."""
        factor = (1 + change / sizes)[self._axes] ** self._powers - 1
        return self._summed(self._values(sizes)[self._monomial] * factor)

    def _summed(self, parts: Floats) -> Floats:
        total = np.bincount(self._axes, weights=parts, minlength=self.size)
        return total.astype(np.float64, copy=False)

    def _values(self, sizes: Floats) -> Floats:
        if not len(self._starts):
            return np.zeros(0)
        products = np.multiply.reduceat(sizes[self._axes] ** self._powers, self._starts)
        return self._coefficients * products
