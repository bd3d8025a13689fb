"""Numbers that move over a training, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

__all__ = ["Part", "Ramp", "Schedule", "Steps", "Until", "WholeSchedule", "bounds", "value_at"]


class Part(BaseModel):
    """A part of a spec: strict, frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Ramp(Part):
    """A number that moves from the first step to the last: in a straight line, or as a cosine."""

    start: float = Field(alias="from", description="Its value in the first step.")
    to: float = Field(description="Its value in the last step.")
    curve: Literal["linear", "cosine"] = Field(
        default="linear",
        description="The way between: a straight line, or half a cosine, slow at both ends.",
    )


class Steps(Part):
    """A number that jumps: each `[progress, value]` holds from that share of the training on."""

    steps: tuple[Annotated[tuple[float, float], Field(strict=False)], ...] = Field(
        strict=False,
        min_length=1,
        description="`[progress, value]` pairs; progress goes from 0 to 1, the first is 0.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        starts = [progress for progress, _ in self.steps]
        if starts[0] != 0 or starts[-1] > 1 or sorted(set(starts)) != starts:
            raise ValueError("steps rise from progress 0 to at most 1, such as [[0, 10], [0.5, 2]]")
        return self


class Until(Part):
    """A number that holds until a share of the training is done; from then on there is none."""

    start: int = Field(alias="from", ge=1, description="Its value until then.")
    until: float = Field(gt=0, le=1, description="The share of the training, 0 to 1.")


def _form(value: object) -> str:
    """Return which form of a schedule a value is meant as, so that errors are about that one."""
    keys = value if isinstance(value, Mapping) else {}
    if isinstance(value, Steps) or "steps" in keys:
        return "steps"
    if isinstance(value, Until) or "until" in keys:
        return "until"
    return "ramp" if isinstance(value, Ramp | Mapping) else "number"


Schedule: TypeAlias = Annotated[
    Annotated[float, Tag("number")] | Annotated[Ramp, Tag("ramp")] | Annotated[Steps, Tag("steps")],
    Discriminator(
        _form,
        custom_error_type="schedule",
        custom_error_message="should be a number, `{from:, to:}` or `{steps:}`",
    ),
]
"""A number, or one that moves over the training."""

WholeSchedule: TypeAlias = Annotated[
    Annotated[int, Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[Steps, Tag("steps")]
    | Annotated[Until, Tag("until")],
    Discriminator(_form),
]
"""A whole number, or one that moves over the training (rounded), or ends before it does."""


def value_at(schedule: Schedule, progress: float) -> float:
    """Return a schedule's value when `progress` (0 to 1) of the training is done."""
    if isinstance(schedule, Ramp):
        way = progress if schedule.curve == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return schedule.start + (schedule.to - schedule.start) * way
    if isinstance(schedule, Steps):
        return [value for start, value in schedule.steps if start <= progress][-1]
    return float(schedule)


def bounds(schedule: Schedule) -> tuple[float, float]:
    """Return the least and the largest value of a schedule."""
    if isinstance(schedule, Ramp):
        values = [schedule.start, schedule.to]
    elif isinstance(schedule, Steps):
        values = [value for _, value in schedule.steps]
    else:
        values = [float(schedule)]
    return min(values), max(values)
