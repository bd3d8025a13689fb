"""What a spec says about making up for what is removed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from fxcompress.pipeline.base import Options

__all__ = ["ByMethod", "Compensation"]


Method: TypeAlias = Literal["none", "bias", "least_squares"]


class Compensation(Options):
    """How the layers that read a pruned axis make up for what they no longer get."""

    method: Method = Field(
        default="none",
        description="`bias` keeps the mean of each output; `least_squares` refits the weights to "
        "the outputs on calibration data.",
    )
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Part of the inputs' mean square that holds refitted weights back; `auto` takes"
        " what does best on rows held out, layer by layer.",
    )
    data: str = Field(default="calibration", description="Split that outputs are compared on.")
    samples: int = Field(default=128, ge=1, description="Samples that are read of it.")


def _by_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


ByMethod: TypeAlias = Annotated[
    Compensation, BeforeValidator(_by_method, json_schema_input_type=Method | Compensation)
]
"""A compensation with its settings, or its method alone (`compensation: least_squares`)."""
