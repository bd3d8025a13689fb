"""The tensors of an upcycled layer: copies of slices, noise, and the router's first weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from fxcompress.nn import Experts
from passes.moe._dense import Matrices

if TYPE_CHECKING:
    from passes.moe._upcycle.find import FeedForward
    from passes.moe.upcycle import Recipe

__all__ = ["experts_of", "matrices_of", "router_of", "shared_of"]

_INNER: Final = ("gate", "up")


def matrices_of(layer: FeedForward, state: Mapping[str, Tensor]) -> Matrices:
    """Return the matrices of a layer of a Program with this state."""
    gate = layer.gate
    return Matrices(
        up=layer.up.matrix(state),
        down=layer.last.matrix(state),
        gate=None if gate is None else gate.matrix(state),
        gate_bias=None if gate is None else gate.offset(state),
        up_bias=layer.up.offset(state),
        down_bias=layer.last.offset(state),
    )


def shared_of(layer: Matrices, recipe: Recipe) -> Matrices:
    """Return the slices that every token takes, with the whole bias of the layer."""
    part = layer.part(0, recipe.shared * layer.hidden // recipe.slices)
    return replace(part, down_bias=layer.down_bias)


def experts_of(
    layer: Matrices, recipe: Recipe, seed: int, what: str, *, activation: str, dropout: float = 0.0
) -> Experts:
    """Return the experts: copy after copy, each of all routed slices in order.

    Args:
        layer: What they are copies of.
        recipe: How many, and how much they differ.
        seed: Of the run.
        what: Names the layer; other layers draw other numbers.
        activation: Of the hidden values.
        dropout: How likely each of them is dropped while training.
    """
    size = layer.hidden // recipe.slices
    parts = [layer.part(i * size, (i + 1) * size) for i in range(recipe.shared, recipe.slices)]
    # Weights sum to 1 over all slices together, or to top_k / experts with a router of zeros.
    mean = recipe.experts / recipe.top_k if recipe.weights == "softmax" else 1.0
    made: dict[str, Tensor | None] = {}
    for name in ("gate", "up", "down", "gate_bias", "up_bias"):
        slices = [getattr(part, name) for part in parts]
        scale = recipe.routed * mean if name == "down" else 1.0
        made[name] = None if slices[0] is None else _stacked(slices, recipe.copies, scale)
    bias = None if recipe.shared or layer.down_bias is None else layer.down_bias
    made["down_bias"] = None if bias is None else _stacked([bias], recipe.experts, mean)
    if recipe.diverse and not layer.up.is_meta:
        _vary(made, recipe, _generator(seed, f"experts of {what}"))
    up, down = made.pop("up"), made.pop("down")
    assert up is not None, "a layer has values"
    assert down is not None, "and a last matrix"
    others: dict[str, Any] = {**made}
    return Experts.of(up=up, down=down, activation=activation, dropout=dropout, **others)


def router_of(layer: Matrices, recipe: Recipe, seed: int, what: str) -> Tensor:
    """Return the router's weights `[experts, width]`: all slices of a copy have the same row."""
    width = layer.up.shape[1]
    # Rounding to 16 bits would make ties, and a token would take parts of several copies.
    dtype = torch.promote_types(layer.up.dtype, torch.float32)
    device = layer.up.device
    if recipe.router == "zero" or layer.up.is_meta:
        return torch.zeros(recipe.experts, width, dtype=dtype, device=device)
    generator = _generator(seed, f"router of {what}")
    rows = generator.standard_normal((recipe.copies, width)) * recipe.router_std
    drawn = torch.from_numpy(rows).to(dtype=dtype, device=device)
    return drawn.repeat_interleave(recipe.routed, 0)


def _stacked(slices: list[Tensor], copies: int, scale: float) -> Tensor:
    """Return `[copies · slices, …]`."""
    one = torch.stack(slices)
    one = one if scale == 1 else one * scale
    return one.repeat(copies, *[1] * (one.dim() - 1))


def _vary(
    made: Mapping[str, Tensor | None], recipe: Recipe, generator: np.random.Generator
) -> None:
    """Let each expert differ from what it is a copy of."""
    tensors = {name: each for name in (*_INNER, "down") if (each := made[name]) is not None}
    for expert in range(recipe.experts):
        hidden = tensors["up"].shape[1]
        fresh = torch.from_numpy(
            generator.permutation(hidden)[: round(recipe.reinitialize * hidden)]
        )
        for name, tensor in tensors.items():
            one = tensor[expert]
            spread, middle = float(one.double().std()), float(one.double().mean())
            if recipe.noise:
                one += _normal(one, generator) * (recipe.noise * spread)
            if len(fresh):
                drawn = _normal(one, generator) * spread + middle
                if name == "down":
                    one[:, fresh] = drawn[:, fresh]
                else:
                    one[fresh] = drawn[fresh]


def _normal(like: Tensor, generator: np.random.Generator) -> Tensor:
    drawn = generator.standard_normal(tuple(like.shape), dtype=np.float32)
    return torch.from_numpy(drawn).to(dtype=like.dtype, device=like.device)


def _generator(seed: int, what: str) -> np.random.Generator:
    """Return a generator of its own for one use: NumPy's draws the same on every machine."""
    return np.random.default_rng([seed, zlib.crc32(what.encode())])
