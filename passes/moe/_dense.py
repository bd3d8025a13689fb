"""A dense feed-forward layer as ordinary nodes: linear layers and an activation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Matrices", "insert_dense", "linear_of"]

_PLAIN: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "mish": (F.mish, {}),
    "relu": (F.relu, {}),
    "sigmoid": (torch.sigmoid, {}),
    "silu": (F.silu, {}),
    "tanh": (torch.tanh, {}),
}
_ALPHA: Final = 1.702
_LIMIT: Final = 7.0


@dataclass(frozen=True)
class Matrices:
    """A dense feed-forward layer: `gate` and `up` `[hidden, width]`, `down` `[width, hidden]`."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Features between the matrices."""
        return int(self.up.shape[0])

    def part(self, first: int, last: int) -> Matrices:
        """Return hidden units `first` to `last`, the latter left out, without the last bias."""
        inner = {
            name: None if (tensor := getattr(self, name)) is None else tensor[first:last]
            for name in ("gate", "gate_bias", "up_bias")
        }
        return Matrices(up=self.up[first:last], down=self.down[:, first:last], **inner)


@dataclass
class _Writer:
    """Adds nodes one after the other, before a node and in a scope."""

    rewriter: GraphRewriter
    before: fx.Node
    scope: tuple[tuple[str, str], ...]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.call_function(
            target, args, kwargs, before=self.before, scope=self.scope
        )

    def layer(self, path: str, module: nn.Module | None, x: fx.Node) -> fx.Node:
        return self.rewriter.call_module(path, module, (x,), before=self.before, scope=self.scope)


def insert_dense(
    rewriter: GraphRewriter,
    path: str,
    layer: Matrices | None,
    x: fx.Node,
    activation: str,
    *,
    gated: bool,
    limit: float | None = None,
    dropout: float = 0.0,
    trainable: bool = True,
    before: fx.Node,
    scope: tuple[tuple[str, str], ...],
) -> fx.Node:
    """Add a feed-forward layer under `path` and return what it makes.

    Args:
        rewriter: Where it goes.
        path: `gate`, `up` and `down` are below.
        layer: Its values; None where the modules are there already.
        x: What it reads, `[..., width]`.
        activation: A key of `fxcompress.nn.experts.ACTIVATIONS` or `GATES`.
        gated: Whether it has a gate.
        limit: Where the gate is cut off above and `up` both ways; None for nowhere.
        dropout: How likely each value before `down` is dropped while training.
        trainable: Whether its parameters are trained.
        before: The node that comes next in the graph.
        scope: Of the nodes.
    """
    write = _Writer(rewriter, before, scope)
    modules: dict[str, nn.Module | None] = dict.fromkeys(("gate", "up", "down", "dropout"))
    if layer is not None:
        modules["dropout"] = nn.Dropout(dropout)
        modules["up"] = linear_of(layer.up, layer.up_bias, trainable=trainable)
        modules["down"] = linear_of(layer.down, layer.down_bias, trainable=trainable)
        if layer.gate is not None:
            modules["gate"] = linear_of(layer.gate, layer.gate_bias, trainable=trainable)
    gate = write.layer(f"{path}.gate", modules["gate"], x) if gated else None
    up = write.layer(f"{path}.up", modules["up"], x)
    if gate is not None and limit is not None:
        gate = write.call(torch.clamp, gate, max=limit)
        up = write.call(torch.clamp, up, -limit, limit)
    if gate is None:
        hidden = _activated(write, activation, up)
    elif activation == "clamped_swiglu":
        hidden = _clamped_swiglu(write, gate, up)
    else:
        hidden = write.call(operator.mul, _activated(write, activation, gate), up)
    if dropout:
        hidden = write.layer(f"{path}.dropout", modules["dropout"], hidden)
    return write.layer(f"{path}.down", modules["down"], hidden)


def linear_of(weight: Tensor, bias: Tensor | None, *, trainable: bool = True) -> nn.Linear:
    """Return a linear layer with these tensors, copied."""
    out, width = weight.shape
    made = nn.Linear(width, out, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trainable)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=trainable)
    return made


def _activated(write: _Writer, name: str, x: fx.Node) -> fx.Node:
    if name == "quick_gelu":
        return write.call(operator.mul, x, _sigmoid(write, x))
    if name == "squared_relu":
        return write.call(torch.square, write.call(F.relu, x))
    function, told = _PLAIN[name]
    return write.call(function, x, **told)


def _sigmoid(write: _Writer, x: fx.Node) -> fx.Node:
    return write.call(torch.sigmoid, write.call(operator.mul, x, _ALPHA))


def _clamped_swiglu(write: _Writer, gate: fx.Node, up: fx.Node) -> fx.Node:
    """Return (clamp(up) + 1) · g · sigmoid(1.702 · g) with g = min(gate, 7)."""
    gate = write.call(torch.clamp, gate, max=_LIMIT)
    up = write.call(torch.clamp, up, -_LIMIT, _LIMIT)
    swish = write.call(operator.mul, gate, _sigmoid(write, gate))
    return write.call(operator.mul, write.call(operator.add, up, 1), swish)
