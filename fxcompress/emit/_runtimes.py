"""How each runtime opens an artefact and runs it. It imports torch alone, and no fxcompress.

A loader takes the files of an artefact, modules to import first, and a number of threads; it
returns a function that binds a call (`args`, `kwargs`, `leaves` by name, all tensors) and returns
what runs it. So a benchmark times the runtime, and not the conversion of its inputs.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

__all__ = ["LOADERS", "Bind", "Loader"]

Bind = Callable[[Mapping[str, Any]], Callable[[], Any]]
Loader = Callable[[Sequence[str], Sequence[str], int | None], Bind]


def load_pt2(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Load a torch.export archive."""
    for name in imports:
        importlib.import_module(name)
    module = torch.export.load(paths[0]).module()
    return lambda call: lambda: module(*call["args"], **call["kwargs"])


def load_python(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Import the emitted source as a module and call its `load`."""
    spec = importlib.util.spec_from_file_location("emitted_model", paths[0])
    if spec is None or spec.loader is None:
        raise ImportError(f"{paths[0]} is no Python source")
    source = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = source
    spec.loader.exec_module(source)
    module = source.load()
    return lambda call: lambda: module(*call["args"], **call["kwargs"])


def load_program(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Load a `.fxp` file; its graph is run on the flat inputs."""
    from fxcompress.ir.program import Program

    module = Program.load(paths[0]).module.eval()
    interpreter = torch.fx.Interpreter(module)
    return lambda call: (
        lambda: interpreter.run(*call["leaves"].values(), enable_io_processing=False)
    )


def load_onnx(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Open a session of onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        session = _session(paths[0], options)
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph:
        # It makes an integer Gemm of pairs of 8-bit floats, and then refuses that.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = _session(paths[0], options)
    wanted = {value.name for value in session.get_inputs()}

    def bind(call: Mapping[str, Any]) -> Callable[[], Any]:
        feed = {name: to_ort(leaf) for name, leaf in call["leaves"].items() if name in wanted}
        return lambda: [from_ort(value) for value in session.run_with_ort_values(None, feed)]

    return bind


def _session(path: str, options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def to_ort(tensor: torch.Tensor) -> Any:
    """Return the tensor as onnxruntime's value, bfloat16 too."""
    import onnxruntime

    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def from_ort(value: Any) -> torch.Tensor:
    """Return onnxruntime's value as a tensor; bfloat16 through its memory, for numpy has none."""
    if "bfloat16" in value.data_type():
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return tensor.clone()
    return torch.from_numpy(value.numpy())


def load_openvino(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Compile an IR for the CPU, in float32 where it is not quantised."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    compiled = openvino.Core().compile_model(paths[0], "CPU", settings)
    names = [port.get_any_name() for port in compiled.inputs]
    outputs = range(len(compiled.outputs))

    def bind(call: Mapping[str, Any]) -> Callable[[], Any]:
        request = compiled.create_infer_request()
        for i, name in enumerate(names):
            request.set_input_tensor(i, openvino.Tensor(call["leaves"][name].contiguous().numpy()))

        def run() -> Any:
            request.infer()
            return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in outputs]

        return run

    return bind


def load_executorch(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Load a `.pte`; the module of quantized kernels registers them on import."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(paths[0]).load_method("forward")

    def bind(call: Mapping[str, Any]) -> Callable[[], Any]:
        leaves = pytree.tree_leaves((call["args"], call["kwargs"]))
        flat = [leaf.contiguous() for leaf in leaves]
        return lambda: [leaf.clone() for leaf in method.execute(flat)]

    return bind


def load_inductor(paths: Sequence[str], imports: Sequence[str], threads: int | None) -> Bind:
    """Load a package of AOTInductor: machine code, called through torch."""
    module = torch._inductor.aoti_load_package(paths[0])
    return lambda call: lambda: module(*call["args"], **call["kwargs"])


LOADERS: Final[Mapping[str, Loader]] = {
    "pt2": load_pt2,
    "python": load_python,
    "onnx": load_onnx,
    "openvino": load_openvino,
    "executorch": load_executorch,
    "inductor": load_inductor,
    "program": load_program,
}
