"""What a training reports of each epoch. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

__all__ = ["Epoch"]


class Epoch(BaseModel):
    """One epoch; the same for the same seed, data and weights.

    A Decision with a field `history: tuple[Epoch, ...]` gets a table and curves in the report.

    Attributes:
        epoch: Its number, from 1.
        step: Optimiser steps done after it, from the beginning.
        samples: Samples that it trained on.
        loss: The weighted sum of all terms, mean over its samples.
        losses: Mean of each term by name, without its weight.
        lr: Learning rate of its last step.
        metric: The metric after it, where there is one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    epoch: int
    step: int
    samples: int
    loss: float
    losses: Mapping[str, float]
    lr: float
    metric: float | None = None
