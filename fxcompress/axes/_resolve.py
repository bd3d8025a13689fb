"""From solved variables to the public terms: numbering, naming and describing axes."""

from __future__ import annotations

from collections.abc import Mapping

from fxcompress.axes._dims import Factor, Joined
from fxcompress.axes._polynomial import Polynomial
from fxcompress.axes._sizes import is_static
from fxcompress.axes._solver import Dim, Solver, Variable
from fxcompress.axes.terms import (
    Axis,
    Concat,
    Frozen,
    Place,
    Product,
    Role,
    Term,
    axes_of,
    polynomial,
)

__all__ = ["Resolver"]

# What an axis is called when it is several things: the first that applies.
_KINDS = ("expert", "kv_group", "head", "head_width", "residual", "embedding", "channel", "neuron")


class Resolver:
    """Turns dims into terms; each free or frozen variable becomes one Axis."""

    def __init__(
        self,
        solver: Solver,
        roles: Mapping[tuple[str, int], Role],
        defaults: Mapping[str, int],
    ) -> None:
        self._solver = solver
        self._defaults = defaults
        solver.sizes.fill_in(defaults)
        self._roles = roles
        self._axes: dict[Variable, Axis] = {}
        self._terms: dict[Dim, Term] = {}
        self._places: dict[Axis, list[Place]] = {}
        self._parameters: set[str] = set()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis met so far."""
        return tuple(self._axes.values())

    def term(self, dim: Dim) -> Term:
        """Return the term of a dimension."""
        dim = self._solver.flat(dim)
        found = self._terms.get(dim)
        if found is None:
            factors = tuple(map(self._factor, dim))
            found = self._terms[dim] = factors[0] if len(factors) == 1 else Product(factors)
        return found

    def dynamic_sizes(self, dims: Mapping[str, int]) -> dict[Axis, int]:
        """Return the size of every dynamic axis at given values of the dynamic symbols."""
        sizes = self._solver.sizes
        sizes.fill_in({**self._defaults, **dims})
        found = {
            axis: sizes.value(variable.size)
            for variable, axis in self._axes.items()
            if not is_static(variable.size)
        }
        sizes.fill_in(self._defaults)
        return found

    def size(self, dims: tuple[Dim, ...]) -> Polynomial:
        """Return the product of the sizes of dimensions, at batch 1."""
        result = Polynomial.constant(1)
        for dim in dims:
            result = result * polynomial(self.term(dim))
        return result

    def add_tensor(self, name: str, dims: list[Dim], parameter: bool) -> None:
        """Note a parameter or buffer as a place of its axes."""
        if parameter:
            self._parameters.add(name)
        for i, dim in enumerate(dims):
            term = self.term(dim)
            place = Place(name, i, term, self._roles.get((name, i), "other"))
            for axis in dict.fromkeys(axes_of(term)):
                self._places.setdefault(axis, []).append(place)

    def finish(self) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """Name the axes; return those that occur in parameters, free and frozen."""
        free: list[Axis] = []
        frozen: list[Axis] = []
        for axis, places in self._places.items():
            object.__setattr__(axis, "places", tuple(places))
            owned = [place for place in places if place.tensor in self._parameters]
            if not owned:
                continue
            first = next((place for place in owned if place.role == "out"), owned[0])
            object.__setattr__(axis, "name", _name(axis, first))
            (free if axis.frozen is None else frozen).append(axis)
        return tuple(free), tuple(frozen)

    def _factor(self, factor: Factor) -> Term:
        if not isinstance(factor, Variable):
            return self._concat(factor)
        found = self._axes.get(factor)
        if found is None:
            size = self._solver.sizes.value(factor.size)
            kind = next((kind for kind in _KINDS if kind in factor.tags), "other")
            frozen = factor.frozen or (None if size else Frozen("it has no indices", ""))
            found = self._axes[factor] = Axis(
                len(self._axes), size, "", kind, frozen, factor.statistics
            )
        return found

    def _concat(self, joined: Joined) -> Concat:
        """Return the parts; of single indices there is no axis, so the term says why itself."""
        term = Concat(tuple(map(self.term, joined.parts)))
        if any(True for _ in axes_of(term)):
            return term
        inner = (part.frozen for part in term.parts if isinstance(part, Concat))
        apart = Frozen("its indices are used one by one", joined.node)
        return Concat(term.parts, joined.frozen or next(inner, None) or apart)


def _name(axis: Axis, place: Place) -> str:
    """Return `tensor[dim]`, numbered where several axes share the dimension."""
    inside = list(dict.fromkeys(axes_of(place.term)))
    return str(place) if len(inside) == 1 else f"{place}.{inside.index(axis)}"
