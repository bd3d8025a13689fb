"""GPTQ: round column by column, and let the columns still in float make up for the error.

With the Hessian H = XᵀX + λI of the squared error of the output and the upper Cholesky factor U of
its inverse (H⁻¹ = UᵀU), column j of W `[rows, columns]` is rounded to w̃, and

    W[:, j:] −= ((w − w̃) / U_jj) · U[j, j:]

is the least-squares change of the columns from j on with those before fixed. Columns are worked on
in blocks; those right of a block get all of its updates at once. Source: Frantar et al., 2023,
arXiv:2210.17323, Algorithm 1.

Afterwards the integers are fixed and the scales of a row take their least-squares values.

Columns are taken in order of their inputs' norm, the largest first ("act-order"), while the groups
stay runs of neighbouring columns with scales fixed beforehand ("static groups").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import NumericsError
from passes.quantize._weight_only.grids import Grid

__all__ = ["Factor", "factor", "gptq", "refit"]

_BLOCK: Final = 32
# Refitted scales stay within this factor of what they were.
_FARTHEST: Final = 2.0
_RIDGE: Final = 1e-3


@dataclass(frozen=True)
class Factor:
    """A damped Hessian's inverse as UᵀU, columns in `order`.

    Attributes:
        upper: U, float32.
        order: Which columns they are.
        ridge: What was added to the diagonal.
    """

    upper: Tensor
    order: Tensor
    ridge: float

    def damped(self, hessian: Tensor) -> Tensor:
        """Return the Hessian with what was added to its diagonal."""
        made = hessian.clone()
        made.diagonal().add_(self.ridge)
        return made

    def solve(self, rows: Tensor) -> Tensor:
        """Return `rows` `[rows, columns]` times the inverse."""
        made = torch.empty_like(rows)
        made[:, self.order] = rows[:, self.order] @ self.upper.T @ self.upper
        return made


def factor(hessian: Tensor, damping: float, *, ordered: bool, name: str) -> Factor:
    """Factor the inverse of a damped Hessian `[columns, columns]`, in double precision.

    A column without inputs is independent of all others and is rounded to nearest.

    Args:
        hessian: XᵀX.
        damping: λ as a part of the mean of the diagonal.
        ordered: Take the columns with the largest inputs first.
        name: The weight's name, for messages.

    Raises:
        NumericsError: The Hessian cannot be inverted.
    """
    diagonal = hessian.diagonal()
    if ordered:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=hessian.device)
    sorted_ = hessian.double()[order][:, order]
    mean = float(diagonal.double().mean())
    ridge = damping * mean if mean > 0 else 1.0
    sorted_.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(sorted_)
    if bool(failed):
        raise NumericsError(
            f"the Hessian of {name} cannot be inverted",
            reason="it is not positive definite in double precision",
            hint="raise `damping`, or calibrate on more samples",
            where=name,
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return Factor(upper.float(), order, ridge)


def gptq(weight: Tensor, grid: Grid, factored: Factor) -> Tensor:
    """Return the integers of `[rows, groups, elements]`, as floats of that shape."""
    order, upper = factored.order, factored.upper
    # Columns are rows here: what is worked on together lies together.
    current = weight.flatten(1).t()[order].contiguous()
    places = order // weight.shape[-1]
    scale, zero_point = grid.scale.t()[places], grid.zero_point.t()[places]
    low, high = grid.width.qmin, grid.width.qmax
    integers = torch.empty_like(current)
    for start in range(0, len(current), _BLOCK):
        end = min(start + _BLOCK, len(current))
        errors = torch.empty_like(current[start:end])
        for j in range(start, end):
            column, s, z = current[j], scale[j], zero_point[j]
            q = integers[j] = ((column / s).round_() + z).clamp_(low, high)
            error = errors[j - start] = (column - (q - z) * s) / upper[j, j]
            current[j:end].addr_(upper[j, j:end], error, alpha=-1)
        current[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    restored = torch.empty_like(integers)
    restored[order] = integers
    return restored.t().reshape(weight.shape)


def refit(
    weight: Tensor, grid: Grid, integers: Tensor, hessian: Tensor, slope: Tensor | None = None
) -> Grid:
    """Return the grid with the scales that give the least output error for fixed integers.

    A row is w ≈ Σ_g s_g·d_g with d_g = q − z in group g and 0 elsewhere, so that the scales solve
    (D H Dᵀ) s = D H w, a system of as many equations as the row has groups.

    Args:
        weight: `[rows, groups, elements]`.
        grid: Of `integers`.
        integers: `[rows, groups, elements]`.
        hessian: XᵀX, `[columns, columns]`.
        slope: (W − Ŵ) H, `[rows, columns]`, where it is known.
    """
    rows, groups, elements = weight.shape
    steps = integers - grid.zero_point[..., None]
    normal = torch.empty(rows, groups, groups)
    for index in range(groups):
        part = hessian[index * elements : (index + 1) * elements]
        through = (steps[:, index] @ part).reshape(rows, groups, elements)
        normal[:, index] = (through * steps).sum(dim=-1)
    if slope is None:
        slope = (weight - grid.values(integers)).flatten(1) @ hessian
    wanted = (slope.reshape(weight.shape) * steps).sum(dim=-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # A group of zeros has an equation of zeros.
    diagonal += _RIDGE * diagonal + 1e-12 + diagonal.mean(dim=1, keepdim=True) * 1e-6
    scale = grid.scale + torch.linalg.solve(normal.double(), wanted.double()).float()
    near = (scale > grid.scale / _FARTHEST) & (scale < grid.scale * _FARTHEST)
    usable = near.all(dim=1, keepdim=True)
    return replace(grid, scale=torch.where(usable, scale, grid.scale))
