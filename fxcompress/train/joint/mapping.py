"""Which layer of a student learns from which of its teacher's: by number, or by similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.errors import UsageError

__all__ = ["best_in_order", "last", "linear_cka", "uniform"]


def uniform(count: int, teachers: int) -> tuple[int, ...]:
    """Return evenly spaced layers of a teacher, its last one with the student's last.

    Layer i of n learns from ⌊(i + 1)·m / n⌋ − 1 of m (Jiao et al., 2020, arXiv:1909.10351,
    section 4.1).

    Raises:
        UsageError: The teacher has fewer layers.
    """
    _check(count, teachers)
    return tuple((place + 1) * teachers // count - 1 for place in range(count))


def last(count: int, teachers: int) -> tuple[int, ...]:
    """Return the last layers of a teacher.

    Raises:
        UsageError: The teacher has fewer layers.
    """
    _check(count, teachers)
    return tuple(range(teachers - count, teachers))


def _check(count: int, teachers: int) -> None:
    if count > teachers:
        raise UsageError(
            f"{count} layers cannot learn from {teachers}, one from one",
            hint="list pairs, or tap fewer layers: `map: [[0, 1], [1, 3]]`",
        )


def best_in_order(similarity: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Return the one-to-one matching, in order, with the largest sum.

    Args:
        similarity: `[student, teacher]`.

    Raises:
        UsageError: There are fewer columns than rows.
    """
    rows, columns = len(similarity), len(similarity[0])
    _check(rows, columns)
    # best[i][j]: of the first i rows among the first j columns.
    best = [[0.0] * (columns + 1)] + [[float("-inf")] * (columns + 1) for _ in range(rows)]
    for i in range(1, rows + 1):
        for j in range(i, columns + 1):
            best[i][j] = max(best[i][j - 1], best[i - 1][j - 1] + similarity[i - 1][j - 1])
    chosen: list[int] = []
    i, j = rows, columns
    while i:
        if j > i and best[i][j] == best[i][j - 1]:
            j -= 1
            continue
        chosen.append(j - 1)
        i, j = i - 1, j - 1
    return tuple(reversed(chosen))


def linear_cka(ours: Tensor, theirs: Tensor) -> float:
    """Return ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, in double precision.

    1 where one is a rotation and a scaling of the other. Source: Kornblith et al., 2019,
    "Similarity of Neural Network Representations Revisited", arXiv:1905.00414, eq. 3.

    Args:
        ours: X `[rows, width]`.
        theirs: Y `[rows, width]`; another width is as good.
    """
    x, y = (each.double() - each.double().mean(0) for each in (ours, theirs))
    if len(x) < min(x.shape[1], y.shape[1]):
        k, m = x @ x.T, y @ y.T
        cross, own, other = (k * m).sum(), torch.linalg.norm(k), torch.linalg.norm(m)
    else:
        cross = torch.linalg.norm(y.T @ x).square()
        own, other = torch.linalg.norm(x.T @ x), torch.linalg.norm(y.T @ y)
    norm = float(own * other)
    return float(cross) / norm if norm else 0.0
