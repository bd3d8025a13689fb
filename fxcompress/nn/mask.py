"""Mask: the one form in which unstructured sparsity stands in a graph while it is trained.

    weight = get_attr → mask → (fake_quant →) layer with its weight as an operand

The layer keeps its path and its parameter; the mask is a buffer beside it. Burning a mask in
leaves the parameter with zeros and takes the node out.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Mask"]


class Mask(nn.Module):
    """Hold some entries of a tensor at zero.

    What is masked is +0 whatever the tensor holds, and its gradient is exactly 0: an optimiser
    leaves zeros under a mask at zero, momentum and weight decay included.

    Args:
        shape: The shape of the tensor and of `mask`, a buffer of booleans: True is kept. All True
            at first.
    """

    mask: Tensor

    # The result has its operand's type: propagation over fake tensors need not run the arithmetic.
    keeps_type: ClassVar[bool] = True

    def __init__(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> None:
        super().__init__()
        ones = torch.ones(tuple(shape), dtype=torch.bool, device=device)
        self.register_buffer("mask", ones)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `mask`, as it is now."""
        return tuple(self.mask.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` where the mask is True, else 0: same shape, same dtype."""
        return torch.where(self.mask, x, 0.0)

    def extra_repr(self) -> str:
        """Return the shape."""
        return f"shape={self.shape}"
