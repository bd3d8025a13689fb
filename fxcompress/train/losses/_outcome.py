"""What a loss reads, and what one term of a training is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from fxcompress.train.loss_config import value_at

__all__ = ["LossFunction", "Outcome", "Term"]


@dataclass(frozen=True)
class Outcome:
    """What the losses of one step read.

    Attributes:
        output: What the model returned: a tensor, or a tuple or mapping that holds one.
        teacher: What the teacher returned; None without one.
        batch: The inputs.
        target: The labels; None where the split has none.
    """

    output: Any
    teacher: Any
    batch: Any
    target: Any


LossFunction: TypeAlias = Callable[[Any, Outcome, float], Tensor]
"""(options, outcome, progress from 0 to 1) -> the mean over the samples that count."""


@dataclass(frozen=True)
class Term:
    """One loss of a training: its name in the history, its options and its function."""

    name: str
    options: Any
    function: LossFunction

    def loss(self, outcome: Outcome, progress: float) -> Tensor:
        """Return the loss, without its weight."""
        return self.function(self.options, outcome, progress)

    def weight(self, progress: float) -> float:
        """Return what the loss is multiplied by."""
        return value_at(self.options.weight, progress)
