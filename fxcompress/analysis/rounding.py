"""How much a model amplifies rounding."""

from __future__ import annotations

import copy

import torch
from torch import fx

__all__ = ["shaken"]


def shaken(module: fx.GraphModule, seed: int = 0) -> fx.GraphModule:
    """Return a copy with every floating weight one unit in the last place up or down.

    What that does to the outputs is what rounding in another order may do. A deep model with large
    activations amplifies it, and one with quantizers rounds some values to the other side of a tie.
    """
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*moved.parameters(), *moved.buffers()]:
        if tensor.is_floating_point():
            up = torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.5
            eps = torch.finfo(tensor.dtype).eps
            tensor.data.mul_(torch.where(up, 1 + eps, 1 - eps).to(tensor.dtype))
    return moved
