"""The one function that scores axes by any criterion."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fxcompress.axes import Axis
from fxcompress.errors import DataError
from passes.prune._criteria import activations, gradients, magnitude, own
from passes.prune._criteria.slices import finite

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._criteria.options import Criterion

__all__ = ["score", "unscorable"]

Scores = dict[Axis, NDArray[np.float64]]


def score(
    program: Program,
    analysis: Analysis,
    axes: Iterable[Axis],
    criterion: Criterion,
    context: Context,
) -> Scores:
    """Return how important each index of each axis is: float64 `[axis.size]`, higher is more.

    Scores of different axes can be compared as far as `criterion.normalise` makes them: `taylor`,
    `fisher` and `obd` are in units of the loss, `apoz` and `lamp` are shares, the others are
    divided by their mean over the axis. The Program is read, never changed.

    Args:
        program: The model.
        analysis: Its axes.
        axes: Those to score.
        criterion: How.
        context: Calibration data and the seed.

    Raises:
        UsageError: The criterion does not apply to an axis, or the factory cannot be called.
        DataError: The criterion needs data that is not there.
        NumericsError: A score is NaN or infinite.
        ModelError: The weights have no values.
    """
    wanted = list(axes)
    if not wanted:
        return {}
    _check_data(criterion, context)
    raw = _raw(program, analysis, wanted, criterion, context)
    return {
        axis: _divided(finite(raw[axis], axis, criterion.label), criterion.divisor)
        for axis in wanted
    }


def unscorable(program: Program, axes: Iterable[Axis], criterion: Criterion) -> dict[Axis, str]:
    """Return the axes that a criterion does not apply to, each with the reason."""
    if criterion.factory is not None or criterion.name != "bn_scale":
        return {}
    return {
        axis: "no batch norm scales it, and the criterion is bn_scale"
        for axis in axes
        if not any(magnitude.is_bn_scale(program, place) for place in axis.places)
    }


def _raw(
    program: Program,
    analysis: Analysis,
    axes: list[Axis],
    criterion: Criterion,
    context: Context,
) -> Scores:
    if criterion.factory is not None:
        return own.scores(program, analysis, axes, criterion, context)
    name = criterion.name
    if name == "random":
        return {axis: _random(axis, context.seed) for axis in axes}
    weights_alone = {
        "l1": magnitude.l1,
        "l2": magnitude.l2,
        "bn_scale": magnitude.bn_scale,
        "fpgm": magnitude.fpgm,
        "lamp": magnitude.lamp,
    }
    if name in weights_alone:
        return weights_alone[name](program, axes, criterion)
    by_gradients = {
        "taylor": gradients.taylor,
        "fisher": gradients.fisher,
        "obd": gradients.obd,
        "wanda": activations.wanda,
    }
    if name in by_gradients:
        return by_gradients[name](program, axes, criterion, context)
    watched = activations.watch(program, analysis, axes, criterion, context)
    return activations.norm(watched) if name == "activation_norm" else activations.apoz(watched)


def _random(axis: Axis, seed: int) -> NDArray[np.float64]:
    """Return uniform numbers that depend on the seed and the axis's name alone."""
    return np.random.default_rng([seed, zlib.crc32(str(axis).encode())]).random(axis.size)


def _divided(scores: NDArray[np.float64], by: str) -> NDArray[np.float64]:
    if by == "none":
        return scores
    divisor = {"mean": scores.mean(), "max": scores.max(), "sum": scores.sum()}[by]
    return scores / divisor if divisor > 0 else scores


def _check_data(criterion: Criterion, context: Context) -> None:
    if criterion.needs_data and not context.has(criterion.data):
        kind = "gradients" if criterion.name in ("taylor", "fisher", "obd") else "activations"
        raise DataError(
            f"the criterion {criterion.name} needs a split {criterion.data}",
            reason=f"it looks at {kind}; the data has {', '.join(context.data) or 'no splits'}",
            hint=f"let the data factory return a split called {criterion.data!r}, or take a "
            "criterion of weights alone such as l2",
            where=criterion.data,
        )
