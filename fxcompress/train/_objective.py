"""What a training makes smaller: the losses of one batch, and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.train.hooks import Hooks, Moment
from fxcompress.train.losses import Outcome, Term
from fxcompress.train.metrics import call

__all__ = ["PENALTY", "Objective", "Part", "total_of"]


PENALTY = "penalty"


@dataclass(frozen=True)
class Part:
    """One term of the loss of a batch.

    Attributes:
        weight: What it is multiplied by.
        mean: The mean over what counts in this batch.
        count: How much counts: samples, tokens or elements; None for what is no mean over the
            batch (a penalty on weights).
    """

    weight: float
    mean: Tensor
    count: float | Tensor | None


def total_of(parts: Mapping[str, Part]) -> Tensor:
    """Return the weighted sum of the terms of one batch.

    Raises:
        UsageError: It does not depend on what is trained.
    """
    total = torch.stack([part.weight * part.mean.reshape(()) for part in parts.values()]).sum()
    if not total.requires_grad:
        raise UsageError(
            "the loss does not depend on what is trained",
            reason="no trained parameter is read on the way to the output",
            hint="train other parameters",
        )
    return total


class Objective:
    """The losses of a training.

    Args:
        module: What is trained.
        teacher: What losses compare with; run without gradients.
        terms: What is added up.
        hooks: Whose penalty is added too.
    """

    def __init__(
        self, module: nn.Module, teacher: nn.Module | None, terms: Iterable[Term], hooks: Hooks
    ) -> None:
        self.module, self.teacher = module, teacher
        self.terms, self.hooks = tuple(terms), hooks

    def __call__(self, batch: Any, target: Any, moment: Moment) -> dict[str, Tensor]:
        """Return each term by name, and under the empty name their weighted sum.

        Raises:
            DataError: The batch does not fit a loss.
            UsageError: The sum does not depend on what is trained.
        """
        parts = self.parts(batch, target, moment)
        return {**{name: part.mean for name, part in parts.items()}, "": total_of(parts)}

    def parts(self, batch: Any, target: Any, moment: Moment) -> dict[str, Part]:
        """Return each term by name, with what its mean is over; the penalty counts once a step.

        Raises:
            DataError: The batch does not fit a loss.
        """
        known = None
        if self.teacher is not None:
            with torch.no_grad():
                known = call(self.teacher, batch)
        outcome = Outcome(call(self.module, batch), known, batch, target)
        found: dict[str, Part] = {}
        for term in self.terms:
            total, count = term.total(outcome, moment.progress)
            least = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
            found[term.name] = Part(term.weight(moment.progress), total / least, count)
        if self.hooks.penalty is not None:
            found[PENALTY] = Part(1.0, self.hooks.penalty(self.module, moment), None)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained besides the module's own parameters, by name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed training needs besides the module's, by name."""
        return dict(self.parameters())
