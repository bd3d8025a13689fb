"""The items of `emit`: formats and their settings."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from fxcompress.pipeline.base import Options

__all__ = ["Emit", "EmitExecutorch", "EmitOnnx", "EmitOpenvino", "EmitPlain", "EmitPt2"]


def _stem(text: str) -> str:
    if "/" in text or "\\" in text or ".." in text or text.startswith("~"):
        raise ValueError("must stay inside the run folder: a plain file name, without its ending")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise ValueError("should be a plain file name, without its ending")
    return text


class _EmitBase(Options):
    stem: Annotated[str, AfterValidator(_stem)] = Field(
        default="model", description="The file's name inside `artifacts/`, without its ending."
    )
    exits: bool = Field(
        default=False,
        description="Also write the model that always stops at an early exit, one for each: "
        "`model.exit_0` and so on.",
    )


class EmitPlain(_EmitBase):
    """Python source with safetensors, a saved Program, or machine code made by inductor."""

    use: Literal["python", "program", "inductor"]


class EmitPt2(_EmitBase):
    """An archive of torch.export."""

    use: Literal["pt2"]
    quantized: Literal["arithmetic", "decomposed"] = Field(
        default="arithmetic",
        description="Write quantisation as plain torch arithmetic, which loads with torch alone, "
        "or as `torch.ops.quantized_decomposed`, for PT2E backends.",
    )


class EmitOnnx(_EmitBase):
    """An ONNX file."""

    use: Literal["onnx"]
    opset: int = Field(default=20, ge=18, le=23, description="Version of the ONNX operator set.")
    activations: Literal["float32", "int8"] = Field(
        default="float32",
        description="What layers compute with whose weights alone are quantised. `int8` lets "
        "onnxruntime round their inputs, row by row: faster, and about 0.5 % off.",
    )
    target: Literal["onnxruntime", "tensorrt"] = Field(
        default="onnxruntime",
        description="Who reads the file. `tensorrt`: signed activations around 0, biases in "
        "float, no operators of onnxruntime's own.",
    )


class EmitOpenvino(_EmitBase):
    """An OpenVINO IR (`.xml` and `.bin`), made from the ONNX export."""

    use: Literal["openvino"]
    half: bool = Field(
        default=False, description="Store weights that are in float32 in half precision."
    )


class EmitExecutorch(_EmitBase):
    """An ExecuTorch program (`.pte`) whose layers run in XNNPACK."""

    use: Literal["executorch"]
    maximum: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Largest value of each dynamic size, for memory is planned ahead; 1 fixes it. "
        "Without: what the model was captured for, else 16 or twice the example.",
    )


def _emit_text(raw: Any) -> Any:
    return {"use": raw} if isinstance(raw, str) else raw


Emit: TypeAlias = Annotated[
    EmitPt2 | EmitOnnx | EmitOpenvino | EmitExecutorch | EmitPlain,
    Field(discriminator="use"),
    BeforeValidator(_emit_text),
]
