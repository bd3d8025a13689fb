"""The rank of a noisy matrix, by the analytic solution of variational Bayesian factorisation."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["noise_rank"]

_TAU: Final = 2.5129
"""τ̲ / √α: where a component begins to pay (Nakajima et al., 2013, eq. 48)."""

_GRID: Final = 64
_ROUNDS: Final = 3


def noise_rank(values: Tensor, rows: int, columns: int) -> int:
    """Return how many singular values stand out of the noise, whose size is estimated too.

    Empirical variational Bayes keeps γ where γ² > M·σ²·x̲ (Nakajima, Sugiyama, Babacan and
    Tomioka, 2013, "Global Analytic Solution of Fully-observed Variational Bayesian Matrix
    Factorization", JMLR 14, theorem 2), σ² being the least free energy (theorem 3).

    Args:
        values: All singular values, the largest first.
        rows: Of the matrix.
        columns: Of the matrix.
    """
    short, long = sorted((rows, columns))
    ratio = short / long
    tau = _TAU * math.sqrt(ratio)
    threshold = (1 + tau) * (1 + ratio / tau)
    squares = values.double().square()
    # Zeros beyond rounding have no logarithm: they say that there is no noise.
    squares = squares.clamp_min(1e-20 * float(squares[0]) + 1e-300)
    high = float(squares.sum()) / (short * long)
    most = min(math.ceil(short / (1 + ratio)) - 1, len(squares) - 1)
    low = max(float(squares[most]) / (long * threshold), float(squares[most:].mean()) / long)
    low, high = min(low, high), max(low, high)
    best = low
    for _ in range(_ROUNDS):
        grid = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64)
        energies = torch.stack(
            [_free_energy(squares / (long * s), s, short, ratio, threshold) for s in grid]
        )
        place = int(energies.argmin())
        best = float(grid[place])
        low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, _GRID - 1)])
    return int((squares > long * best * threshold).sum())


def _free_energy(x: Tensor, noise: Tensor, short: int, ratio: float, threshold: float) -> Tensor:
    """Return the free energy at a noise, up to a constant, of x = γ² / (M·σ²)."""
    kept, rest = x[x > threshold], x[x <= threshold]
    inner = kept - (1 + ratio)
    tau = 0.5 * (inner + (inner.square() - 4 * ratio).clamp_min(0).sqrt())
    total = (rest - rest.log()).sum() + (kept - tau).sum() + ((tau + 1) / kept).log().sum()
    return total + ratio * (tau / ratio + 1).log().sum() + (short - len(x)) * noise.log()
