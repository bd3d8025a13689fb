"""Coordinate descent: improve integers, zero points and scales of a weight in turn.

With D = W − Ŵ of a row and the Hessian H of its output error, J = D H Dᵀ. One coordinate at a time,
all others fixed, takes the value that lowers J most:

- an integer: with G = D H, the best ŵ_j is ŵ_j + G_j / H_jj, and the nearest point of its grid is
  the best one there is (Behdin et al., 2023, "QuantEase", arXiv:2309.01885, Lemma 1);
- a zero point z_g: a step of t moves the whole group by −t·s_g, so that the best step is the whole
  number next to t = −Σ_g G_j / (s_g · 1ᵀ H_gg 1);
- the scales of a row, all at once: `gptq.refit`.

No step raises J, so what GPTQ found is where it starts and never better than where it ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from passes.quantize._weight_only.gptq import refit
from passes.quantize._weight_only.grids import Grid

__all__ = ["descend"]

_BLOCK: Final = 32
# A column whose inputs are all but 0 says nothing of its integer.
_TINY: Final = 1e-12


def descend(
    weight: Tensor, grid: Grid, integers: Tensor, hessian: Tensor, sweeps: int
) -> tuple[Grid, Tensor]:
    """Return the grid and the integers after so many sweeps over all columns.

    Args:
        weight: `[rows, groups, elements]`.
        grid: Of `integers`.
        integers: `[rows, groups, elements]`, as floats.
        hessian: XᵀX, damped, `[columns, columns]`.
        sweeps: How often scales are refitted and every integer is looked at.
    """
    grid = refit(weight, grid, integers, hessian)
    for _ in range(sweeps):
        integers, slope = _sweep(weight, grid, integers, hessian)
        if not grid.width.symmetric:
            grid = _shifted(grid, weight.shape[-1], hessian, slope)
        grid = refit(weight, grid, integers, hessian, slope)
    return grid, integers


def _sweep(weight: Tensor, grid: Grid, integers: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return every integer at the best place for the others, column after column, and D H."""
    # Columns are rows here: what is worked on together lies together.
    made = grid.values(integers).flatten(1)
    slope = hessian @ (weight.flatten(1) - made).t()
    made, chosen = made.t().contiguous(), integers.flatten(1).t().contiguous()
    places = torch.arange(len(made)) // weight.shape[-1]
    scale, zero_point = grid.scale.t()[places], grid.zero_point.t()[places]
    low, high = grid.width.qmin, grid.width.qmax
    curve = hessian.diagonal()
    silent = (curve <= _TINY * curve.max()).tolist()
    for start in range(0, len(made), _BLOCK):
        end = min(start + _BLOCK, len(made))
        near = slope[start:end].clone()
        moved = torch.zeros_like(near)
        for j in range(start, end):
            if silent[j]:
                continue
            s, z = scale[j], zero_point[j]
            best = made[j] + near[j - start] / curve[j]
            q = ((best / s).round_() + z).clamp_(low, high)
            step = moved[j - start] = (q - chosen[j]) * s
            chosen[j] = q
            near.addr_(hessian[start:end, j], step, alpha=-1)
        slope.addmm_(hessian[:, start:end], moved, alpha=-1)
    return chosen.t().reshape(integers.shape), slope.t().contiguous()


def _shifted(grid: Grid, elements: int, hessian: Tensor, slope: Tensor) -> Grid:
    """Return the grid with every zero point at the best place for the others.

    `slope`, D H of `[rows, columns]`, is brought up to date in place.
    """
    zero_point = grid.zero_point.clone()
    for index in range(zero_point.shape[1]):
        part = slice(index * elements, (index + 1) * elements)
        s = grid.scale[:, index]
        curve = hessian[part, part].sum()
        if curve <= 0:
            continue
        step = (-slope[:, part].sum(dim=1) / (s * curve)).round()
        found = (zero_point[:, index] + step).clamp(grid.width.qmin, grid.width.qmax)
        step = found - zero_point[:, index]
        zero_point[:, index] = found
        slope.addr_(step * s, hessian[part].sum(dim=0))
    return replace(grid, zero_point=zero_point)
