"""What a training is told, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

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


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Ramp(_Part):
    """A number that moves in a straight line from the first step to the last."""

    start: float = Field(alias="from", description="Its value in the first step.")
    to: float = Field(description="Its value in the last step.")


Schedule: TypeAlias = float | Ramp
"""A number, or one that moves over the training."""


def value_at(schedule: Schedule, progress: float) -> float:
    """Return a schedule's value when `progress` (0 to 1) of the training is done."""
    if isinstance(schedule, Ramp):
        return schedule.start + (schedule.to - schedule.start) * progress
    return float(schedule)


class _Loss(_Part):
    weight: Schedule = Field(default=1.0, description="What this term is multiplied by.")


class HardLabels(_Loss):
    """Cross entropy against the targets."""

    use: Literal["hard_labels"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over all classes."
    )
    classes: Literal["first", "last"] | None = Field(
        default=None,
        description="Where the classes are: right after the batch or last; by default where the "
        "shape of the targets says.",
    )


class NextToken(_Loss):
    """Cross entropy of each next token, as the metric `perplexity` counts it."""

    use: Literal["next_token"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over the vocabulary."
    )


class SoftLabels(_Loss):
    """KL divergence to the teacher's distribution at a temperature, times its square."""

    use: Literal["soft_labels"]
    temperature: Schedule = Field(
        default=4.0, description="What the logits of both are divided by; or `{from:, to:}`."
    )
    classes: Literal["first", "last"] | None = Field(
        default=None, description="Where the classes are, as for `hard_labels`."
    )

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, value: Schedule) -> Schedule:
        if min(value_at(value, 0), value_at(value, 1)) <= 0:
            raise ValueError("a temperature is above 0")
        return value


class Mse(_Loss):
    """Mean squared error."""

    use: Literal["mse"]
    against: Literal["targets", "teacher"] = Field(
        default="targets", description="What the output is compared with."
    )


class Custom(_Loss):
    """A function of one's own: `fn(outcome, **args)` returns a scalar tensor, a mean over samples.

    `outcome` has `output`, `target`, `batch` and, with a teacher, `teacher`.
    """

    use: Literal["custom"]
    factory: str = Field(
        pattern=r"^[^:]+:[A-Za-z_]\w*$",
        description="`file.py:function` beside the spec, or `package.module:callable`.",
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further keyword arguments of the function."
    )


LossConfig: TypeAlias = Annotated[
    HardLabels | NextToken | SoftLabels | Mse | Custom, Field(discriminator="use")
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


class FitConfig(_Part):
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
        return any(
            isinstance(term, SoftLabels) or (isinstance(term, Mse) and term.against == "teacher")
            for term in self.terms
        )
