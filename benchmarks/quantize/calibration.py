"""What it costs to make ResNet-50 int8 from 128 images: ours, NNCF and onnxruntime.

python -m benchmarks.quantize.calibration [--images 128] [--only ours …]

CPU seconds of one process on one core, images one by one. Ours starts from the module in eager
torch (capture, fold, calibrate, decide, insert), the peers from the float model in their own form.
Needs `pip install openvino nncf`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks._common import RESULTS, write_table
from benchmarks._onnxruntime import quantized_by_onnxruntime
from benchmarks.quantize.vision import make_model, pictures
from fxcompress.emit import emit

NAME: Final = "quantize_calibration"
HEADER: Final = ("quantiser", "CPU s", "ms an image, beyond the first 8", "ranges")
WARM: Final = 8
Make = Callable[[nn.Module, Path, Tensor, Path], object]


def _ours(observer: str) -> Make:
    def make(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> object:
        program = fxc.capture(model, (images[:1],), dynamic=None)
        static = {
            "use": "quantize.static", "calibration": len(images), "target": "openvino",
            "activations": {"observer": observer},
        }  # fmt: skip
        data = {"calibration": [(image[None],) for image in images]}
        return fxc.compress(program, [{"use": "tidy.fold_batchnorm"}, static], data=data).program

    return make


def _nncf(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> object:
    import nncf
    import openvino

    data = nncf.Dataset(list(images), lambda image: image[None].numpy())
    float_model: Any = openvino.convert_model(str(onnx))
    return nncf.quantize(float_model, data, subset_size=len(images))


def _onnxruntime(model: nn.Module, onnx: Path, images: Tensor, folder: Path) -> object:
    return quantized_by_onnxruntime(onnx, images, folder)


ROWS: Final[dict[str, tuple[Make, str]]] = {
    "fxcompress, mse": (_ours("mse"), "least squared error of a histogram (the default)"),
    "fxcompress, minmax": (_ours("minmax"), "extremes"),
    "NNCF": (_nncf, "mean of each image's extremes, then its fast bias correction"),
    "onnxruntime quantize_static": (_onnxruntime, "extremes (MinMax), the model pre-processed"),
}


def measure(make: Make, model: nn.Module, onnx: Path, images: Tensor) -> tuple[float, float]:
    """Return CPU seconds for all images, and milliseconds for each beyond the first."""
    seconds = []
    for part in (images[:WARM], images):
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            make(model, onnx, part, Path(folder))
            seconds.append(time.process_time() - started)
    each = (seconds[1] - seconds[0]) / (len(images) - WARM)
    return seconds[1], each * 1e3


def main() -> None:
    """Measure, and write the table; rows of an earlier table that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    # onnxruntime and OpenVINO make as many threads as there are cores, and let them spin.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images = pictures(options.images)
    model = make_model("resnet50", images[:16])
    earlier = RESULTS / f"{NAME}.json"
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    found = {row[HEADER[0]]: [row[column] for column in HEADER] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        program = fxc.capture(model, (images[:1],), dynamic=None)
        (onnx,) = emit(program, Path(folder), ["onnx"])
        for name in options.only:
            make, ranges = ROWS[name]
            total, each = measure(make, model, onnx.path, images)
            found[name] = [name, f"{total:.1f}", f"{each:.0f}", ranges]
            write(list(found.values()), options.images)


def write(rows: list[list[str]], images: int) -> None:
    """Write the table."""
    write_table(
        NAME,
        f"ResNet-50 in int8 from {images} images: what it costs",
        f"python -m benchmarks.quantize.calibration --images {images}",
        HEADER,
        sorted(rows, key=lambda row: list(ROWS).index(row[0])),
        "CPU seconds on one core, images one by one at 224 pixels, random weights; ours from the "
        "eager module, the peers from their own float model. Beside other work. Goal: at most 1.2 "
        "× either peer.",
    )


if __name__ == "__main__":
    main()
