"""k-means of numbers: on sorted values a cluster is an interval, and its mean two prefix sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Start", "cluster"]

Start: TypeAlias = Literal["linear", "density", "between", "best"]

_BINS: Final = 512
"""Of the histogram that `between` takes densities from."""


@dataclass(frozen=True)
class _Sorted:
    """Groups of numbers in order, with sums of all before each.

    Attributes:
        values: `[groups, elements]`, ascending.
        counts: How many count up to each place, `[groups, elements + 1]`.
        sums: Their sum, `[groups, elements + 1]`.
    """

    values: Tensor
    counts: Tensor
    sums: Tensor

    @classmethod
    def of(cls, groups: Tensor, counted: Tensor) -> _Sorted:
        values, order = groups.double().sort(dim=1)
        weights = counted.gather(1, order).double()
        zero = weights.new_zeros(len(groups), 1)
        return cls(
            values,
            torch.cat([zero, weights.cumsum(1)], 1),
            torch.cat([zero, (weights * values).cumsum(1)], 1),
        )

    def parts(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many numbers are nearest to each centre, and their sum."""
        middles = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self.values, middles)
        first = torch.zeros_like(inner[:, :1])
        cuts = torch.cat([first, inner, first + self.values.shape[1]], 1)
        return self.counts.gather(1, cuts).diff(dim=1), self.sums.gather(1, cuts).diff(dim=1)

    def spread(self, centres: Tensor) -> Tensor:
        """Return, up to a constant, the squared distance to the nearest centre, `[groups]`."""
        count, total = self.parts(centres)
        return (count * centres.square() - 2 * centres * total).sum(1)


def cluster(groups: Tensor, entries: int, start: Start, rounds: int, *, zero: bool) -> Tensor:
    """Return the values that each group shares, ascending, `[groups, entries]`, in float64.

    A group of no more distinct numbers than entries gets these, the last one repeated.

    Args:
        groups: Numbers, `[groups, elements]`.
        entries: How many values.
        start: Where k-means starts.
        rounds: Of it, at most.
        zero: One value is 0, and the others are those of the numbers that are not.
    """
    counted = groups != 0 if zero else torch.ones_like(groups, dtype=torch.bool)
    ordered = _Sorted.of(groups, counted)
    few = entries - 1 if zero else entries
    starts = list(_STARTS.values()) if start == "best" else [_STARTS[start]]
    found = [_settle(ordered, make(ordered, few), rounds) for make in starts]
    best = found[0]
    for other in found[1:]:
        better = ordered.spread(other) < ordered.spread(best)
        best = torch.where(better.unsqueeze(1), other, best)
    if zero:
        best = torch.cat([best, torch.zeros_like(best[:, :1])], 1).sort(dim=1).values
    return _distinct(ordered.values, best)


def _linear(ordered: _Sorted, count: int) -> Tensor:
    """Return values evenly apart from the least to the largest."""
    low, high = ordered.values[:, :1], ordered.values[:, -1:]
    return low + (high - low) * torch.linspace(0, 1, count, dtype=torch.float64)


def _density(ordered: _Sorted, count: int) -> Tensor:
    """Return values with as many numbers to each."""
    parts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    places = torch.searchsorted(ordered.counts, (ordered.counts[:, -1:] * parts).contiguous())
    return ordered.values.gather(1, (places - 1).clamp(0, ordered.values.shape[1] - 1))


def _between(ordered: _Sorted, count: int) -> Tensor:
    """Return values as dense as the third root of the density of the numbers.

    That is best for many values (Panter and Dite, 1951, "Quantization Distortion in Pulse-Count
    Modulation with Nonuniform Spacing of Levels").
    """
    low, high = ordered.values[:, :1], ordered.values[:, -1:]
    edges = low + (high - low) * torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
    numbers = ordered.counts.gather(1, torch.searchsorted(ordered.values, edges.contiguous()))
    roots = numbers.diff(dim=1).clamp_min(0).pow(1 / 3).cumsum(1)
    parts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    places = torch.searchsorted(roots, (roots[:, -1:] * parts).contiguous())
    return (edges[:, 1:] + edges[:, :-1]).div(2).gather(1, places.clamp_max(_BINS - 1))


_STARTS: Final[Mapping[str, Callable[[_Sorted, int], Tensor]]] = {
    "linear": _linear,
    "density": _density,
    "between": _between,
}


def _settle(ordered: _Sorted, centres: Tensor, rounds: int) -> Tensor:
    """Return the centres once no number changes its cluster; one without numbers stays."""
    for _ in range(rounds):
        count, total = ordered.parts(centres)
        moved = torch.where(count > 0, total / count.clamp_min(1), centres).sort(dim=1).values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _distinct(values: Tensor, centres: Tensor) -> Tensor:
    """Put the numbers themselves in the place of centres where there are few enough."""
    entries = centres.shape[1]
    new = torch.cat([torch.ones_like(values[:, :1]), (values.diff(dim=1) != 0).double()], 1)
    place = new.cumsum(1).long() - 1
    few = place[:, -1] < entries
    if not bool(few.any()):
        return centres
    exact = values[:, -1:].expand(-1, entries).clone()
    exact.scatter_(1, place.clamp_max(entries - 1), values)
    return torch.where(few.unsqueeze(1), exact, centres)
