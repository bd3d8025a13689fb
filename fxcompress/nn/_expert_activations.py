"""Activations between an expert's matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import UsageError

__all__ = ["ACTIVATIONS", "GATES", "check_activation"]

_ALPHA: Final = 1.702
_LIMIT: Final = 7.0


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_ALPHA * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=_LIMIT)
    return (up.clamp(-_LIMIT, _LIMIT) + 1) * (gate * torch.sigmoid(_ALPHA * gate))


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "squared_relu": _squared_relu,
    "tanh": torch.tanh,
}
"""Functions of one tensor. With a gate, `up` is multiplied by the function of the gate."""

GATES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"clamped_swiglu": _clamped_swiglu}
"""Functions of gate and up that are no such product."""


def check_activation(activation: str, gated: bool) -> None:
    """Check that an activation is known, and has the gate that it needs.

    Raises:
        UsageError: It is not, or has not.
    """
    if activation in ACTIVATIONS or (gated and activation in GATES):
        return
    if activation in GATES:
        raise UsageError(
            f"the activation {activation!r} needs a gate", reason="it is a function of gate and up"
        )
    raise UsageError(
        f"experts have no activation {activation!r}",
        reason=f"known are {', '.join([*ACTIVATIONS, *GATES])}",
    )
