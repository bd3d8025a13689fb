"""What can be said about emitting: formats, file names, and options of each format."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "FORMATS",
    "EmitOptions",
    "ExecutorchOptions",
    "OnnxOptions",
    "OpenvinoOptions",
    "Pt2Options",
]

FORMATS: Final = ("program", "pt2", "onnx", "openvino", "executorch", "inductor", "python")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Pt2Options(_Options):
    """Options of the torch.export archive."""

    quantized: Literal["arithmetic", "decomposed"] = Field(
        default="arithmetic",
        description="`arithmetic`: rounding written as plain torch operations, so that "
        "`torch.export.load` needs nothing else. `decomposed`: torch.ops.quantized_decomposed, "
        "which inductor and other PT2E backends turn into integer kernels; a reader must first "
        "`import torch.ao.quantization.fx._decomposed`.",
    )


class OnnxOptions(_Options):
    """Options of the ONNX file."""

    opset: Annotated[int, Field(ge=18, le=23)] = Field(
        default=20, description="Version of the ONNX operator set."
    )
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


class OpenvinoOptions(_Options):
    """Options of the OpenVINO IR."""

    half: bool = Field(
        default=False, description="Store weights that are in float32 in half precision."
    )


class ExecutorchOptions(_Options):
    """Options of the ExecuTorch program."""

    maximum: Mapping[str, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Largest value of each dynamic size, for memory is planned ahead; 1 fixes it. "
        "Without: what the model was captured for, else 16 or twice the example.",
    )


class EmitOptions(_Options):
    """Options of one call of `emit`."""

    stem: str = Field(
        default="model",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="File name of every artefact, without its ending.",
    )
    seed: int = Field(default=0, description="Seed of the inputs on which artefacts are compared.")
    timeout: float = Field(
        default=900.0, gt=0, description="Seconds the fresh process may take, all formats together."
    )
    pt2: Pt2Options = Pt2Options()
    onnx: OnnxOptions = OnnxOptions()
    openvino: OpenvinoOptions = OpenvinoOptions()
    executorch: ExecutorchOptions = ExecutorchOptions()
