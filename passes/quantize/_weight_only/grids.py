"""Grids of integers for grouped weights: scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from fxcompress.nn import affine_parameters

__all__ = ["Grid", "Width", "fit", "hqq"]

# A clipped range is at least this part of the whole one.
_LEAST_SHRINK: Final = 0.4
_SHRINKS: Final = 25
# Half-quadratic splitting: the exponent p, the first weight β of the penalty and its growth κ.
_HQQ_POWER: Final = 0.7
_HQQ_BETA: Final = 10.0
_HQQ_GROWTH: Final = 1.01
_HQQ_STEPS: Final = 20
# Scales stay so near to the one that covers the group: what is clipped counts for little in the
# sum of powers, and for much in what a model computes.
_HQQ_NEAR: Final = 0.1
_TINY: Final = 1e-12


@dataclass(frozen=True)
class Width:
    """The integers of a weight: `bits` wide, signed with zero point 0 or unsigned."""

    bits: int
    symmetric: bool

    @property
    def qmin(self) -> int:
        """The lowest integer."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The highest integer."""
        return int(2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points (whole, as floats) of groups, `[rows, groups]`."""

    width: Width
    scale: Tensor
    zero_point: Tensor

    def integers(self, weight: Tensor) -> Tensor:
        """Return the nearest integers of `[rows, groups, elements]`, as floats."""
        level = (weight / self.scale[..., None]).round() + self.zero_point[..., None]
        return level.clamp(self.width.qmin, self.width.qmax)

    def values(self, integers: Tensor) -> Tensor:
        """Return what `[rows, groups, elements]` integers stand for."""
        return (integers - self.zero_point[..., None]) * self.scale[..., None]

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the weight as its nearest integers give it back."""
        return self.values(self.integers(weight))


def fit(weight: Tensor, width: Width, search: str, hessian: Tensor | None = None) -> Grid:
    """Return the grid that covers each group, or with `mse` the shrunk one with the least error.

    Args:
        weight: `[rows, groups, elements]`, float.
        width: The integers.
        search: `minmax` or `mse`.
        hessian: XᵀX of each group's inputs, `[groups, elements, elements]`: the error is then that
            of the output, dᵀ XᵀX d, as in AWQ's search for clipping (arXiv:2306.00978, section
            3.2); else the squared error of the weights.
    """
    low, high = weight.aminmax(dim=-1)
    best = _covering(low, high, width)
    if search == "minmax":
        return best
    least = _error(best.rounded(weight) - weight, hessian)
    for step in range(1, _SHRINKS):
        shrink = 1.0 - (1.0 - _LEAST_SHRINK) * step / (_SHRINKS - 1)
        grid = _covering(low * shrink, high * shrink, width)
        error = _error(grid.rounded(weight) - weight, hessian)
        better = error < least
        least = torch.where(better, error, least)
        best = _choose(better, grid, best)
    return best


def hqq(weight: Tensor, width: Width) -> Grid:
    """Return the grid that minimises Σ|w − (q − z)·s|^p, p = 0.7, for each group.

    Half-quadratic splitting (Badri & Shaji, 2023, "Half-Quadratic Quantization of Large Machine
    Learning Models") with an error e and a growing β alternates between

        e ← shrink(w − (q − z)·s),   shrink(x) = sign(x)·max(|x| − |x|^(p−1)/β, 0)    (eq. 6)
        z ← mean(q − (w − e)/s)                                                        (eq. 9)

    Runtimes store whole zero points, so z is rounded, and s takes its least-squares value
    ⟨q − z, w − e⟩ / ⟨q − z, q − z⟩ to gain what the rounding loses, within 10 % of the scale that
    covers the group, which the source keeps; symmetric integers have s only. The best grid seen is
    returned; the first is the one that covers the group.

    Args:
        weight: `[rows, groups, elements]`, float.
        width: The integers.
    """
    covering = best = grid = _covering(*weight.aminmax(dim=-1), width)
    least = torch.full_like(grid.scale, torch.inf)
    beta = _HQQ_BETA
    for _ in range(_HQQ_STEPS):
        integers = grid.integers(weight)
        error = weight - grid.values(integers)
        size = error.abs()
        # |x|^(p-1) is infinite at 0, where nothing is left to shrink.
        slope = size.clamp_min(_TINY).pow(_HQQ_POWER - 1)
        found = (size * slope).sum(dim=-1)
        better = found < least
        if not bool(better.any()):
            break
        least, best = torch.where(better, found, least), _choose(better, grid, best)
        target = weight - error.sign() * (size - slope / beta).clamp_min_(0)
        grid = _refitted(grid, integers, target, covering.scale)
        beta *= _HQQ_GROWTH
    return best


def _refitted(grid: Grid, integers: Tensor, target: Tensor, covering: Tensor) -> Grid:
    """Return the zero points, and scales near `covering`, with which the integers give `target`."""
    width, zero_point = grid.width, grid.zero_point
    if not width.symmetric:
        mean = (integers - target / grid.scale[..., None]).mean(dim=-1)
        zero_point = mean.round().clamp(width.qmin, width.qmax)
    steps = integers - zero_point[..., None]
    square = steps.square().sum(dim=-1)
    scale = (steps * target).sum(dim=-1) / square.clamp_min(1.0)
    near = scale.clamp(covering * (1 - _HQQ_NEAR), covering * (1 + _HQQ_NEAR))
    return Grid(width, torch.where(square > 0, near, grid.scale), zero_point)


def _covering(low: Tensor, high: Tensor, width: Width) -> Grid:
    scale, zero_point = affine_parameters(
        low, high, qmin=width.qmin, qmax=width.qmax, symmetric=width.symmetric
    )
    return Grid(width, scale, zero_point.float())


def _choose(where: Tensor, new: Grid, old: Grid) -> Grid:
    return replace(
        old,
        scale=torch.where(where, new.scale, old.scale),
        zero_point=torch.where(where, new.zero_point, old.zero_point),
    )


def _error(difference: Tensor, hessian: Tensor | None) -> Tensor:
    if hessian is None:
        return difference.square().sum(dim=-1)
    product = torch.matmul(difference.transpose(0, 1), hessian).transpose(0, 1)
    return (product * difference).sum(dim=-1)
