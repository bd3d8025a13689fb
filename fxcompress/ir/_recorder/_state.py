"""The model's tensors by name, and their fake stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

__all__ = ["ModelState"]


@dataclass
class ModelState:
    """Parameters, buffers and plain tensor attributes of a model.

    Attributes:
        names: `id(tensor)` -> canonical qualified name.
        tensors: Canonical qualified name -> real tensor.
        ties: Other names of a tensor -> its canonical name.
        plain: Names of tensors that are attributes, neither parameter nor buffer.
        transient: Names of the buffers that the state dict leaves out.
    """

    names: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    transient: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Read the state of a model; nothing is copied."""
        state = cls()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            state._add(name, parameter)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            state._add(name, buffer)
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            state.transient.update(prefix + n for n in module._non_persistent_buffers_set)
            for name, tensor in _plain_tensors(module):
                if id(tensor) not in state.names:
                    state._add(prefix + name, tensor)
                    state.plain.add(prefix + name)
        return state

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        first = self.names.setdefault(id(tensor), name)
        if first == name:
            self.tensors[name] = tensor
        elif first != name:
            self.ties[name] = first

    def fakes(self, mode: FakeTensorMode, device: torch.device) -> dict[int, Any]:
        """Return `id(real)` -> fake, which no gradient flows into.

        Tensors on the meta device are faked on `device`, where the inputs are.
        """
        stand_ins: dict[int, Any] = {}
        with mode:
            for tensor in self.tensors.values():
                stand_ins[id(tensor)] = _fake(tensor, mode, device)
        return stand_ins


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in module.__dict__.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield f"{name}_{index}", item
        elif isinstance(value, dict) and not name.startswith("_"):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield f"{name}_{key}", item


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    place = device if tensor.device.type == "meta" else tensor.device
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    return fake
