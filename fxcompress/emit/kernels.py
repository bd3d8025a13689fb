"""Which integer kernels a runtime runs, read from the graph that it optimized."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fxcompress.emit._extras import need_extra

__all__ = [
    "CONVOLUTION_KERNELS",
    "LINEAR_KERNELS",
    "RECURRENT_KERNELS",
    "OpenvinoKernels",
    "integer_kernels",
    "openvino_kernels",
    "runtime_kernels",
]

CONVOLUTION_KERNELS = frozenset({"QLinearConv", "ConvInteger"})
LINEAR_KERNELS = frozenset(
    {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
     "QAttention", "MatMulNBits"}
)  # fmt: skip

RECURRENT_KERNELS = frozenset({"DynamicQuantizeLSTM"})
_INTEGERS: Final = frozenset({"u8", "i8", "u4", "i4"})
_KERNELS = CONVOLUTION_KERNELS | LINEAR_KERNELS | RECURRENT_KERNELS


def integer_kernels(path: str | Path) -> Counter[str]:
    """Return how often each kernel that computes in integers occurs, `QLinearConv` and so on.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    return Counter({name: count for name, count in runtime_kernels(path).items() if _integer(name)})


def runtime_kernels(path: str | Path) -> Counter[str]:
    """Return how often each operator occurs in the graph as onnxruntime runs it on the CPU.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    need_extra("onnx")
    import onnxruntime

    import onnx

    with tempfile.TemporaryDirectory(prefix="fxcompress-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3
        # Weights beside the graph: a model over 2 GB does not fit one protobuf message.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(optimized), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def _integer(name: str) -> bool:
    return name.startswith("QLinear") or name in _KERNELS


@dataclass(frozen=True)
class OpenvinoKernels:
    """Layers of a compiled model that compute in integers: `u8` or `i8` -> how many."""

    convolutions: Counter[str] = field(default_factory=Counter)
    linears: Counter[str] = field(default_factory=Counter)


def openvino_kernels(path: str | Path) -> OpenvinoKernels:
    """Compile an IR for the CPU and count the layers whose kernel reads integers.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    need_extra("openvino")
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    found = OpenvinoKernels()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" not in info or "runtimePrecision" not in info:
            continue
        kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if precision not in _INTEGERS:
            continue
        if kind == "Convolution":
            found.convolutions[precision] += 1
        elif kind in ("FullyConnected", "MatMul"):
            found.linears[precision] += 1
    return found
