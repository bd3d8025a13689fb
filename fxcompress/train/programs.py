"""Between Programs, which are values, and training, which writes in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.ir import Program

__all__ = ["trained_tensors", "training_copy"]


def training_copy(program: Program) -> fx.GraphModule:
    """Return a Program's module with tensors of its own, ties kept: train it as you like."""
    module = program.copy().module
    copies: dict[int, Tensor] = {}
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = _copied(tensor, copies)  # type: ignore[assignment]
        if isinstance(each, nn.RNNBase):
            # Recurrent modules keep a second list of their weights.
            each._flat_weights = [getattr(each, name, None) for name in each._flat_weights_names]
    return module


def trained_tensors(program: Program, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a trained copy that differ from the Program's, each under one name.

    They are the copy's own tensors: nothing is copied again.
    """
    known = program.state()
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) not in seen and not _same_bits(tensor, known[name]):
            found[program.ties.get(name, name)] = tensor.detach()
        seen.add(id(tensor))
    return found


def _copied(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in copies:
        value = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = value
    return copies[id(tensor)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # -0.0 equals 0.0 and NaN does not equal itself: bits decide.
    flat = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
    return torch.equal(*flat)
