"""Criteria that look at weights alone: L1, L2, batch norm scale, FPGM, LAMP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress.axes import Axis, Place
from fxcompress.errors import UsageError
from passes.prune._criteria.slices import (
    counted_places,
    finite,
    reduce,
    score_places,
    slices,
)

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.prune._criteria.options import Criterion

__all__ = ["bn_scale", "fpgm", "is_bn_scale", "l1", "l2", "lamp"]

Scores = dict[Axis, NDArray[np.float64]]
# Elements of slices that are compared at a time: 128 MiB of float64.
_CHUNK = 1 << 24


def l1(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    """Return the sum of |w| over each slice (Li et al., 2017, arXiv:1608.08710)."""
    state = program.state()
    places = counted_places(program, axes, criterion)
    found = score_places(places, lambda place: state[place.tensor].detach().abs())
    return reduce(found, criterion)


def l2(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    """Return the root of the reduced sums of w²: with `sum`, the norm of the whole group.

    The group is that of Fang et al., 2023 (DepGraph, arXiv:2301.12900).
    """
    return {axis: np.sqrt(found) for axis, found in _squares(program, axes, criterion).items()}


def lamp(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    """Return s_u / Σ s_v over all v with s_v ≥ s_u, where s is the squared norm of the slices.

    Lee et al., 2021 (arXiv:2010.07611), with slices of a group in place of single weights. The
    largest index of every axis scores 1, so that no axis is emptied by a global threshold.
    """
    return {axis: _lamp(found) for axis, found in _squares(program, axes, criterion).items()}


def _lamp(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.argsort(squares, kind="stable")
    rising = squares[order]
    survivors = np.cumsum(rising[::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = np.divide(rising, survivors, out=np.zeros_like(rising), where=survivors > 0)
    return scores


def _squares(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    state = program.state()
    places = counted_places(program, axes, criterion)
    found = score_places(places, lambda place: state[place.tensor].detach().float().square())
    return reduce(found, criterion)


def bn_scale(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    """Return |γ| of the batch norms of an axis (Liu et al., 2017, arXiv:1708.06519).

    Raises:
        UsageError: An axis has no batch norm.
    """
    state = program.state()
    places, without = {}, []
    for axis in axes:
        found = tuple(place for place in axis.places if is_bn_scale(program, place))
        if found:
            places[axis] = found[:1] if criterion.reduction == "first" else found
        else:
            without.append(axis)
    if without:
        names = ", ".join(map(str, without[:3])) + (" and others" if len(without) > 3 else "")
        raise UsageError(
            f"{len(without)} axes cannot be scored by bn_scale",
            reason=f"no batch norm scales {names}",
            hint="leave them out of the targets, or take the criterion l2",
            where=str(without[0]),
        )
    return reduce(score_places(places, lambda p: state[p.tensor].detach().abs()), criterion)


def is_bn_scale(program: Program, place: Place) -> bool:
    """Whether a place is the scale of a batch norm."""
    owner, _, leaf = place.tensor.rpartition(".")
    if leaf != "weight" or not owner:
        return False
    module = program.module.get_submodule(owner)
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def fpgm(program: Program, axes: Iterable[Axis], criterion: Criterion) -> Scores:
    """Return the sum of the distances of each filter to all others of its layer.

    The filter nearest to the geometric median can be replaced by the others best
    (He et al., 2019, arXiv:1811.00250, section 3.3).

    Raises:
        NumericsError: A weight is NaN or infinite.
    """
    state = program.state()
    found: dict[Axis, list[NDArray[np.float64]]] = {}
    for axis, places in counted_places(program, axes, criterion).items():
        found[axis] = [
            finite(
                _distances(slices(place, axis, state[place.tensor].detach())), axis, place.tensor
            )
            for place in places
        ]
    return reduce(found, criterion)


def _distances(rows: Tensor) -> NDArray[np.float64]:
    """Return the sum of Euclidean distances of each row to all rows."""
    count, width = rows.shape
    products = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, max(1, _CHUNK // count), dim=1) if width else ():
        columns = part.double()
        products += columns @ columns.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).sqrt()
    total: NDArray[np.float64] = distances.fill_diagonal_(0).sum(1).cpu().numpy()
    return total
