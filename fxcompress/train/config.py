"""What a training is told, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from fxcompress.train.augment_config import Augment
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
    "Augment",
    "Average",
    "Custom",
    "FitConfig",
    "HardLabels",
    "LossConfig",
    "Mse",
    "NextToken",
    "OptimizerConfig",
    "ParameterGroup",
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


class ParameterGroup(BaseModel):
    """Parameters with options of their own; every other key is an option of the optimiser."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, JsonValue]

    targets: tuple[str, ...] = Field(
        min_length=1,
        strict=False,
        description="Globs over names of parameters; the first group that fits has it.",
    )
    freeze: bool = Field(default=False, description="Do not train them.")
    lr: float | None = Field(default=None, gt=0, description="Their learning rate.")
    scale: float | None = Field(
        default=None, gt=0, description="Or what the optimiser's learning rate is multiplied by."
    )

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        told = [name for name in ("lr", "scale") if getattr(self, name) is not None]
        if len(told) > 1:
            raise ValueError("say `lr` or `scale`, not both")
        if self.freeze and (told or self.__pydantic_extra__):
            raise ValueError("what is frozen takes no other options")
        return self

    @property
    def options(self) -> dict[str, JsonValue]:
        """The optimiser's options for them, `scale` left out."""
        return {**({} if self.lr is None else {"lr": self.lr}), **self.__pydantic_extra__}


class Average(Part):
    """The exponential moving average of the weights, which is measured and kept instead of them."""

    decay: float = Field(
        default=0.999, gt=0, lt=1, description="Share of the average in the next one."
    )
    warmup: bool = Field(
        default=True,
        description="Begin with a smaller share, t / (t + 9) in step t, until `decay` is smaller.",
    )


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
    augment: Augment | None = Field(
        default=None, description="How the images of each batch are varied."
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
    groups: tuple[ParameterGroup, ...] = Field(
        default=(),
        strict=False,
        description="Parameters with learning rates or options of their own, or frozen.",
    )
    accumulate: int = Field(
        default=1, ge=1, description="Batches whose gradients make one step, as one joined batch."
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32",
        description="What outputs are computed in; weights stay float32. fp16 scales the loss.",
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Scale the gradient down to this norm where it is longer."
    )
    clip_value: float | None = Field(
        default=None, gt=0, description="Cut each number of the gradient to ± this."
    )
    ema: Average | None = Field(
        default=None, description="Measure and keep a moving average of the weights."
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
    min_delta: float = Field(
        default=0.0, ge=0, description="By how much a better one is better, for `patience`."
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

    tensorboard: bool = Field(
        default=False, description="Write curves for TensorBoard into the run folder."
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

    @property
    def reads_taps(self) -> bool:
        """Whether a loss surely reads taps; a function of one's own may, where there are any."""
        return any("taps" in term.needs for term in self.terms)
