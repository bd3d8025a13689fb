"""Find better orders of a model's channels for N:M.

A free axis is a dimension whose indices mean the same thing wherever it occurs, so all its places
can be put into another order together. What that changes is rounding: it is checked by running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.axes import Axis, analyze
from fxcompress.pipeline._probes import probes, run
from fxcompress.rewrite import GraphRewriter
from passes.prune._sparsity.decision import AxisOrder
from passes.prune._sparsity.orders import apply_orders, reordered
from passes.prune._sparsity.permutation import kept_part, search_order
from passes.prune._sparsity.zeros import scores_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._sparsity.candidates import Candidates
    from passes.prune._sparsity.patterns import NOfM

__all__ = ["find_orders"]

# Largest difference of outputs that a sum in another order may make, as a part of their absmax.
_TOLERANCE = 1e-3


def find_orders(
    candidates: Candidates, pattern: NOfM, escapes: int, context: Context
) -> tuple[tuple[AxisOrder, ...], dict[str, Tensor]]:
    """Return the axes worth another order, and their orders by array name; apply both.

    Scores are those of the criterion (for SparseGPT, magnitudes), before anything is pruned.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
    """
    analysis = analyze(candidates.scratch.program)
    by_axis: dict[Axis, list[Tensor]] = {}
    scores = scores_of(candidates, context)
    for weight in candidates.weights:
        term = analysis.places(weight.tensor)[weight.form.input]
        if isinstance(term, Axis) and term in analysis.axes:
            by_axis.setdefault(term, []).append(scores[weight.tensor].reshape(-1, term.size))
    found: list[AxisOrder] = []
    arrays: dict[str, Tensor] = {}
    for done, (axis, parts) in enumerate(by_axis.items()):
        context.progress("ordering channels", done, len(by_axis))
        rows = torch.cat(parts).clamp(min=0)
        order = search_order(rows, pattern.n, pattern.m, escapes=escapes, seed=context.seed)
        before = kept_part(rows, pattern.n, pattern.m)
        after = kept_part(rows[:, order], pattern.n, pattern.m)
        if after > before and _is_equal(candidates.scratch.program, axis, order, context.seed):
            found.append(AxisOrder(axis=axis.name, before=round(before, 6), after=round(after, 6)))
            arrays[f"{axis.name}.order"] = order
    apply_orders(candidates.scratch, found, arrays)
    return tuple(found), arrays


def _is_equal(program: Program, axis: Axis, order: Tensor, seed: int) -> bool:
    """Whether a Program computes the same with an axis in another order."""
    rewriter = GraphRewriter(program)
    for name, tensor in reordered(program, {axis: order}).items():
        rewriter.set_tensor(name, tensor, tied=True)
    leaves = probes(program, seed)[0]
    pairs = zip(run(program, leaves), run(rewriter.finish(), leaves), strict=True)
    return all(_is_near(one, other) for one, other in pairs)


def _is_near(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return True
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max()) if one.numel() else True
