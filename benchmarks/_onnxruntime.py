"""onnxruntime as benchmarks use it: sessions on one thread, and its own static quantiser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["quantized_by_onnxruntime", "session"]


def session(path: Path) -> Any:
    """Return a session on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantized_by_onnxruntime(fp32: Path, images: Tensor, folder: Path) -> Path:
    """Quantise as its documentation says: pre-processed, QDQ, weights per channel.

    Args:
        fp32: A model with the one input `x`.
        images: Calibration images, `[count, …]`.
        folder: Where the result goes.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            image = next(self.rest, None)
            return None if image is None else {"x": image[None].numpy()}

    prepared, quantized = folder / "prepared.onnx", folder / "theirs.onnx"
    quant_pre_process(str(fp32), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized
