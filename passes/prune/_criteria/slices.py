"""From the elements of tensors to one number per index of an axis.

The slice of index i at a place is everything in the tensor whose position along the place's
dimension belongs to i: rows of a weight, columns of the next one, entries of a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress.axes import Axis, Place, Term, positions
from fxcompress.errors import ModelError, NumericsError, UsageError

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.prune._criteria.options import Criterion

__all__ = [
    "PlaceScores",
    "counted_places",
    "finite",
    "per_index",
    "reduce",
    "score_places",
    "slices",
]

PlaceScores = dict[Axis, list[NDArray[np.float64]]]
"""Per axis, for each of its places that count, a score per index `[axis.size]`."""


def counted_places(
    program: Program, axes: Iterable[Axis], criterion: Criterion
) -> dict[Axis, tuple[Place, ...]]:
    """Return the places of each axis that a criterion looks at: trainable numbers of its roles.

    Where an axis has none of these roles, all its places count: a dimension that only ever meets
    its own kind (queries and keys) has nothing that reads it. Biases are left out of that unless
    there is nothing else.

    Raises:
        UsageError: An axis occurs in no parameter of floating point.
        ModelError: The weights are on the meta device: they have no values.
    """
    state = program.state()
    found: dict[Axis, tuple[Place, ...]] = {}
    for axis in axes:
        numbers = tuple(
            place
            for place in axis.places
            if isinstance(tensor := state.get(place.tensor), nn.Parameter)
            and tensor.is_floating_point()
        )
        if not numbers:
            raise UsageError(
                f"axis {axis} cannot be scored by {criterion.label}",
                reason="it occurs in no parameter",
                hint="leave it out of the targets",
                where=str(axis),
            )
        if any(state[place.tensor].is_meta for place in numbers):
            raise ModelError(
                f"axis {axis} cannot be scored by {criterion.label}",
                reason="its weights are on the meta device and have no values",
                hint="load the weights",
                where=str(axis),
            )
        wanted = [p for p in numbers if p.role in criterion.counted]
        weights = [p for p in numbers if p.role != "bias"]
        chosen = tuple(wanted or weights or numbers)
        if criterion.reduction == "first":
            chosen = (next((p for p in chosen if p.role == "out"), chosen[0]),)
        found[axis] = chosen
    return found


def per_index(place: Place, axis: Axis, elements: Tensor) -> NDArray[np.float64]:
    """Return the sum of a tensor's elements over the slice of each index, `[axis.size]`.

    Args:
        place: Where the axis occurs.
        axis: The axis.
        elements: One number per element of the tensor, in its shape.
    """
    return gather(line_of(elements, place.dim), place.term, axis)


def line_of(elements: Tensor, dim: int) -> NDArray[np.float64]:
    """Return the sum over all dimensions but one, added up in at least single precision."""
    others = [d for d in range(elements.dim()) if d != dim]
    wide = torch.promote_types(elements.dtype, torch.float32)
    line = elements.sum(others, dtype=wide) if others else elements
    found: NDArray[np.float64] = line.double().cpu().numpy()
    return found


def gather(line: NDArray[np.float64], term: Term, axis: Axis) -> NDArray[np.float64]:
    """Return the sum over the positions of each index of numbers along a dimension."""
    summed: NDArray[np.float64] = line[positions(term, axis)].sum(1)
    return summed


def slices(place: Place, axis: Axis, tensor: Tensor) -> Tensor:
    """Return the slice of each index of an axis as a row, `[axis.size, elements]`."""
    index = torch.from_numpy(positions(place.term, axis)).to(tensor.device)
    rows = tensor.movedim(place.dim, 0)[index.flatten()]
    return rows.reshape(axis.size, -1)


def score_places(
    places: Mapping[Axis, Iterable[Place]], elements: Callable[[Place], Tensor]
) -> PlaceScores:
    """Return the summed slices of every place.

    Args:
        places: The places of each axis that count.
        elements: Gives one number per element of a place's tensor, in its shape.

    Raises:
        NumericsError: A sum is NaN or infinite.
    """
    by_tensor: dict[str, list[tuple[Axis, int, Place]]] = {}
    found: dict[Axis, dict[int, NDArray[np.float64]]] = {axis: {} for axis in places}
    for axis, mine in places.items():
        for number, place in enumerate(mine):
            by_tensor.setdefault(place.tensor, []).append((axis, number, place))
    for uses in by_tensor.values():
        made = elements(uses[0][2])
        lines = {dim: line_of(made, dim) for dim in {place.dim for *_, place in uses}}
        for axis, number, place in uses:
            scores = gather(lines[place.dim], place.term, axis)
            found[axis][number] = finite(scores, axis, place.tensor)
    return {axis: [mine[n] for n in sorted(mine)] for axis, mine in found.items()}


def finite(scores: NDArray[np.float64], axis: Axis, source: str) -> NDArray[np.float64]:
    """Return scores as they are.

    Raises:
        NumericsError: One is NaN or infinite; names the axis and where it comes from.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        what = "NaN" if np.isnan(scores[bad[0]]) else "infinite"
        raise NumericsError(
            f"the score of axis {axis} is {what}",
            reason=f"{source} gives index {bad[0]} no number ({len(bad)} of {axis.size} indices)",
            hint="check the weights and the data; if fp16 overflows, prune in fp32",
            where=source,
        )
    return scores


def reduce(scores: PlaceScores, criterion: Criterion) -> dict[Axis, NDArray[np.float64]]:
    """Return one score per index from those of the places."""
    return {axis: _joined(np.stack(mine), criterion) for axis, mine in scores.items()}


def _joined(stacked: NDArray[np.float64], criterion: Criterion) -> NDArray[np.float64]:
    joined: NDArray[np.float64]
    if criterion.joined == "max":
        joined = stacked.max(0)
    elif criterion.joined == "mean":
        joined = stacked.mean(0)
    else:
        joined = stacked.sum(0)
    return joined
