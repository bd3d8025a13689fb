"""What `quantize.binary` and `quantize.ternary` are told alike. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Selection

__all__ = ["LevelOptions", "LevelWeight"]


class LevelOptions(Selection):
    """Which layers, and whether they are trained. The selection is over layers."""

    keep_first: bool = Field(
        default=True, description="Leave the layers that read the inputs in float."
    )
    keep_last: bool = Field(
        default=True, description="Leave the layers that make the outputs in float."
    )
    train: bool = Field(
        default=True,
        description="Keep the weights as they are behind their quantizers, for `train.fit` to "
        "follow; else store what they are rounded to, and fix the scales.",
    )


class LevelWeight(BaseModel):
    """The quantizer of one weight; its first scale is in `arrays[path]`.

    Attributes:
        path: Where the quantizer goes.
        tensor: The parameter.
        layers: The nodes that read it.
        axis: Dimension of the output channels; None for one scale.
        shape: Shape of the scale.
        zeros: How many scales are 0, the channel being nothing but zeros.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    tensor: str
    layers: tuple[str, ...]
    axis: int | None
    shape: tuple[int, ...]
    zeros: int = 0
