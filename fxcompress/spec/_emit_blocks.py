"""The items of `emit`: formats and their settings."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from fxcompress.pipeline.base import Options

__all__ = ["Emit", "EmitOnnx", "EmitOpenvino", "EmitPlain", "EmitPt2"]


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


class EmitPlain(_EmitBase):
    """Stand-alone Python source with safetensors, or a saved Program."""

    use: Literal["python", "program"]


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


def _emit_text(raw: Any) -> Any:
    return {"use": raw} if isinstance(raw, str) else raw


Emit: TypeAlias = Annotated[
    EmitPt2 | EmitOnnx | EmitOpenvino | EmitPlain, Field(discriminator="use"), BeforeValidator(_emit_text)
]
