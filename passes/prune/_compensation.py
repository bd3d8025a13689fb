"""What a spec says about making up for what is removed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fxcompress.pipeline.base import Options

__all__ = ["Compensation"]


class Compensation(Options):
    """How the layers that read a pruned axis make up for what they no longer get."""

    method: Literal["none", "bias", "least_squares"] = Field(
        default="none",
        description="`bias` keeps the mean of each output; `least_squares` refits the weights to "
        "the outputs on calibration data.",
    )
    ridge: float = Field(
        default=0.01,
        gt=0,
        description="Part of the inputs' mean square that holds refitted weights back.",
    )
    data: str = Field(default="calibration", description="Split that outputs are compared on.")
    samples: int = Field(default=128, ge=1, description="Samples that are read of it.")
