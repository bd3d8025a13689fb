"""A criterion of the user's own, named by a factory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxcompress.axes import Axis
from fxcompress.errors import UsageError
from fxcompress.spec._python import call_factory, load_factory

if TYPE_CHECKING:
    from fxcompress.axes import Analysis
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._criteria.options import Criterion

__all__ = ["scores"]


def scores(
    program: Program,
    analysis: Analysis,
    axes: list[Axis],
    criterion: Criterion,
    context: Context,
) -> dict[Axis, NDArray[np.float64]]:
    """Return what `fn(program, analysis, axes, context, **args)` returns, checked.

    It returns numbers `[axis.size]` (an array, a tensor or a list) by axis or by its name.

    Raises:
        UsageError: It cannot be imported or called, fails, or returns something else.
    """
    text = criterion.factory or ""
    function = load_factory(text, context.folder, UsageError, "criterion")
    given = {"program": program, "analysis": analysis, "axes": axes, "context": context}
    made = call_factory(function, {**given, **criterion.args}, text, UsageError, "criterion")
    if not isinstance(made, Mapping):
        raise UsageError(
            f"{text} returned a {type(made).__name__}",
            reason="a criterion returns a mapping from axis names to scores",
            where="criterion",
        )
    return {axis: _checked(made.get(axis, made.get(axis.name)), axis, text) for axis in axes}


def _checked(found: Any, axis: Axis, text: str) -> NDArray[np.float64]:
    if found is None:
        raise UsageError(
            f"{text} gave no scores for axis {axis}",
            hint="return scores for every axis in `axes`, by `axis.name`",
            where="criterion",
        )
    if isinstance(found, Tensor):
        found = found.detach().double().cpu().numpy()
    try:
        numbers = np.array(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{text} gave no numbers for axis {axis}", reason=str(error), where="criterion"
        ) from error
    if numbers.shape != (axis.size,):
        raise UsageError(
            f"{text} gave scores of shape {numbers.shape} for axis {axis}",
            reason=f"one score per index is wanted: ({axis.size},)",
            where="criterion",
        )
    return numbers
