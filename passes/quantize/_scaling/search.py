"""Factors of SmoothQuant, and the α with the least error in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import NumericsError
from fxcompress.nn import FakeQuantize

__all__ = ["Found", "Job", "Seen", "measure", "search", "smoothing_factors"]

# Rows of inputs and of weights on which an α is judged.
_ROWS: Final = 512
_LEAST: Final = 1e-5


@dataclass
class Seen:
    """What was seen of a layer's input: extremes per channel, and some rows.

    Args:
        name: The node's id, for messages.
        samples: How many samples there will be.
    """

    name: str
    samples: int
    low: Tensor | None = None
    high: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)

    def update(self, x: Any) -> None:
        """Take in one batch `[batch, …, channels]`.

        Raises:
            NumericsError: It holds a NaN or an infinity.
        """
        if x.numel() == 0:
            return
        rows = x.detach().float().reshape(-1, x.shape[-1])
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        if not bool((low + high).isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in the output of {self.name} during calibration",
                reason="calibration data, or a weight before it, leads to it",
                hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
                where=self.name,
            )
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        share = len(x) / max(self.samples, 1)
        count = min(len(rows), max(1, round(_ROWS * share)))
        # Evenly spread, not in step with the positions of a sequence.
        places = torch.linspace(0, len(rows) - 1, count).long()
        self.parts.append(rows[places].clone())

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value of each channel, `[channels]` each."""
        assert self.low is not None and self.high is not None, "data was seen"  # noqa: PT018
        return self.low, self.high

    @property
    def largest(self) -> Tensor:
        """The largest |x| of each channel, `[channels]`."""
        low, high = self.extremes
        return torch.maximum(low.abs(), high.abs())

    @property
    def rows(self) -> Tensor:
        """The rows kept, `[rows, channels]`."""
        return torch.cat(self.parts)


@dataclass(frozen=True)
class Job:
    """One linear layer of a group.

    Attributes:
        seen: Of its input.
        weight: `[outputs, inputs]`.
        index: The group's channel of each input, or -1.
    """

    seen: Seen
    weight: Tensor
    index: Tensor


@dataclass(frozen=True)
class Found:
    """Factors, their α (None: without smoothing), and the error without and with them."""

    factors: Tensor
    alpha: float | None
    before: float
    after: float


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float, free: Tensor) -> Tensor:
    """Return s, `[channels]`: max|x|^α / max|W|^(1 − α); 1 where either is 0 or not free."""
    alive = free & (inputs > 0) & (weights > 0)
    x, w = inputs.double().clamp_min(1e-30), weights.double().clamp_min(1e-30)
    found = (x.pow(alpha) / w.pow(1 - alpha)).clamp(_LEAST, 1 / _LEAST)
    return torch.where(alive, found, 1.0)


def search(
    jobs: Iterable[Job], inputs: Tensor, weights: Tensor, free: Tensor, alphas: Iterable[float]
) -> Found:
    """Return the factors of the α with the least error of all layers together.

    Args:
        jobs: The layers; their relative errors are added.
        inputs: The largest |x| of each channel of the group.
        weights: The largest |W| of each channel.
        free: Which channels may have a factor.
        alphas: The candidates beside no smoothing.
    """
    judged = [_Judged(job) for job in jobs]
    ones = torch.ones(len(free), dtype=torch.float64)
    before = _mean_error(judged, ones)
    best = Found(ones, None, before, before)
    for alpha in alphas:
        factors = smoothing_factors(inputs, weights, alpha, free)
        error = _mean_error(judged, factors)
        if error < best.after:
            best = Found(factors, alpha, before, error)
    return best


def measure(jobs: Iterable[Job], factors: Tensor, alpha: float) -> Found:
    """Return factors that are given, with the error without and with them."""
    judged = [_Judged(job) for job in jobs]
    before = _mean_error(judged, torch.ones_like(factors))
    return Found(factors, alpha, before, _mean_error(judged, factors))


def _mean_error(judged: list[_Judged], factors: Tensor) -> float:
    return sum(each.error(factors) for each in judged) / max(len(judged), 1)


class _Judged:
    """A layer's output on the rows kept, exact and rounded."""

    def __init__(self, job: Job) -> None:
        self.index = job.index
        self.x = job.seen.rows
        self.low, self.high = job.seen.extremes
        self.weight = job.weight[:: max(1, len(job.weight) // _ROWS)].float()
        self.wanted = self.x @ self.weight.T
        self.power = float(self.wanted.square().mean())

    def error(self, per_channel: Tensor) -> float:
        """Return the mean squared error as a part of the output's mean square."""
        known = per_channel[self.index.clamp_min(0).long()]
        factors = torch.where(self.index >= 0, known, 1.0).float()
        low, high = float((self.low / factors).min()), float((self.high / factors).max())
        rounded = _rounded_inputs(self.x / factors, low, high)
        made = rounded @ _rounded_rows(self.weight * factors).T
        return float((made - self.wanted).square().mean()) / max(self.power, 1e-30)


def _rounded_inputs(x: Tensor, low: float, high: float) -> Tensor:
    """Round to 8 bits with one scale that covers a range."""
    fake = FakeQuantize(8, signed=False, symmetric=False)
    made: Tensor = fake.fit(torch.tensor(low), torch.tensor(high))(x)
    return made


def _rounded_rows(weight: Tensor) -> Tensor:
    """Round to 8 bits, symmetric, with a scale per output channel."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / scale).round() * scale
