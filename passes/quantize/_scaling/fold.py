"""Factors of groups as changes of parameters, and the changes themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from passes.quantize._scaling.entries import Scaled, Shifted
from passes.quantize._scaling.groups import Group
from passes.quantize._scaling.layers import along

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Folds", "fold", "scaled", "shift"]


class Folds:
    """Collects what groups do to parameters.

    Args:
        state: The parameters as they are.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.entries: dict[str, Scaled] = {}
        self.factors: dict[str, Tensor] = {}

    def add(self, group: Group, factors: Tensor) -> None:
        """Divide a group's producer by factors above 0, `[channels]`, and multiply its readers."""
        factors = factors.double()
        for part in group.parts:
            self._put(Scaled(tensor=part.tensor, dim=part.dim, divided=True), factors)
        for reader in group.readers:
            layer = reader.layer
            groups = 1 if layer.transposed else layer.groups
            entry = Scaled(tensor=layer.weight, dim=layer.columns, divided=False, groups=groups)
            self._put(entry, reader.factors(factors))

    def multiply(self, tensor: str, dim: int, factors: Tensor) -> None:
        """Multiply a parameter along a dimension."""
        self._put(Scaled(tensor=tensor, dim=dim, divided=False), factors.double())

    def value(self, tensor: str) -> Tensor:
        """Return a parameter with all that was added so far, in float64."""
        value = self.state[tensor].detach().double()
        for key, entry in self.entries.items():
            if entry.tensor == tensor:
                value = scaled(value, entry, self.factors[key])
        return value

    def decided(self) -> tuple[tuple[Scaled, ...], dict[str, Tensor]]:
        """Return the entries, and their factors in float32."""
        arrays = {key: factors.float() for key, factors in self.factors.items()}
        return tuple(self.entries.values()), arrays

    def _put(self, entry: Scaled, factors: Tensor) -> None:
        known = self.factors.get(entry.key)
        self.entries[entry.key] = entry
        self.factors[entry.key] = factors if known is None else known * factors


def scaled(value: Tensor, entry: Scaled, factors: Tensor) -> Tensor:
    """Return a value multiplied or divided as an entry says."""
    by = along(factors, value, entry.dim, entry.groups)
    return value / by if entry.divided else value * by


def fold(rewriter: GraphRewriter, entries: Iterable[Scaled], arrays: Mapping[str, Any]) -> None:
    """Change parameters as entries say; computed in float64 and rounded once for each entry."""
    for entry in entries:
        if entry.key not in arrays:
            continue
        value = rewriter.get_tensor(entry.tensor)
        factors = torch.as_tensor(arrays[entry.key]).to(value.device, torch.float64)
        made = scaled(value.detach().double(), entry, factors).to(value.dtype)
        rewriter.set_tensor(entry.tensor, made, tied=True)


def shift(rewriter: GraphRewriter, entries: Iterable[Shifted], arrays: Mapping[str, Any]) -> None:
    """Add to biases; a bias that is not there yet is added as a parameter."""
    for entry in entries:
        added = torch.as_tensor(arrays.get(entry.key, torch.zeros(entry.channels))).double()
        if entry.new:
            weight = rewriter.get_tensor(f"{entry.tensor.removesuffix('bias')}weight")
            rewriter.add_tensor(entry.tensor, added.to(weight.dtype), trainable=True)
        elif bool(added.any()):
            value = rewriter.get_tensor(entry.tensor)
            made = value.detach().double() + added.to(value.device)
            rewriter.set_tensor(entry.tensor, made.to(value.dtype), tied=True)
