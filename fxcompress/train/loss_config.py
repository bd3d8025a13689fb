"""What losses are told, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

__all__ = [
    "Custom",
    "HardLabels",
    "Loss",
    "LossConfig",
    "Mse",
    "NextToken",
    "Part",
    "Ramp",
    "Schedule",
    "SoftLabels",
    "value_at",
]


class Part(BaseModel):
    """A part of a spec: strict, frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Ramp(Part):
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


class Loss(Part):
    """What every loss is told, and what it says of itself.

    Attributes:
        reads: What it may read of an outcome: `output`, `target`, `teacher` (its output), `taps`.
        projects: Whether taps of both sides must have one shape, so that a projector is needed
            where widths differ.
        relates: Whether it compares samples of a batch with one another: then micro-batches are
            compared each in itself.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"output"})
    projects: ClassVar[bool] = False
    relates: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return self.reads

    @property
    def compares(self) -> bool:
        """Whether it needs a teacher."""
        return bool(self.needs & {"teacher", "taps"})

    weight: Schedule = Field(default=1.0, description="What this term is multiplied by.")


class HardLabels(Loss):
    """Cross entropy against the targets."""

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target"})
    use: Literal["hard_labels"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over all classes."
    )
    classes: Literal["first", "last"] | None = Field(
        default=None,
        description="Where the classes are: right after the batch or last; by default where the "
        "shape of the targets says.",
    )


class NextToken(Loss):
    """Cross entropy of each next token, as the metric `perplexity` counts it."""

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target"})
    use: Literal["next_token"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over the vocabulary."
    )


class SoftLabels(Loss):
    """KL divergence to the teacher's distribution at a temperature, times its square."""

    reads: ClassVar[frozenset[str]] = frozenset({"output", "teacher"})
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


class Mse(Loss):
    """Mean squared error."""

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target", "teacher"})
    use: Literal["mse"]
    against: Literal["targets", "teacher"] = Field(
        default="targets", description="What the output is compared with."
    )

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return frozenset({"output", self.against.removesuffix("s")})


class Custom(Loss):
    """A function of one's own: `fn(outcome, **args)` returns a scalar tensor, a mean over samples.

    `outcome` has `output`, `target`, `batch` and, with a teacher, `teacher`.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target", "teacher", "taps"})
    use: Literal["custom"]
    factory: str = Field(
        pattern=r"^[^:]+:[A-Za-z_]\w*$",
        description="`file.py:function` beside the spec, or `package.module:callable`.",
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further keyword arguments of the function."
    )

    @property
    def needs(self) -> frozenset[str]:
        """What it surely reads: a function may do without a teacher."""
        return frozenset({"output"})


LossConfig: TypeAlias = Annotated[
    HardLabels | NextToken | SoftLabels | Mse | Custom, Field(discriminator="use")
]
