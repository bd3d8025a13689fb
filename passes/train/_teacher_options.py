"""Where a teacher comes from, as a spec says it. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CachedOutputs", "Peer", "Teacher", "TeacherAndOutputs", "TeacherFrom", "followed"]


class TeacherFrom(BaseModel):
    """A teacher that lies elsewhere; paths are relative to the spec. One of the three is given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    spec: str | None = Field(
        default=None, description="A spec: the model that it names, before any pass."
    )
    run: str | None = Field(
        default=None, description="A run folder: the model after its last pass."
    )

    step: str | None = Field(
        default=None, description="The id of an earlier step: the model as that step left it."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(each is not None for each in (self.spec, self.run, self.step)) != 1:
            raise ValueError("say either `spec`, `run` or `step`")
        return self


class Peer(TeacherFrom):
    """A model that learns along: the two teach one another, and only the first is kept."""

    learns: Literal[True] = Field(
        description="Train it on the same losses, compared with the model in its turn."
    )


class CachedOutputs(BaseModel):
    """Outputs that a teacher gave before."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    outputs: str = Field(description="A folder that `fxcompress.train.cache_outputs` wrote.")


Teacher: TypeAlias = Literal["original", "given"] | TeacherFrom
"""`original` is the model before the first pass; `given` the Program given to `compress`."""

TeacherAndOutputs: TypeAlias = Teacher | Peer | CachedOutputs
"""A teacher, one that learns along, or what one said."""


def followed(teacher: TeacherAndOutputs | None) -> frozenset[str]:
    """Return the id of the step whose result teaches, if it is one's."""
    named = teacher.step if isinstance(teacher, TeacherFrom) else None
    return frozenset() if named is None else frozenset({named})
