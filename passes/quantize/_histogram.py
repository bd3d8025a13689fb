"""A streaming histogram whose result does not depend on how the values were batched."""

import math

import torch
from torch import Tensor

__all__ = ["Histogram"]


class Histogram:
    """Counts of values in bins of width 2^e, aligned at 0.

    The width is the smallest power of two with which the range seen so far takes at most `bins`
    bins. Widening merges whole bins, so counts are exact, and any order or split of the same
    values ends in the same histogram. Exact zeros (ReLU, padding) are counted apart: every
    quantizer keeps them. Of a tensor of more than `sample` values every k-th is counted; the
    range is always that of all values.

    Attributes:
        low: Smallest value seen, or 0.
        high: Largest value seen, or 0.
        zeros: How many values were exactly 0.
        counts: int64 `[n]`, values other than 0 per bin.
        first: Number of the first bin: bin k covers [k·width, (k+1)·width).
    """

    def __init__(self, bins: int = 4096, sample: int = 2**16) -> None:
        self.bins, self.sample = bins, sample
        self.low, self.high = 0.0, 0.0
        self.zeros = 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.first = 0
        self._exponent: int | None = None

    @property
    def width(self) -> float:
        """The width of a bin; 1 while nothing but zeros was seen."""
        return 1.0 if self._exponent is None else math.ldexp(1.0, self._exponent)

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, float64 `[n]`, kept inside [low, high]."""
        numbers = torch.arange(self.first, self.first + len(self.counts), dtype=torch.float64)
        return ((numbers + 0.5) * self.width).clamp(self.low, self.high)

    def update(self, x: Tensor, low: float, high: float) -> None:
        """Count the finite values of `x`, whose extremes are `low` and `high`."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.low == self.high == 0.0:
            self.zeros += x.numel()
            return
        self._cover()
        flat = x.detach().reshape(-1)
        if len(flat) > self.sample:
            flat = flat[:: _stride(len(flat), self.sample)].contiguous()
        zeros = len(flat) - int(flat.bool().sum())
        self.zeros += zeros
        numbers = (flat.float() * (1.0 / self.width)).floor_().to(torch.int32).sub_(self.first)
        self.counts += torch.bincount(numbers, minlength=len(self.counts))
        self.counts[-self.first] -= zeros

    def _cover(self) -> None:
        """Choose the bins for the range seen so far and move the counts into them."""
        exponent = _exponent_for(self.low, self.high, self.bins)
        if self._exponent is not None:
            exponent = max(exponent, self._exponent)
        width = math.ldexp(1.0, exponent)
        first, last = math.floor(self.low / width), math.floor(self.high / width)
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        if self._exponent is not None:
            old = torch.arange(self.first, self.first + len(self.counts))
            place = torch.bitwise_right_shift(old, exponent - self._exponent) - first
            counts.index_add_(0, place, self.counts)
        self.counts, self.first, self._exponent = counts, first, exponent


def _stride(length: int, sample: int) -> int:
    """Return a stride that counts about `sample` of `length` values, of every row and column alike.

    It has no divisor in common with any size of the tensor: a stride of 7 over 7 × 7 pixels would
    see nothing but the border.
    """
    stride = length // sample
    while math.gcd(stride, length) > 1:
        stride += 1
    return stride


def _exponent_for(low: float, high: float, bins: int) -> int:
    """Return the smallest e with which [low, high] takes at most `bins` bins of width 2^e."""
    exponent = math.frexp((high - low) / bins)[1] - 1
    # float32 numbers times 2^-e must stay finite.
    exponent = max(exponent, -120)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent
