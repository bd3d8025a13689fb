"""Singular vectors of wide matrices, by way of their smaller products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["left_vectors"]


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors and the singular values, the largest first.

    Of a wide matrix they are the eigenvectors of M·Mᵀ, and the roots of its eigenvalues: that
    takes a fraction of the time, and values below 1e-8 of the largest are noise, in double.

    Args:
        matrix: `[rows, columns]`.

    Returns:
        `[rows, min(rows, columns)]`, orthonormal, and as many values.
    """
    rows, columns = matrix.shape
    if columns <= 2 * rows:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left, values
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    found = squares.flip(0).clamp_min(0).sqrt()
    return vectors.flip(1).to(matrix.dtype), found.to(matrix.dtype)
