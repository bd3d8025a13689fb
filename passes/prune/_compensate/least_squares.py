"""Sums over rows that a linear map is fitted to, and its solution."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["Sums"]


class Sums:
    """Sums over rows of the inputs x̃ `[n, columns]` and of what the outputs lack `[n, out]`."""

    def __init__(self, columns: int, out: int, squares: bool) -> None:
        self.count = 0
        self.row = torch.zeros(columns, dtype=torch.float64)
        self.lack = torch.zeros(out, dtype=torch.float64)
        self.gram = torch.zeros(columns, columns, dtype=torch.float64) if squares else None
        self.cross = torch.zeros(out, columns, dtype=torch.float64) if squares else None

    def add(self, rows: Tensor, lacks: Tensor) -> None:
        """Take in some rows."""
        rows, lacks = rows.cpu().double(), lacks.double()
        self.count += len(rows)
        self.row += rows.sum(0)
        self.lack += lacks.sum(0)
        if self.gram is not None and self.cross is not None:
            self.gram.addmm_(rows.T, rows)
            self.cross.addmm_(lacks.T, rows)

    @property
    def mean_row(self) -> Tensor:
        """x̄."""
        return self.row / max(self.count, 1)

    @property
    def mean_lack(self) -> Tensor:
        """ē."""
        return self.lack / max(self.count, 1)

    def check(self, name: str) -> None:
        """Check that all sums are finite.

        Raises:
            NumericsError: One is not.
        """
        for each in (self.row, self.lack, self.gram):
            if each is not None and not bool(each.isfinite().all()):
                raise NumericsError(
                    f"a NaN or an infinity at {name} while compensating",
                    reason="calibration data leads to it, before or after pruning",
                    hint="check the data and the weights; if fp16 overflows, prune in fp32",
                    where=name,
                )

    def take(self, other: Sums) -> None:
        """Take in all rows of other sums."""
        self.count += other.count
        for mine, theirs in (
            (self.row, other.row),
            (self.lack, other.lack),
            (self.gram, other.gram),
            (self.cross, other.cross),
        ):
            if mine is not None and theirs is not None:
                mine += theirs

    def moments(self, about: Sums | None = None) -> tuple[Tensor, Tensor]:
        """Return the means of x̃ x̃ᵀ `[columns, columns]` and of e x̃ᵀ `[out, columns]`.

        Args:
            about: Both are taken about the means of these sums; None takes them about zero.
        """
        assert self.gram is not None, "least squares"
        assert self.cross is not None, "least squares"
        gram, cross = self.gram / max(self.count, 1), self.cross / max(self.count, 1)
        if about is not None:
            off, lack = self.mean_row - about.mean_row, self.mean_lack - about.mean_lack
            gram = gram - torch.outer(self.mean_row, self.mean_row) + torch.outer(off, off)
            cross = cross - torch.outer(self.mean_lack, self.mean_row) + torch.outer(lack, off)
        return gram, cross

    def solve(self, ridge: float, *, centred: bool) -> Tensor:
        """Return Δ `[out, columns]`."""
        gram, cross = self.moments(self if centred else None)
        diagonal = gram.diagonal()
        damping = ridge * float(diagonal.mean())
        if damping <= 0:
            return torch.zeros_like(cross)
        diagonal += damping
        solved: Tensor = torch.linalg.solve(gram, cross.T).T
        return solved
