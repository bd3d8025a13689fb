"""Float vision models in every runtime, against eager torch: what int8 is to be compared with.

python -m benchmarks.quantize.vision_float [--models resnet18 …] [--repeats 12]

The files are ours, of the programs that `benchmarks.quantize.vision` quantises, and take turns in
one process on one thread. Needs `pip install openvino executorch`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

import fxcompress as fxc
from benchmarks._common import RESULTS, interleaved, median, write_table
from benchmarks.quantize._vision_peers import (
    Call,
    eager,
    executorch_call,
    inductor_call,
    onnx_session,
    openvino_call,
)
from benchmarks.quantize.vision import MODELS, make_model, pictures
from fxcompress.emit import emit

NAME: Final = "quantize_vision_float"
RUNTIMES: Final = ("onnxruntime", "openvino", "executorch", "inductor")
HEADER: Final = (
    "model", "eager, CPU ms", *(f"{each}, × eager" for each in RUNTIMES), "repeats",
)  # fmt: skip


def _openvino(path: Path) -> Call:
    import openvino

    return openvino_call(openvino.Core().read_model(str(path)))


_OPEN: Final[Mapping[str, Callable[[Path], Call]]] = {
    "onnx": onnx_session,
    "openvino": _openvino,
    "executorch": lambda path: executorch_call(path.read_bytes()),
}


def measure(name: str, repeats: int) -> tuple[str, ...]:
    """Return the row of a model."""
    images = pictures(16)
    model = make_model(name, images)
    image = images[:1]
    program = fxc.capture(model, (image,), dynamic=None)
    calls: dict[str, Call] = {"eager": eager(model)}
    with tempfile.TemporaryDirectory() as folder:
        for artefact in emit(program, Path(folder), list(_OPEN), example_inputs=(image,)):
            runtime = "onnxruntime" if artefact.format == "onnx" else artefact.format
            calls[runtime] = _OPEN[artefact.format](artefact.path)
    calls["inductor"] = inductor_call(model, image)
    times = interleaved({key: (lambda c=call: c(image)) for key, call in calls.items()}, repeats, 3)
    medians = {key: median(values) for key, values in times.items()}
    speeds = [f"{medians['eager'] / medians[runtime]:.2f}" for runtime in RUNTIMES]
    return (name, f"{medians['eager'] * 1e3:.1f}", *speeds, str(repeats))


def main() -> None:
    """Measure, and write the table; rows of an earlier table that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    torch.set_num_threads(1)
    earlier = RESULTS / f"{NAME}.json"
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    found = {row[HEADER[0]]: tuple(row[column] for column in HEADER) for row in rows}
    for model in options.models:
        found[model] = measure(model, options.repeats)
        write_table(
            NAME,
            "Float vision models in every runtime",
            "python -m benchmarks.quantize.vision_float",
            HEADER,
            [found[each] for each in MODELS if each in found],
            "Batch 1, 224 pixels, one thread, interleaved repeats, float32 throughout; oneDNN kept "
            "to VNNI. Beside other work: read the ratios.",
        )


if __name__ == "__main__":
    main()
