"""What a training makes smaller: the losses of one batch, and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.train.hooks import Hooks, Moment
from fxcompress.train.losses import Outcome, Term
from fxcompress.train.metrics import call

__all__ = ["Objective"]


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
        known = None
        if self.teacher is not None:
            with torch.no_grad():
                known = call(self.teacher, batch)
        outcome = Outcome(call(self.module, batch), known, batch, target)
        found = {term.name: term.loss(outcome, moment.progress) for term in self.terms}
        weighted = [term.weight(moment.progress) * found[term.name] for term in self.terms]
        if self.hooks.penalty is not None:
            found["penalty"] = self.hooks.penalty(self.module, moment)
            weighted.append(found["penalty"])
        total = torch.stack([each.reshape(()) for each in weighted]).sum()
        if not total.requires_grad:
            raise UsageError(
                "the loss does not depend on what is trained",
                reason="no trained parameter is read on the way to the output",
                hint="train other parameters",
            )
        return {**found, "": total}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained besides the module's own parameters, by name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed training needs besides the module's, by name."""
        return dict(self.parameters())
