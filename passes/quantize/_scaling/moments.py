"""Mean and deviation of each channel of an activation, streamed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["Moments"]


class Moments:
    """Sums over all but the channel dimension, in float64.

    Args:
        name: Of the node, for messages.
        dim: The dimension of the channels.
    """

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim, self.count = name, dim, 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def update(self, x: Any, real: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: The activation.
            real: A mask of its places, 0 for those to leave out; one of another shape than the
                activation without its last dimension, or with channels elsewhere, says nothing.

        Raises:
            NumericsError: It holds a NaN or an infinity.
        """
        if x.numel() == 0:
            return
        if real is not None and self.dim == -1 and real.shape == x.shape[:-1]:
            x = x[real != 0]
        rows = x.detach().double().movedim(self.dim, 0).flatten(1).cpu()
        self.total = self.total + rows.sum(dim=1)
        self.squares = self.squares + rows.square().sum(dim=1)
        self.count += rows.shape[1]
        if not bool(self.squares.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in the output of {self.name} during calibration",
                reason="calibration data, or a weight before it, leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.name,
            )

    @property
    def mean(self) -> Tensor:
        """The mean, `[channels]`."""
        return self.total / max(self.count, 1)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, `[channels]`."""
        variance = self.squares / max(self.count, 1) - self.mean.square()
        return variance.clamp_min(0).sqrt()
