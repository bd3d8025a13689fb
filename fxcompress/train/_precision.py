"""In which dtype a training computes, and the scale that keeps small fp16 gradients from vanishing.

Weights, gradients and the optimiser stay float32: only the forward pass computes in the other
dtype, op by op as `torch.autocast` chooses (Micikevicius et al., 2018, arXiv:1710.03740).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxcompress.errors import NumericsError, UsageError
from fxcompress.train._sharding import kinds

__all__ = ["Precision"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST = 2.0**-14
"""A loss scale below this says that the gradients are infinite whatever they are scaled by."""


class _Scaler(torch.amp.GradScaler):
    """Scales gradients of which some are spread over processes and others are whole."""

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Divide the gradients; return for each device whether one of them is infinite or NaN.

        Spread ones are looked at in all processes.
        """
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        found: dict[torch.device, Tensor] = {}
        for part in kinds(parameters, lambda parameter: parameter):
            holder: Any = SimpleNamespace(param_groups=[{"params": part}])
            # What is found is added to `found_inf` itself.
            found.update(super()._unscale_grads_(holder, inv_scale, found_inf, allow_fp16))
        return found


class Precision:
    """The precision of a training.

    Args:
        name: `float32`, `bf16` or `fp16`.
        device: Where it computes.

    Raises:
        UsageError: The device cannot compute so.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = _DTYPES.get(name)
        self.device = device.type
        if self.dtype is not None and not _can(self.device, self.dtype):
            raise UsageError(
                f"{self.device} cannot train in {name}",
                reason=f"torch.autocast has no {name} for this device",
                hint="write `precision: float32`, or train on another device",
            )
        self.scaler = _Scaler(self.device) if name == "fp16" else None

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which outputs and losses are computed."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled until `unscale`."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Give all gradients their own size."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Move the weights unless fp16 gradients overflowed; return whether it did.

        Raises:
            NumericsError: Gradients overflow at every scale.
        """
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()
        if scale < _SMALLEST:
            raise NumericsError(
                "the gradients are infinite or NaN at every loss scale",
                reason=f"fp16 overflowed until the scale was {scale:.3g}",
                hint="write `precision: bf16` or `float32`",
            )
        return bool(scale >= before)

    def state(self) -> dict[str, Any]:
        """Return the scale and what decides when it grows."""
        return {} if self.scaler is None else dict(self.scaler.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state)


def _can(device: str, dtype: torch.dtype) -> bool:
    """Whether autocast computes in a dtype here; torch tells by a warning or an error."""
    if device == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported())
    if device in ("cpu", "cuda"):
        return True
    return dtype == torch.float16 and device == "mps"
