"""Our int8 models in each runtime: one pipeline, `target:` says which placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

import fxcompress as fxc
from benchmarks.quantize._vision_peers import Call, onnx_session, openvino_call
from fxcompress.emit import emit

__all__ = ["OURS"]


def quantised(program: fxc.Program, images: Tensor, **options: Any) -> fxc.Program:
    """Return the program in int8, calibrated."""
    steps = [{"use": "tidy.fold_batchnorm"}] if _has_norms(program) else []
    static = {"use": "quantize.static", "calibration": len(images), **options}
    data = {"calibration": [(image[None],) for image in images]}
    made: fxc.Program = fxc.compress(program, [*steps, static], data=data).program
    return made


def _has_norms(program: fxc.Program) -> bool:
    return any("running_mean" in name for name in program.state())


def _onnxruntime(program: fxc.Program, images: Tensor, folder: Path, batch: int) -> Call:
    (made,) = emit(quantised(program, images), folder / "ours-ort", ["onnx"])
    print("; ".join(made.notes))
    return onnx_session(made.path)


def _openvino(program: fxc.Program, images: Tensor, folder: Path, batch: int) -> Call:
    import openvino

    (made,) = emit(quantised(program, images), folder / "ours-ov", ["onnx"])
    return openvino_call(openvino.convert_model(str(made.path)))


OURS: Final[Mapping[str, Callable[[fxc.Program, Tensor, Path, int], Call]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
