"""The `onnx` format: torch's dynamo exporter, QDQ pairs that a runtime turns into integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxcompress.emit._artifact import Written
from fxcompress.emit._extras import need_extra
from fxcompress.emit._job import Job
from fxcompress.emit._lower import Lowered
from fxcompress.emit._onnx_model import onnx_model, save_model
from fxcompress.emit.kernels import (
    CONVOLUTION_KERNELS,
    LINEAR_KERNELS,
    RECURRENT_KERNELS,
    integer_kernels,
)

__all__ = ["write"]


def write(job: Job) -> Written:
    """Export the program and save the model.

    Raises:
        EmitError: The exporter refuses the graph, or the target cannot take it.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    need_extra("onnx")
    chosen = job.options.onnx
    made = onnx_model(job, chosen.target, opset=chosen.opset, activations=chosen.activations)
    name = job.file("onnx")
    files = save_model(made.model, job.stage, name)
    graph = made.model.graph
    notes = [
        f"inputs {', '.join(_names(graph.inputs))}; outputs {', '.join(_names(graph.outputs))}"
    ]
    if made.lowered is not None:
        notes += _quantized_notes(job.stage / name, made.lowered, chosen.target)
    return Written(files, (*notes, *made.notes))


def _quantized_notes(path: Path, lowered: Lowered, target: str) -> list[str]:
    if target == "tensorrt":
        layers = f"{lowered.convolutions} convolutions and {lowered.linears} linear layers"
        return [f"for TensorRT: signed Q/DQ pairs around 0 at {layers}", *lowered.notes]
    return [*_kernel_notes(path, lowered), *lowered.notes]


def _names(values: Any) -> list[str]:
    return [str(value.name) for value in values]


def _kernel_notes(path: Path, lowered: Lowered) -> list[str]:
    kernels = integer_kernels(path)
    parts = []
    for kind, total, names in (
        ("convolutions", lowered.convolutions, CONVOLUTION_KERNELS),
        ("linear layers", lowered.linears, LINEAR_KERNELS),
        ("recurrent layers", lowered.recurrent, RECURRENT_KERNELS),
    ):
        if total:
            count = sum(kernels[name] for name in names)
            parts.append(f"{count} of {total} {kind} run as integer kernels in onnxruntime")
    listed = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
    return [*parts, f"integer kernels: {listed or 'none'}"]
