"""What a training is told, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from fxcompress.train.loss_config import (
    Custom,
    HardLabels,
    LossConfig,
    Mse,
    NextToken,
    Part,
    Ramp,
    Schedule,
    SoftLabels,
    value_at,
)

__all__ = [
    "Custom",
    "FitConfig",
    "HardLabels",
    "LossConfig",
    "Mse",
    "NextToken",
    "OptimizerConfig",
    "Ramp",
    "Schedule",
    "SchedulerConfig",
    "SoftLabels",
    "value_at",
]


class OptimizerConfig(BaseModel):
    """An optimiser of `torch.optim`; every other key is an option of its constructor."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, JsonValue]

    use: str = Field(default="AdamW", description="A class of `torch.optim`.")
    lr: float | None = Field(
        default=None, gt=0, description="Learning rate; by default the optimiser's own."
    )

    @property
    def options(self) -> dict[str, JsonValue]:
        """The arguments of its constructor."""
        return {**({} if self.lr is None else {"lr": self.lr}), **self.__pydantic_extra__}


class SchedulerConfig(BaseModel):
    """A scheduler of `torch.optim.lr_scheduler`; other keys are options of its constructor.

    The text `all` as a value stands for the number of calls in the whole training.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, JsonValue]

    use: str = Field(description="A class of `torch.optim.lr_scheduler`.")
    per: Literal["step", "epoch"] = Field(default="step", description="When it is called.")
    warmup: int = Field(
        default=0, ge=0, description="Calls over which the learning rate first rises to its value."
    )

    @property
    def options(self) -> dict[str, JsonValue]:
        """The arguments of its constructor."""
        return dict(self.__pydantic_extra__)


class FitConfig(Part):
    """How a model is trained: data, losses, optimiser, and how long."""

    epochs: int | None = Field(
        default=None, ge=1, description="Passes over the data; this or `steps`, or both."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps; with `epochs`, whichever ends first."
    )
    split: str = Field(default="train", description="The split to train on.")
    shuffle: Literal["batches", "samples", "none"] = Field(
        default="batches",
        description="Take the batches in another order each epoch, cut new batches of shuffled "
        "samples, or keep the split's order.",
    )
    losses: tuple[LossConfig, ...] = Field(
        default=(),
        strict=False,
        description="Terms that are added up; by default `hard_labels` alone.",
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="An optimiser of `torch.optim` and its options."
    )
    scheduler: SchedulerConfig | None = Field(
        default=None, description="A scheduler of `torch.optim.lr_scheduler` and its options."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Scale the gradient down to this norm where it is longer."
    )
    batch_norm: Literal["train", "frozen"] = Field(
        default="train",
        description="Let batch norms follow the statistics of the batches, or keep theirs.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many epochs without a better metric (or loss, without one).",
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="Which weights to end with: the last, or the best epoch's."
    )
    snapshot: int | None = Field(
        default=None,
        ge=1,
        description="Steps between the states that a killed run resumes from; by default one is "
        "kept after each epoch.",
    )

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("say how long to train: `epochs`, `steps` or both")
        return self

    @property
    def terms(self) -> tuple[LossConfig, ...]:
        """The losses, the default filled in."""
        return self.losses or (HardLabels(use="hard_labels"),)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with a teacher; a function of one's own may, or may not."""
        return any(term.compares for term in self.terms)
