"""What a spec may say of projectors. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ProjectorConfig"]


class ProjectorConfig(BaseModel):
    """How tapped tensors of the student are brought to the shape of the teacher's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    taps: tuple[str, ...] = Field(
        default=("*",), strict=False, description="Globs over names of taps."
    )
    use: Literal["auto", "linear", "mlp", "none"] = Field(
        default="auto",
        description="`auto` puts a linear map (a 1×1 convolution on feature maps) where widths "
        "differ; `linear` always; `mlp` two of them with a GELU between; `none` never.",
    )
    bias: bool = Field(default=False, description="Whether its layers have biases.")
    hidden: int | None = Field(
        default=None, ge=1, description="Width inside an `mlp`; by default the teacher's."
    )
    resize: Literal["auto", "pool", "interpolate", "none"] = Field(
        default="auto",
        description="Where numbers of places differ: average pooling if the student has more, "
        "else interpolation.",
    )
