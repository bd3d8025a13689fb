"""Our int8 models in each runtime: one pipeline, `target:` says which placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

import fxcompress as fxc
from benchmarks.quantize._vision_peers import (
    Call,
    executorch_call,
    onnx_session,
    openvino_call,
)
from fxcompress.emit import compile_inductor, emit
from fxcompress.ir.ops import op_name

__all__ = ["OURS"]


def quantised(program: fxc.Program, images: Tensor, **options: Any) -> fxc.Program:
    """Return the program in int8, calibrated."""
    norms = any("running_mean" in name for name in program.state())
    steps = [{"use": "tidy.fold_batchnorm"}] if norms else []
    static = {"use": "quantize.static", "calibration": len(images), **options}
    if any(op_name(node) == "sdpa" for node in program.nodes):
        # Of ViT-B/16's noise an eighth is the classifier's, which is 0.004 % of its work.
        static["keep_last"] = True
    data = {"calibration": [(image[None],) for image in images]}
    made: fxc.Program = fxc.compress(program, [*steps, static], data=data).program
    return made


def _written(program: fxc.Program, images: Tensor, target: str, folder: Path, form: str) -> Path:
    made = quantised(program, images, target=target)
    size = program.signature.inputs[0].shape[0]
    example = images[: size if isinstance(size, int) else 2]
    (artefact,) = emit(made, folder / target, [form], example_inputs=(example,))
    print("; ".join(note for note in artefact.notes if " of " in note))
    return artefact.path


def _onnxruntime(program: fxc.Program, images: Tensor, folder: Path) -> Call:
    return onnx_session(_written(program, images, "onnxruntime", folder, "onnx"))


def _openvino(program: fxc.Program, images: Tensor, folder: Path) -> Call:
    import openvino

    path = _written(program, images, "openvino", folder, "openvino")
    return openvino_call(openvino.Core().read_model(str(path)))


def _executorch(program: fxc.Program, images: Tensor, folder: Path) -> Call:
    path = _written(program, images, "executorch", folder, "executorch")
    return executorch_call(path.read_bytes())


def _inductor(program: fxc.Program, images: Tensor, folder: Path) -> Call:
    made = quantised(program, images, target="inductor")
    compiled: nn.Module = compile_inductor(made, (images[:1],))
    print(f"inductor: {dict(compiled.kernels)}")
    return compiled


OURS: Final[Mapping[str, Callable[[fxc.Program, Tensor, Path], Call]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "executorch": _executorch,
    "inductor": _inductor,
}
