"""How far refitted weights may follow the data: the ridge that does best on rows held out.

Rows of one sample, such as the patches of an image or the tokens of a text, are alike. Leaving out
one row, or generalised cross-validation, takes them for independent and follows them too closely.
So whole runs of rows are held out (Stone, 1974, "Cross-Validatory Choice and Assessment of
Statistical Predictions"): every fifth batch, or of fewer batches the last fifth of each. For each
ridge of a grid, Δ is fitted to the other rows, and the squared error on those held out follows from
their sums alone: up to a constant, ⟨Δ C_xx, Δ⟩ − 2 ⟨Δ, C_ex⟩ about the means of the fit.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from passes.prune._compensate.least_squares import Sums

__all__ = ["GRID", "PARTS", "choose_ridge", "first_held_out"]

GRID: Final = (10.0, 1.0, 0.1, 0.01, 0.001)
PARTS: Final = 5
"""One part of so many is held out."""


def first_held_out(batch: int, batches: int, rows: int) -> int:
    """Return the first row of a batch that is held out, which all after it are; `rows` for none."""
    if batches >= PARTS:
        return 0 if batch % PARTS == PARTS - 1 else rows
    return rows - rows // PARTS


def choose_ridge(fit: Sums, held: Sums, *, centred: bool) -> float:
    """Return the ridge of the grid whose solution does best on rows held out.

    Of equal ones it is the largest; so it is without rows that are held out.

    Args:
        fit: Sums of the rows that solutions are fitted to.
        held: Sums of the rows held out.
        centred: As for `Sums.solve`.
    """
    if not held.count:
        return GRID[0]
    gram, cross = held.moments(fit if centred else None)
    errors = {ridge: _error(fit.solve(ridge, centred=centred), gram, cross) for ridge in GRID}
    return min(errors, key=lambda ridge: errors[ridge])


def _error(change: Tensor, gram: Tensor, cross: Tensor) -> float:
    """Return the mean squared error of e ≈ Δ x̃, but for the part that is the same for every Δ."""
    return float(((change @ gram - 2 * cross) * change).sum())
