"""What layers multiply their weights with: XᵀX and the mean of |x| per input channel.

Where the layers before are rounded already, X is what they give now and X̃ what they gave in float.
(X̃ − X)ᵀ X tells how far a layer's inputs have moved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        self.moved: Tensor | None = None

    def add(self, rows: Tensor, floating: Tensor | None = None) -> None:
        """Take in `[groups, rows, columns]`, and what they are in the float model."""
        self.hessian.baddbmm_(rows.transpose(1, 2).cpu(), rows.cpu())
        if floating is not None:
            if self.moved is None:
                self.moved = torch.zeros_like(self.hessian)
            self.moved.baddbmm_((floating - rows).transpose(1, 2).cpu(), rows.cpu())
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
        if self.moved is not None and other.moved is not None:
            made.moved = self.moved + other.moved
        made.rows = self.rows + other.rows
        return made

    def divided(self, factors: Tensor) -> Inputs:
        """Return the sums of inputs that are divided by one factor per column, `[columns]`."""
        made = Inputs(self.name, *self.absolute.shape)
        products = factors[:, None] * factors
        made.hessian = self.hessian / products
        made.absolute = self.absolute / factors
        made.moved = None if self.moved is None else self.moved / products
        made.rows = self.rows
        return made

    def padded(self, columns: int) -> Inputs:
        """Return the sums with columns of zeros added on the right, up to `columns` of them."""
        missing = columns - self.hessian.shape[-1]
        if not missing:
            return self
        made = Inputs(self.name, self.hessian.shape[0], columns)
        made.hessian = F.pad(self.hessian, (0, missing, 0, missing))
        made.absolute = F.pad(self.absolute, (0, missing))
        made.moved = None if self.moved is None else F.pad(self.moved, (0, missing, 0, missing))
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
