"""The `openvino` format: an IR (`.xml` and `.bin`) made from the ONNX export.

OpenVINO fuses the quantize/dequantize pairs that onnxruntime wants as they are. The ONNX file is
read and saved by the runtime itself; nothing of OpenVINO's own converter is needed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from fxcompress.emit._artifact import Written
from fxcompress.emit._extras import need_extra
from fxcompress.emit._job import Job
from fxcompress.emit._lower import Lowered
from fxcompress.emit._onnx_model import onnx_model, save_model
from fxcompress.emit._openvino_constants import fold_constants
from fxcompress.emit._openvino_weights import write_weights
from fxcompress.emit.kernels import openvino_kernels
from fxcompress.errors import EmitError

__all__ = ["write"]


def write(job: Job) -> Written:
    """Export the program to ONNX, read it and save the IR.

    Raises:
        EmitError: The exporter refuses the graph, or OpenVINO cannot read or compile it.
        MissingExtraError: openvino or a package of the `onnx` extra is not installed.
    """
    need_extra("openvino")
    import openvino

    made = onnx_model(job, "openvino")
    name = job.file("xml")
    with tempfile.TemporaryDirectory(prefix="fxcompress-") as folder:
        first, *_ = save_model(made.model, Path(folder), "model.onnx")
        try:
            model = openvino.Core().read_model(str(Path(folder) / first))
        except RuntimeError as error:
            raise EmitError(
                "OpenVINO cannot read the program's ONNX export",
                reason=" ".join(str(error).split())[:400],
                hint="emit it as `onnx` for onnxruntime",
            ) from error
        halved = write_weights(model)
        fold_constants(model)
        _name_nodes(model)
        path = job.stage / name
        openvino.save_model(model, str(path), compress_to_fp16=job.options.openvino.half)
    _drop_indents(path)
    notes = [
        f"`compiled = openvino.Core().compile_model({name!r}, 'CPU')`, then `compiled(inputs)`; "
        f"inputs {', '.join(port.get_any_name() for port in model.inputs)}"
    ]
    if job.options.openvino.half:
        notes.append("weights in float are stored in half precision")
    if halved:
        notes.append(f"the scales of {halved} integer weights are stored in half precision")
    if made.lowered is not None:
        notes += [*_kernel_notes(path, made.lowered), *made.lowered.notes]
    return Written((name, f"{job.options.stem}.bin"), (*notes, *made.notes))


def _name_nodes(model: Any) -> None:
    """Name by place what the runtime named by a count of its own, so that bytes repeat."""
    for i, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}.{i}")


def _drop_indents(path: Path) -> None:
    """Drop what the runtime indents lines with, a seventh of the file."""
    path.write_bytes(re.sub(rb"\n\t+", b"\n", path.read_bytes()))


def _kernel_notes(path: Path, lowered: Lowered) -> list[str]:
    kernels = openvino_kernels(path)
    notes = []
    for kind, count, total in (
        ("convolutions", kernels.convolutions, lowered.convolutions),
        ("linear layers", kernels.linears, lowered.linears),
    ):
        if total:
            notes.append(f"{sum(count.values())} of {total} {kind} run in integers in OpenVINO")
    found = kernels.convolutions + kernels.linears
    listed = ", ".join(f"{count} in {name}" for name, count in sorted(found.items()))
    return [*notes, f"precisions of its kernels: {listed or 'no integers'}"]
