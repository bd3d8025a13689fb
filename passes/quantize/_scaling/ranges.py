"""Ranges of weights per channel while they are equalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.ops import module_of, op_name
from passes.quantize._scaling.groups import Group, Reader
from passes.quantize._scaling.layers import Layer, along

__all__ = ["Pair", "Ranges"]

# The largest factor: beyond it a channel is dead on one of the two sides.
_MOST = 1e6


@dataclass(frozen=True)
class Pair:
    """A group whose producer's channels are rows of weights.

    Attributes:
        group: The group.
        layer: The layer that makes its channels.
        norm: The batch norm behind that layer, which takes the division in its place.
    """

    group: Group
    layer: Layer
    norm: fx.Node | None


def _norm_scale(norm: Any) -> Tensor:
    """Return γ / √(σ² + ε) of a batch norm's module, `[channels]`, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.detach().double()


class Ranges:
    """The absolute weights of pairs, batch norms folded in, scaled as their factors are found.

    Args:
        pairs: Whose layers' weights to hold.
        state: The parameters.

    Raises:
        NumericsError: A weight holds a NaN or an infinity.
    """

    def __init__(self, pairs: tuple[Pair, ...], state: Mapping[str, Tensor]) -> None:
        layers = [each.layer for each in pairs]
        layers += [reader.layer for each in pairs for reader in each.group.readers]
        self.weights: dict[str, Tensor] = {}
        for layer in layers:
            value = state[layer.weight].detach().double()
            if not bool(value.isfinite().all()):
                raise NumericsError(
                    f"a NaN or an infinity in {layer.weight}",
                    hint="check the weights that the model was given",
                    where=layer.weight,
                )
            norm = _norm_behind(layer.node)
            if norm is not None:
                value = value * along(_norm_scale(module_of(norm)), value, layer.rows)
            self.weights[layer.weight] = value.abs()

    def outputs(self, pair: Pair) -> Tensor:
        """Return r₁, `[channels]`."""
        return pair.layer.output_range(self.weights[pair.layer.weight])

    def inputs(self, pair: Pair) -> Tensor:
        """Return r₂, `[channels]`; 0 for what no layer reads."""
        channels = len(pair.group.free)
        found = torch.zeros(channels, dtype=torch.float64)
        for reader in pair.group.readers:
            largest = reader.layer.input_range(self.weights[reader.layer.weight])
            found = torch.maximum(found, reader.largest(largest, channels))
        return found

    def factors(self, pair: Pair) -> Tensor:
        """Return s = √(r₁ r₂) / r₂, `[channels]`; 1 for dead and fixed channels."""
        r1, r2 = self.outputs(pair), self.inputs(pair)
        alive = pair.group.free & (r1 > 0) & (r2 > 0)
        found = (r1 / r2.clamp_min(1e-300)).sqrt().clamp(1 / _MOST, _MOST)
        return torch.where(alive, found, 1.0)

    def apply(self, pair: Pair, factors: Tensor) -> None:
        """Divide the rows of a pair, and multiply the columns of its readers."""
        weight = self.weights[pair.layer.weight]
        by = along(factors, weight, pair.layer.rows)
        self.weights[pair.layer.weight] = weight / by
        for reader in pair.group.readers:
            name = reader.layer.weight
            self.weights[name] = self.weights[name] * _columns(reader, factors, self.weights[name])

    def precision(self, pair: Pair) -> float:
        """Return the mean of r₁ᵢ/R₁ · r₂ᵢ/R₂ over channels that are free and alive."""
        r1, r2 = self.outputs(pair), self.inputs(pair)
        alive = pair.group.free & (r1 > 0) & (r2 > 0)
        if not bool(alive.any()):
            return 0.0
        return float((r1[alive] / r1.max() * r2[alive] / r2.max()).mean())


def _norm_behind(node: fx.Node) -> fx.Node | None:
    """Return the batch norm that alone reads a layer, and that folding will make a part of it."""
    user = next(iter(node.users), None)
    alone = user is not None and len(node.users) == 1 and op_name(user) == "batch_norm"
    if not alone or user is None or user.op != "call_module":
        return None
    return user if getattr(module_of(user), "running_var", None) is not None else None


def _columns(reader: Reader, factors: Tensor, weight: Tensor) -> Tensor:
    return reader.layer.over_inputs(reader.factors(factors), weight)
