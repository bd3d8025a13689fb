"""The blocks of a spec as frozen, strict pydantic models; unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fxcompress.pipeline.base import Options
from fxcompress.spec._data_blocks import (
    Data,
    DataFactory,
    DimRange,
    Identifier,
    Images,
    Input,
    Split,
    Text,
)
from fxcompress.spec._emit_blocks import (
    Emit,
    EmitExecutorch,
    EmitOnnx,
    EmitOpenvino,
    EmitPlain,
    EmitPt2,
)
from fxcompress.spec._metric_block import AnyMetric, Metric, TorchMetric, metric_text
from fxcompress.spec._model_blocks import (
    MODEL_KINDS,
    FactoryModel,
    HfModel,
    Model,
    ProgramModel,
    Pt2Model,
    TimmModel,
    TorchvisionModel,
)
from fxcompress.spec.constraints import Constraints

__all__ = [
    "MODEL_KINDS",
    "Blocks",
    "Capture",
    "Data",
    "DataFactory",
    "DimRange",
    "Emit",
    "EmitExecutorch",
    "EmitOnnx",
    "EmitOpenvino",
    "EmitPlain",
    "EmitPt2",
    "FactoryModel",
    "HfModel",
    "Images",
    "Input",
    "Metric",
    "Model",
    "ProgramModel",
    "Pt2Model",
    "Split",
    "Text",
    "TimmModel",
    "TorchMetric",
    "TorchvisionModel",
]


class Capture(Options):
    """How the model is recorded."""

    static: tuple[str, ...] = Field(default=(), description="Names of dims that stay fixed.")
    opaque: tuple[str, ...] = Field(
        default=(), description="Globs over module paths; each match stays one untouched node."
    )
    tracer: Literal["recorder", "export"] = "recorder"
    verify: bool = Field(default=True, description="Compare with the model on a second input.")


class Blocks(Options):
    """Every block of a spec but `passes`, whose options the installed passes define."""

    fxcompress: Literal[1] = Field(description="The version of the spec format.")
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names run and reports."
    )
    model: Model
    inputs: tuple[Input, ...] = ()
    dims: dict[Identifier, DimRange] = Field(
        default_factory=dict, description="Ranges of the dims that `inputs` names."
    )
    data: Data | None = None
    metric: Annotated[AnyMetric, BeforeValidator(metric_text)] | None = None
    capture: Capture = Capture()
    constraints: Constraints = Constraints()
    emit: tuple[Emit, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    output: str | None = Field(
        default=None, min_length=1, description="The run folder; by default `runs/NAME`."
    )
