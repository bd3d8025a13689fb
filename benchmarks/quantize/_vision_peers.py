"""Each runtime's own int8 quantiser on one model and one set of calibration images.

- onnxruntime: `quantize_static`, pre-processed, QDQ, weights per channel;
- OpenVINO: NNCF's `quantize`, told what is a transformer;
- ExecuTorch and inductor: PT2E of torchao with the quantiser of that backend.

None is a dependency: `pip install openvino nncf executorch` (executorch brings torchao).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._onnxruntime import quantized_by_onnxruntime, session

__all__ = [
    "PEERS",
    "Call",
    "eager",
    "executorch_call",
    "inductor_call",
    "onnx_session",
    "openvino_call",
]

Call = Callable[[Tensor], Tensor]
"""Images to logits."""


def onnx_session(path: Path) -> Call:
    """Return the model in onnxruntime, on one thread."""
    opened = session(path)
    name = opened.get_inputs()[0].name
    return lambda x: torch.from_numpy(opened.run(None, {name: x.numpy()})[0])


def openvino_call(model: Any) -> Call:
    """Return the model in OpenVINO, on one thread."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: torch.from_numpy(np.array(request.infer([x.numpy()])[0]))


def executorch_call(buffer: bytes) -> Call:
    """Return a program in ExecuTorch's runtime; its bytes must outlive it."""
    import executorch.kernels.quantized  # noqa: F401  # registers its kernels
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(buffer)
    method = program.load_method("forward")

    def call(x: Tensor, alive: object = (buffer, program)) -> Tensor:
        found: Tensor = method.execute([x])[0].clone()
        return found

    return call


def inductor_call(module: nn.Module, example: Tensor) -> Call:
    """Return a module compiled by inductor with its weights frozen."""
    import torch._inductor.config as config

    with torch.no_grad(), config.patch(freezing=True, cpp_wrapper=False):
        compiled = torch.compile(module)
        compiled(example)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), config.patch(freezing=True):
            found: Tensor = compiled(x)
            return found

    return call


def _onnxruntime(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> Call:
    return onnx_session(quantized_by_onnxruntime(onnx, images, folder))


def _openvino(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> Call:
    import nncf
    import openvino

    kind = nncf.ModelType.TRANSFORMER if _is_transformer(model) else None
    data = nncf.Dataset(list(images), lambda image: image[None].numpy())
    made = nncf.quantize(
        openvino.convert_model(str(onnx)), data, model_type=kind, subset_size=len(images)
    )
    return openvino_call(made)


def _is_transformer(model: nn.Module) -> bool:
    return any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def _pt2e(model: nn.Module, images: Tensor, quantizer: Any) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    # The quantiser of inductor tells operations apart by what dynamo notes in a strict export.
    exported = torch.export.export(model, (images[:1],), strict=True).module()
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for image in images:
            prepared(image[None])
    converted: nn.Module = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def _executorch(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> Call:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower

    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True)
    )
    converted = _pt2e(model, images, quantizer)
    exported = torch.export.export(converted, (images[:1],))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return executorch_call(edge.to_executorch().buffer)


def _inductor(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> Call:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    return inductor_call(_pt2e(model, images, quantizer), images[:1])


PEERS: Final[Mapping[str, tuple[str, Callable[[nn.Module, Path, Tensor, Path], Call]]]] = {
    "onnxruntime": ("quantize_static", _onnxruntime),
    "openvino": ("NNCF", _openvino),
    "executorch": ("PT2E, XNNPACK", _executorch),
    "inductor": ("PT2E, x86", _inductor),
}


def eager(model: nn.Module) -> Call:
    """Return the model in eager torch."""

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(x)
            return found

    return call
