"""Observers: statistics of one activation, streamed, and the range to quantise they lead to.

No observer keeps activations: min-max and moving average hold two numbers, the others a histogram.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from fxcompress.errors import NumericsError
from fxcompress.nn import FakeQuantize
from passes.quantize._build import Quantizer
from passes.quantize._histogram import Histogram
from passes.quantize._options import ObserverName
from passes.quantize._search import entropy_range, mse_range

__all__ = [
    "HistogramObserver",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "make_observer",
]


class Observer(ABC):
    """Watches one activation, batch by batch.

    Args:
        name: The node's id, for messages.

    Attributes:
        batches: How many were seen.
        constant: The one value that all batches consist of, if it is one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.batches = 0
        self.constant: float | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch.

        Raises:
            NumericsError: It holds a NaN or an infinity.
        """
        if x.numel() == 0:
            return
        x = x.detach().float()
        low, high = (float(each) for each in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            what = "a NaN" if math.isnan(low) or math.isnan(high) else "an infinity"
            raise NumericsError(
                f"{what} in the output of {self.name} during calibration",
                reason=f"batch {self.batches + 1} of the calibration data leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.name,
            )
        same = low == high and (self.batches == 0 or low == self.constant)
        self.constant = low if same else None
        self.batches += 1
        self._observe(x, low, high)

    @abstractmethod
    def _observe(self, x: Tensor, low: float, high: float) -> None:
        """Take in a batch of finite values with these extremes."""

    @abstractmethod
    def range(self, fake: Quantizer) -> tuple[float, float]:
        """Return the lowest and the highest value to represent with `fake`'s numbers."""


class MinMax(Observer):
    """Everything that was seen is in range."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.low, self.high = math.inf, -math.inf

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, fake: Quantizer) -> tuple[float, float]:
        """Return the extremes seen."""
        return self.low, self.high


class MovingAverage(Observer):
    """The exponential moving average of each batch's extremes (Jacob et al., arXiv:1712.05877).

    Args:
        name: The node's id.
        momentum: Weight of a new batch.
    """

    def __init__(self, name: str, momentum: float = 0.1) -> None:
        super().__init__(name)
        self.momentum = momentum
        self.low, self.high = 0.0, 0.0

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        weight = 1.0 if self.batches == 1 else self.momentum
        self.low += weight * (low - self.low)
        self.high += weight * (high - self.high)

    def range(self, fake: Quantizer) -> tuple[float, float]:
        """Return the averages."""
        return self.low, self.high


class HistogramObserver(Observer):
    """The range with the least error, or divergence, of the histogram of all values."""

    def __init__(self, name: str, search: Literal["mse", "entropy"] = "mse") -> None:
        super().__init__(name)
        self.search = search
        self.histogram = Histogram()

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        self.histogram.update(x, low, high)

    def range(self, fake: Quantizer) -> tuple[float, float]:
        """Return the range found."""
        if self.search == "mse":
            return mse_range(self.histogram, fake)
        assert isinstance(fake, FakeQuantize), "the options refuse `entropy` for floats"
        return entropy_range(self.histogram, fake)


class Percentile(Observer):
    """The central `percentile` per cent of all values; the rest is clipped, half at each end."""

    def __init__(self, name: str, percentile: float = 99.99) -> None:
        super().__init__(name)
        self.percentile = percentile
        self.histogram = Histogram()

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        self.histogram.update(x, low, high)

    def range(self, fake: Quantizer) -> tuple[float, float]:
        """Return the two quantiles, to the width of a bin."""
        seen = self.histogram
        if len(seen.counts) == 0:
            return 0.0, 0.0
        counts = seen.counts.double()
        counts[-seen.first] += seen.zeros
        below = counts.cumsum(0)
        tail = below[-1] * (1 - self.percentile / 100) / 2
        bottom = int(torch.searchsorted(below, tail, right=True))
        top = int(torch.searchsorted(below, below[-1] - tail))
        low = (seen.first + bottom) * seen.width
        high = (seen.first + min(top, len(counts) - 1) + 1) * seen.width
        return max(seen.low, low), min(seen.high, high)


def make_observer(
    kind: ObserverName, name: str, *, percentile: float = 99.99, momentum: float = 0.1
) -> Observer:
    """Return a new observer of the kind that a spec names."""
    if kind == "minmax":
        return MinMax(name)
    if kind == "moving_average":
        return MovingAverage(name, momentum)
    if kind == "percentile":
        return Percentile(name, percentile)
    return HistogramObserver(name, kind)
