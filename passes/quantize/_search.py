"""Search for the range to quantise: clip outliers where that lowers the error of the rest.

- `mse`: the range with the least expected squared error (Choukroun et al., 2019,
  arXiv:1902.06822): grids of candidate ends, the two ends in turn.
- `entropy`: the range whose quantised distribution has the least Kullback-Leibler divergence from
  the original (Migacz, "8-bit inference with TensorRT", GTC 2017), first the upper end, then the
  lower.
"""

import torch
from torch import Tensor

from fxcompress.nn import FakeQuantize, FloatQuantize, affine_parameters
from passes.quantize._build import Quantizer
from passes.quantize._histogram import Histogram

__all__ = ["entropy_range", "mse_range", "mse_weight_range"]

_CANDIDATES = 64
_ROUNDS = 2
_SMALLEST_SCALE = 1e-30
_SHRINKS = tuple(1.0 - step / _CANDIDATES for step in range(_CANDIDATES))


def mse_range(histogram: Histogram, fake: Quantizer) -> tuple[float, float]:
    """Return the range in [low, high] with the least mean squared error under `fake`'s numbers."""
    low, high = histogram.low, histogram.high
    occupied = histogram.counts > 0
    centres, counts = histogram.centres[occupied], histogram.counts[occupied].double()
    if len(counts) == 0:
        return low, high
    shrink = torch.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES, dtype=torch.float64)
    if isinstance(fake, FloatQuantize) or fake.symmetric:
        bound = max(-low, high)
        best = _least(centres, counts, -bound * shrink, bound * shrink, fake)
        return max(low, -bound * best), min(high, bound * best)
    ends = [low, high]
    for _ in range(_ROUNDS):
        for side in (0, 1):
            full = (low, high)[side]
            if full == 0:
                continue
            lows = full * shrink if side == 0 else torch.full_like(shrink, ends[0])
            highs = full * shrink if side == 1 else torch.full_like(shrink, ends[1])
            ends[side] = full * _least(centres, counts, lows, highs, fake)
    return ends[0], ends[1]


def _least(centres: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, fake: Quantizer) -> float:
    """Return the shrink factor of the candidate range with the least error."""
    if isinstance(fake, FloatQuantize):
        error = (_as_floats(centres, highs, fake) - centres).square_() @ counts
        return 1.0 - int(error.argmin()) / _CANDIDATES
    scale, zero_point = affine_parameters(
        lows, highs, qmin=fake.qmin, qmax=fake.qmax, symmetric=fake.symmetric
    )
    s, z = scale.double()[:, None], zero_point.double()[:, None]
    # In place, because a table of candidates by bins is larger than a cache.
    q = (centres / s).round_().add_(z).clamp_(fake.qmin, fake.qmax)
    error = q.sub_(z).mul_(s).sub_(centres).square_() @ counts
    # The first of equals is the widest.
    return 1.0 - int(error.argmin()) / _CANDIDATES


def _as_floats(x: Tensor, bound: Tensor, fake: FloatQuantize) -> Tensor:
    """Return `x`, rows of numbers or one for all, as floats with each bound at their end."""
    scale = (bound / fake.largest).clamp_min(_SMALLEST_SCALE)[:, None]
    rounded = (x / scale).clamp_(-fake.largest, fake.largest).to(fake.dtype)
    return rounded.to(x.dtype) * scale


def entropy_range(histogram: Histogram, fake: FakeQuantize) -> tuple[float, float]:
    """Return the range with the least KL divergence of the quantised from the real distribution."""
    low, high = histogram.low, histogram.high
    if not bool(histogram.counts.any()):
        return low, high
    if fake.symmetric:
        bound = max(-low, high)
        best = _least_divergence(histogram, fake, [(-bound * s, bound * s) for s in _SHRINKS])
        return max(low, best[0]), min(high, best[1])
    low, high = _least_divergence(histogram, fake, [(low, high * s) for s in _SHRINKS])
    return _least_divergence(histogram, fake, [(low * s, high) for s in _SHRINKS])


def _least_divergence(
    histogram: Histogram, fake: FakeQuantize, ranges: list[tuple[float, float]]
) -> tuple[float, float]:
    """Return the range with the least divergence; the first of equals."""
    counts, centres = histogram.counts.double(), histogram.centres
    levels = fake.qmax - fake.qmin + 1
    best, least = ranges[0], float("inf")
    for low, high in ranges:
        inside = (centres >= low) & (centres <= high)
        if int(inside.sum()) < levels:
            break
        divergence = _divergence(counts, inside, levels)
        if divergence < least:
            best, least = (low, high), divergence
    return best


def _divergence(counts: Tensor, inside: Tensor, levels: int) -> float:
    """Return KL(P‖Q): P is clipped, outliers added to its ends; Q is P without them, in levels."""
    where = torch.nonzero(inside).flatten()
    first, last = int(where[0]), int(where[-1])
    kept = counts[first : last + 1]
    clipped = kept.clone()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last + 1 :].sum()
    level = torch.arange(len(kept)) * levels // len(kept)
    present = (kept > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    spread = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, present)
    quantised = present * (mass / spread.clamp(min=1))[level]
    p = clipped / clipped.sum()
    # Smoothed, so that an outlier's bin that Q leaves empty costs much and not infinity.
    q = (quantised + 1e-6 * quantised.sum() / len(kept)) / (quantised.sum() * (1 + 1e-6))
    occupied = p > 0
    return float((p[occupied] * (p[occupied] / q[occupied]).log()).sum())


def mse_weight_range(rows: Tensor, fake: Quantizer) -> tuple[Tensor, Tensor]:
    """Return, for each row of `[rows, elements]`, the shrunk min-max range with the least error."""
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    if isinstance(fake, FloatQuantize):
        high = torch.maximum(-low, high)
        low = -high
    best_low, best_high = low.clone(), high.clone()
    least = torch.full_like(low, float("inf"))
    for step in range(_CANDIDATES // 2):
        shrink = 1.0 - step / _CANDIDATES
        error = ((_rounded(rows, low * shrink, high * shrink, fake) - rows) ** 2).sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
    return best_low, best_high


def _rounded(rows: Tensor, low: Tensor, high: Tensor, fake: Quantizer) -> Tensor:
    """Return rows as a quantizer of each range gives them back."""
    if isinstance(fake, FloatQuantize):
        return _as_floats(rows, high, fake)
    scale, zero_point = affine_parameters(
        low, high, qmin=fake.qmin, qmax=fake.qmax, symmetric=fake.symmetric
    )
    s, z = scale[:, None], zero_point[:, None].float()
    q = ((rows / s).round() + z).clamp(fake.qmin, fake.qmax)
    return (q - z) * s
