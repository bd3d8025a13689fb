"""Statistics of a layer's inputs, accumulated: norms of columns, or the Hessian."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["Gram", "Norms", "Statistics"]


class Statistics(ABC):
    """A sum over the rows of inputs of one weight.

    Args:
        name: The weight's name, for messages.
        groups: Matrices of the weight.
        columns: Columns of each.
    """

    def __init__(self, name: str, groups: int, columns: int) -> None:
        self.name = name
        self.sum = self._zeros(groups, columns)

    @abstractmethod
    def _zeros(self, groups: int, columns: int) -> Tensor:
        """Return the sum of nothing."""

    @abstractmethod
    def _of(self, rows: Tensor) -> Tensor:
        """Return what `rows` `[groups, rows, columns]` add."""

    def add(self, groups: slice, rows: Tensor) -> None:
        """Take in rows of some groups.

        Raises:
            NumericsError: The sum holds a NaN or an infinity.
        """
        self.sum[groups] += self._of(rows)

    def check(self) -> None:
        """Check that the sum is finite.

        Raises:
            NumericsError: It is not.
        """
        if not bool(self.sum.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in the inputs that {self.name} is multiplied with",
                reason="calibration data leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.name,
            )


class Norms(Statistics):
    """Squared Euclidean norm of every column, `[groups, columns]` in float64."""

    def _zeros(self, groups: int, columns: int) -> Tensor:
        return torch.zeros(groups, columns, dtype=torch.float64)

    def _of(self, rows: Tensor) -> Tensor:
        return rows.double().square().sum(1).cpu()


class Gram(Statistics):
    """The Hessian of the squared error, 2 X Xᵀ, `[groups, columns, columns]` in float32."""

    def _zeros(self, groups: int, columns: int) -> Tensor:
        return torch.zeros(groups, columns, columns)

    def _of(self, rows: Tensor) -> Tensor:
        return (2 * rows.transpose(1, 2) @ rows).cpu()
