"""SparseGPT: prune column by column, and let the columns to the right make up for it.

The weight W `[out, columns]` of a layer with inputs X is replaced by a sparse one that keeps W X.
With the Hessian H = 2 X Xᵀ + λI of the squared error and the Cholesky factor U of its inverse
(H⁻¹ = Uᵀ U), an entry w in column j costs (w / U_jj)², and removing it is made up for by

    W[:, j:] −= (w / U_jj) · U[j, j:]

which is the least-squares change of the columns from j on (Hassibi & Stork's optimal brain surgeon)
with those to the left fixed. Columns are worked on in blocks; the columns right of a block get all
of its updates at once. Source: Frantar & Alistarh, 2023, arXiv:2301.00774, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fxcompress.errors import NumericsError

__all__ = ["Choose", "sparsegpt"]

Choose: TypeAlias = Callable[[Tensor, int], Tensor]
"""Scores `[groups, out, width]` of the columns from a number on -> which entries are pruned."""


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    choose: Choose,
    *,
    width: int,
    block: int,
    damping: float,
    name: str = "the weight",
) -> tuple[Tensor, Tensor]:
    """Return the sparse weight, float64, and the mask of its pruned entries.

    Args:
        weight: `[groups, out, columns]`.
        hessian: 2 X Xᵀ of the inputs of each group, `[groups, columns, columns]`.
        choose: Prunes entries of `width` columns at a time.
        width: See `choose`.
        block: Columns whose updates of the rest are applied together; a multiple of `width`.
        damping: λ as a part of the mean of the Hessian's diagonal.
        name: The weight's name, for messages.

    Raises:
        NumericsError: The Hessian cannot be inverted.
    """
    upper = _inverse_factor(hessian, damping, name)
    diagonal = upper.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    weight = weight.to(torch.float64, copy=True)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    columns = weight.shape[-1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(weight[..., start:end])
        for j in range(start, end):
            if (j - start) % width == 0:
                part = slice(j, min(j + width, end))
                scores = (weight[..., part] / diagonal[..., part]).square()
                pruned[..., part] = choose(scores, j)
            gone = torch.where(pruned[..., j], weight[..., j], 0.0) / diagonal[..., j]
            errors[..., j - start] = gone
            weight[..., j:end] -= gone.unsqueeze(-1) * upper[:, None, j, j:end]
        weight[..., end:] -= errors @ upper[:, start:end, end:]
    return weight.masked_fill_(pruned, 0.0), pruned


def _inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, float64.

    A group without inputs (an expert that no token reached) gets the identity: nothing is known
    about it, so the smallest weights are pruned and nothing makes up for them.
    """
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, 1.0)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed.any()):
        raise NumericsError(
            f"the Hessian of {name} cannot be inverted",
            reason="it is not positive definite in double precision",
            hint="raise `damping`, or calibrate on more samples",
            where=name,
        )
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
