"""Which integer kernels onnxruntime runs, read from the graph it optimized."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from fxcompress.emit._extras import need_onnx

__all__ = [
    "CONVOLUTION_KERNELS",
    "LINEAR_KERNELS",
    "RECURRENT_KERNELS",
    "integer_kernels",
    "runtime_kernels",
]

CONVOLUTION_KERNELS = frozenset({"QLinearConv", "ConvInteger"})
LINEAR_KERNELS = frozenset(
    {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
     "QAttention", "MatMulNBits"}
)  # fmt: skip

RECURRENT_KERNELS = frozenset({"DynamicQuantizeLSTM"})
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
    need_onnx()
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
