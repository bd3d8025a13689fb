"""What every pass that trains is told, and what it decides. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options
from fxcompress.rewrite.edits import Declined
from fxcompress.train.config import Custom, FitConfig
from fxcompress.train.history import Epoch

__all__ = ["TrainDecision", "TrainOptions"]


class TrainOptions(Options, FitConfig):
    """How a pass trains: losses, optimiser, length, and what the losses compare with."""

    teacher: Literal["original"] | None = Field(
        default=None, description="What losses compare with: the model before the first pass."
    )

    @model_validator(mode="after")
    def _teacher_is_read(self) -> Self:
        if self.needs_teacher and self.teacher is None:
            raise ValueError("a loss compares with a teacher: say `teacher: original`")
        own = any(isinstance(term, Custom) for term in self.terms)
        if self.teacher is not None and not (self.needs_teacher or own):
            raise ValueError(
                "no loss compares with the teacher: add `use: soft_labels` to `losses`"
            )
        return self


class TrainDecision(Decision):
    """What was trained and how it went; the trained tensors are in `arrays`, by name.

    Attributes:
        parameters: The names of the parameters that are trained.
        history: One entry per epoch.
        kept: Index of the epoch whose weights these are.
        stopped_early: Whether `patience` ended the training.
        declined: What the graph does not train as the original would, as capture found.
    """

    parameters: tuple[str, ...] = ()
    history: tuple[Epoch, ...] = ()
    kept: int | None = None
    stopped_early: bool = False
    declined: tuple[Declined, ...] = ()
