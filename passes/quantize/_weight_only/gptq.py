"""GPTQ: round column by column, and let the columns still in float make up for the error.

With the Hessian H = XᵀX + λI of the squared error of the output and the upper Cholesky factor U of
its inverse (H⁻¹ = UᵀU), column j of W `[rows, columns]` is rounded to w̃, and

    W[:, j:] −= ((w − w̃) / U_jj) · U[j, j:]

is the least-squares change of the columns from j on with those before fixed. Columns are worked on
in blocks; those right of a block get all of its updates at once. Source: Frantar et al., 2023,
arXiv:2210.17323, Algorithm 1.

Columns are taken in order of their inputs' norm, the largest first ("act-order"), while the groups
stay runs of neighbouring columns with scales fixed beforehand ("static groups").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import NumericsError
from passes.quantize._weight_only.grids import Grid

__all__ = ["Factor", "factor", "gptq"]

_BLOCK: Final = 128


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor of an inverse Hessian, its columns in `order`, float32."""

    upper: Tensor
    order: Tensor


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
    mean = diagonal.double().mean()
    sorted_.diagonal().add_(damping * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(sorted_)
    if bool(failed):
        raise NumericsError(
            f"the Hessian of {name} cannot be inverted",
            reason="it is not positive definite in double precision",
            hint="raise `damping`, or calibrate on more samples",
            where=name,
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return Factor(upper.float(), order)


def gptq(weight: Tensor, grid: Grid, factored: Factor) -> Tensor:
    """Return the integers of `[rows, groups, elements]`, as floats of that shape."""
    order, upper = factored.order, factored.upper
    elements = weight.shape[-1]
    current = weight.flatten(1)[:, order].clone()
    scale = grid.scale[:, order // elements]
    zero_point = grid.zero_point[:, order // elements]
    low, high = grid.width.qmin, grid.width.qmax
    integers = torch.empty_like(current)
    for start in range(0, current.shape[1], _BLOCK):
        end = min(start + _BLOCK, current.shape[1])
        errors = torch.empty_like(current[:, start:end])
        for j in range(start, end):
            column, s, z = current[:, j], scale[:, j], zero_point[:, j]
            q = ((column / s).round_() + z).clamp_(low, high)
            integers[:, j] = q
            error = (column - (q - z) * s) / upper[j, j]
            errors[:, j - start] = error
            current[:, j:end].addr_(error, upper[j, j:end], alpha=-1)
        current[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    restored = torch.empty_like(integers)
    restored[:, order] = integers
    return restored.reshape(weight.shape)
