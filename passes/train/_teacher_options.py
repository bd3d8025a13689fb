"""Where a teacher comes from, as a spec says it. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CachedOutputs", "Teacher", "TeacherAndOutputs", "TeacherFrom"]


class TeacherFrom(BaseModel):
    """A teacher that lies elsewhere; paths are relative to the spec. One of the two is given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    spec: str | None = Field(
        default=None, description="A spec: the model that it names, before any pass."
    )
    run: str | None = Field(
        default=None, description="A run folder: the model after its last pass."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.spec is None) == (self.run is None):
            raise ValueError("say either `spec` or `run`")
        return self


class CachedOutputs(BaseModel):
    """Outputs that a teacher gave before."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    outputs: str = Field(description="A folder that `fxcompress.train.cache_outputs` wrote.")


Teacher: TypeAlias = Literal["original", "given"] | TeacherFrom
"""`original` is the model before the first pass; `given` the Program given to `compress`."""

TeacherAndOutputs: TypeAlias = Teacher | CachedOutputs
"""A teacher, or what it said."""
