"""What layers multiply their weights with: XᵀX and the mean of |x| per input channel."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["Inputs"]


class Inputs:
    """Sums over the rows of inputs that weights of one form read.

    Args:
        name: Of one such weight, for messages.
        groups: Groups of a convolution, else 1.
        columns: Of a row of the weight: taps times input channels of a group.
    """

    def __init__(self, name: str, groups: int, columns: int) -> None:
        self.name, self.rows = name, 0
        self.hessian = torch.zeros(groups, columns, columns)
        self.absolute = torch.zeros(groups, columns, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in `[groups, rows, columns]`."""
        self.hessian.baddbmm_(rows.transpose(1, 2).cpu(), rows.cpu())
        self.absolute += rows.abs().sum(dim=1, dtype=torch.float64).cpu()
        self.rows += rows.shape[1]

    @property
    def mean(self) -> Tensor:
        """The mean of |x|, `[groups, columns]`."""
        return self.absolute / max(self.rows, 1)

    def plus(self, other: Inputs) -> Inputs:
        """Return the sums over the rows of both."""
        made = Inputs(self.name, *self.absolute.shape)
        made.hessian = self.hessian + other.hessian
        made.absolute = self.absolute + other.absolute
        made.rows = self.rows + other.rows
        return made

    def divided(self, factors: Tensor) -> Inputs:
        """Return the sums of inputs that are divided by one factor per column, `[columns]`."""
        made = Inputs(self.name, *self.absolute.shape)
        made.hessian = self.hessian / (factors[:, None] * factors)
        made.absolute = self.absolute / factors
        made.rows = self.rows
        return made

    def blocks(self, group: int) -> Tensor:
        """Return the parts of XᵀX on its diagonal, `[groups, columns / group, group, group]`."""
        groups, columns, _ = self.hessian.shape
        count = columns // group
        parts = self.hessian.reshape(groups, count, group, count, group)
        return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1)

    def check(self) -> None:
        """Check that the sums are finite.

        Raises:
            NumericsError: They are not.
        """
        if not bool(self.hessian.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in the inputs that {self.name} is multiplied with",
                reason="calibration data leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.name,
            )
