"""What a loss reads, and what one term of a training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from fxcompress.train.loss_config import value_at

__all__ = ["LossFunction", "Outcome", "Term", "Total"]


@dataclass(frozen=True)
class Outcome:
    """What the losses of one step read.

    Attributes:
        output: What the model returned: a tensor, or a tuple or mapping that holds one.
        teacher: What the teacher returned; None without one.
        batch: The inputs.
        target: The labels: a tensor, or a mapping with `labels` and whatever else a loss names;
            None where the split has none.
        taps: The model's tapped tensors by name, after projectors: shaped as the teacher's.
        teacher_taps: The teacher's, by the same names.
        raw_taps: The model's as they are, for losses that compare relations.
    """

    output: Any
    teacher: Any
    batch: Any
    target: Any
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_taps: Mapping[str, Tensor] = field(default_factory=dict)
    raw_taps: Mapping[str, Tensor] = field(default_factory=dict)


Total: TypeAlias = tuple[Tensor, Tensor | float]
"""A sum over what counts (samples, rows, tokens), and how much counted; the loss is their ratio.

Sums and counts of micro-batches add up to those of the step.
"""

LossFunction: TypeAlias = Callable[[Any, Outcome, float], Total]
"""(options, outcome, progress from 0 to 1) -> the sum over what counts, and its count."""


@dataclass(frozen=True)
class Term:
    """One loss of a training.

    Attributes:
        name: Its name in the history.
        options: What it is told: a member of `LossConfig`.
        function: Computes it.
        module: What it trains along with the model; None where it has no parameters.
    """

    name: str
    options: Any
    function: LossFunction
    module: nn.Module | None = None

    def total(self, outcome: Outcome, progress: float) -> Total:
        """Return the sum over what counts and the count, without the weight."""
        return self.function(self.options, outcome, progress)

    def loss(self, outcome: Outcome, progress: float) -> Tensor:
        """Return the loss, without its weight: 0 where nothing counts."""
        total, count = self.total(outcome, progress)
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    def weight(self, progress: float) -> float:
        """Return what the loss is multiplied by."""
        return value_at(self.options.weight, progress)
