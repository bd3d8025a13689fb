"""Criteria that watch activations: their norm, the share of zeros, and Wanda."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fxcompress.axes import Axis, Place
from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.pipeline.base import Selection
from passes._layers.inputs import input_rows
from passes._layers.stream import stream
from passes._layers.weights import Weight, find_weights
from passes._observe import observe
from passes.prune._criteria.slices import (
    PlaceScores,
    counted_places,
    finite,
    gather,
    reduce,
    score_places,
)
from passes.prune._criteria.taps import Tap, find_taps

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._criteria.options import Criterion

__all__ = ["Moments", "Watched", "apoz", "norm", "wanda", "watch"]

Scores = dict[Axis, NDArray[np.float64]]


@dataclass
class Moments:
    """Sums over all but one dimension of an activation, float64 `[positions]` each.

    Attributes:
        squares: Of x².
        total: Of x.
        zeros: How many entries are zero.
        count: How many entries each position has.
    """

    squares: NDArray[np.float64] | float = 0.0
    total: NDArray[np.float64] | float = 0.0
    zeros: NDArray[np.float64] | float = 0.0
    count: int = 0

    def add(self, x: Tensor, dim: int) -> None:
        """Take in one batch."""
        others = [d for d in range(x.dim()) if d != dim % x.dim()]
        x = x.detach().float()

        def along(value: Tensor) -> NDArray[np.float64]:
            line = value.sum(others, dtype=torch.float64) if others else value.double()
            return line.cpu().numpy()

        self.squares = self.squares + along(x.square())
        self.total = self.total + along(x)
        self.zeros = self.zeros + along(x == 0)
        self.count += x.numel() // x.shape[dim]


@dataclass(frozen=True)
class Watched:
    """What calibration saw of the activations of some axes.

    Attributes:
        taps: Per axis, where its activations were watched.
        moments: Per node and dimension.
        names: Ids of the nodes.
        criterion: Whose reduction is used.
    """

    taps: Mapping[Axis, tuple[Tap, ...]]
    moments: Mapping[tuple[fx.Node, int], Moments]
    names: Mapping[fx.Node, str]
    criterion: Criterion


def watch(
    program: Program,
    analysis: Analysis,
    axes: Iterable[Axis],
    criterion: Criterion,
    context: Context,
) -> Watched:
    """Run the Program on calibration data; nothing of an activation is kept but sums.

    Raises:
        UsageError: No activation has an axis.
        DataError: The split is too small.
    """
    taps = find_taps(program, analysis, axes)
    for axis, mine in taps.items():
        if not mine:
            raise UsageError(
                f"axis {axis} cannot be scored by {criterion.name}",
                reason="no activation has it",
                hint="leave it out of the targets, or take a criterion of weights such as l2",
                where=str(axis),
            )
    if criterion.reduction == "first":
        taps = {axis: mine[:1] for axis, mine in taps.items()}
    keys = {(tap.node, tap.dim) for mine in taps.values() for tap in mine}
    moments = {key: Moments() for key in keys}
    dims: dict[fx.Node, list[int]] = {}
    for node, dim in keys:
        dims.setdefault(node, []).append(dim)

    def observer(node: fx.Node) -> Callable[[Any], None]:
        def see(x: Any) -> None:
            for dim in dims[node]:
                moments[node, dim].add(x, dim)

        return see

    batches = context.samples(criterion.data, criterion.samples)
    observe(program, batches, {node: observer(node) for node in dims})
    return Watched(taps, moments, node_ids(program), criterion)


def norm(watched: Watched) -> Scores:
    """Return the root mean square of the activations of each index: its L2 norm over √count."""

    def one(seen: Moments, tap: Tap, axis: Axis) -> NDArray[np.float64]:
        squares = gather(np.asarray(seen.squares), tap.term, axis)
        return np.sqrt(squares / (seen.count * tap.width(axis)))

    return _per_tap(watched, one)


def apoz(watched: Watched) -> Scores:
    """Return 1 − APoZ: the share of activations that are not zero (Hu et al., 2016).

    arXiv:1607.03250, eq. 1. Says nothing where no activation function makes zeros.
    """

    def one(seen: Moments, tap: Tap, axis: Axis) -> NDArray[np.float64]:
        zeros = gather(np.asarray(seen.zeros), tap.term, axis)
        return 1 - zeros / (seen.count * tap.width(axis))

    return _per_tap(watched, one)


def _per_tap(watched: Watched, one: Callable[[Moments, Tap, Axis], NDArray[np.float64]]) -> Scores:
    scores: PlaceScores = {}
    for axis, taps in watched.taps.items():
        scores[axis] = []
        for tap in taps:
            seen = watched.moments[tap.node, tap.dim]
            name = f"the activation {watched.names[tap.node]}"
            finite(gather(np.asarray(seen.squares), tap.term, axis), axis, name)
            scores[axis].append(one(seen, tap, axis))
    return reduce(scores, watched.criterion)


def wanda(program: Program, axes: Iterable[Axis], criterion: Criterion, context: Context) -> Scores:
    """Return Σ |w|·‖x‖ over the slices: weights times the norm of the input they multiply.

    Sun et al., 2024 (arXiv:2306.11695, eq. 1), summed over the weights that an index takes part
    in: with the places that read the axis, over all outputs. ‖x‖ is the root mean square over the
    rows of the input.

    Raises:
        UsageError: No weight of a layer has an axis.
    """
    copy = program.copy()
    known = {weight.tensor: weight for weight in find_weights(copy, Selection())[0]}
    places: dict[Axis, tuple[Place, ...]] = {}
    for axis, counted in counted_places(program, axes, criterion).items():
        layers = tuple(p for p in counted if p.tensor in known) or tuple(
            p for p in axis.places if p.tensor in known
        )
        if not layers:
            raise UsageError(
                f"axis {axis} cannot be scored by wanda",
                reason=f"none of its tensors is the weight of a layer: {axis.places[0].tensor}",
                hint="leave it out of the targets, or take another criterion",
                where=str(axis),
            )
        places[axis] = layers
    wanted = {place.tensor for mine in places.values() for place in mine}
    norms = _input_norms(copy, [known[name] for name in sorted(wanted)], criterion, context)
    state = program.state()

    def elements(place: Place) -> Tensor:
        form, weight = known[place.tensor].form, state[place.tensor].detach().abs().float()
        matrices = form.matrices(weight)
        scaled = matrices * norms[place.tensor].reshape(len(matrices), 1, *matrices.shape[2:])
        return form.weight(scaled, weight)

    return reduce(score_places(places, elements), criterion)


def _input_norms(
    program: Program, weights: list[Weight], criterion: Criterion, context: Context
) -> dict[str, Tensor]:
    """Return the root mean square of each column that a weight multiplies, `[groups, columns]`.

    Args:
        program: A private copy; the readers of `weights` are its nodes.
        weights: Whose inputs.
        criterion: Which data.
        context: The data.
    """
    state = program.state()
    squares: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for weight in weights:
        matrices = weight.form.matrices(state[weight.tensor])
        groups, columns = len(matrices), matrices.shape[2] * matrices.shape[3]
        squares[weight.tensor] = torch.zeros(groups, columns, dtype=torch.float64)
        counts[weight.tensor] = torch.zeros(groups, 1, dtype=torch.float64)
    readers = {reader.node: (reader, weight) for weight in weights for reader in weight.readers}

    def see(node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        reader, weight = readers[node]
        shape = state[weight.tensor].shape
        for groups, rows in input_rows(reader, weight.form, shape, env):
            squares[weight.tensor][groups] += rows.double().square().sum(1).cpu()
            counts[weight.tensor][groups] += rows.shape[1]

    stream(program, context.samples(criterion.data, criterion.samples), readers, see)
    return {
        name: (total / counts[name].clamp(min=1)).sqrt().float() for name, total in squares.items()
    }
