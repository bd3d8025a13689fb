"""Latency of a run's ONNX artefact against its original, both in onnxruntime."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcompress.analysis import Latency
    from fxcompress.ir import Program

__all__ = ["measure_onnx"]


def measure_onnx(
    run: Path, original: Program, *, batch: int | None = None, repeats: int = 20
) -> dict[str, Latency]:
    """Time the first ONNX artefact of a run and the original's export, taking turns.

    Empty where the run emitted no ONNX file or onnxruntime is not installed.
    """
    files = sorted((run / "artifacts").glob("*.onnx"))
    if not files or importlib.util.find_spec("onnxruntime") is None:
        return {}
    from fxcompress.analysis import latency
    from fxcompress.emit import emit
    from fxcompress.testing import hash_inputs

    dims = {"batch": batch} if batch and "batch" in original.dims else None
    inputs = {name: value.numpy() for name, value in hash_inputs(original, dims).items()}
    with tempfile.TemporaryDirectory(prefix="fxcompress-bench-") as folder:
        (exported,) = emit(original, folder, ["onnx"])
        calls = {"original": _session(exported.path, inputs), "result": _session(files[0], inputs)}
        return latency(calls, repeats=repeats)


def _session(path: Path, inputs: Mapping[str, Any]) -> Callable[[], object]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}
    feed = {name: value for name, value in inputs.items() if name in taken}
    return lambda: session.run(None, feed)
