"""What a caller may do inside the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Hooks", "Moment"]


@dataclass(frozen=True)
class Moment:
    """Where a training is: all that a hook may depend on, so that a resumed one does the same.

    Attributes:
        step: Optimiser steps done.
        epoch: The epoch, from 1.
        steps: Steps in all; an early stop may end before.
    """

    step: int
    epoch: int
    steps: int

    @property
    def progress(self) -> float:
        """How much of the training is done: 0 in the first step, 1 in the last."""
        return min(1.0, self.step / (self.steps - 1)) if self.steps > 1 else 0.0


@dataclass(frozen=True)
class Hooks:
    """What is called inside the loop. Hooks keep no state of their own: the Moment says it all.

    Attributes:
        penalty: Returns a scalar that is added to the loss (`penalty` in the history).
        on_gradients: Called after backward and before clipping; may change gradients.
        after_step: Called after the optimiser; may write weights (apply masks).
    """

    penalty: Callable[[nn.Module, Moment], Tensor] | None = None
    on_gradients: Callable[[nn.Module, Moment], None] | None = None
    after_step: Callable[[nn.Module, Moment], None] | None = None
