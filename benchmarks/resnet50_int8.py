"""Int8 ResNet-50 in onnxruntime: ours against its own `quantize_static`, and against fp32.

python -m benchmarks.resnet50_int8 [--repeats 40] [--batch 1]

All three files come from one model and the same calibration images; sessions take turns in one
process on one thread. Needs a CPU with VNNI for the figures to mean anything.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import fxcompress as fxc
from benchmarks._common import interleaved, median, write_table
from benchmarks._onnxruntime import quantized_by_onnxruntime, session
from fxcompress._torchvision import declare_operators
from fxcompress.analysis import compare
from fxcompress.emit import emit
from fxcompress.emit.kernels import integer_kernels

CALIBRATION = 16


def make_model() -> torch.nn.Module:
    declare_operators()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50(weights=None).eval()


def our_files(model: torch.nn.Module, images: torch.Tensor, folder: Path) -> tuple[Path, Path]:
    program = fxc.capture(model, (images[:2],))
    result = fxc.compress(
        program,
        [{"use": "tidy.fold_batchnorm"}, {"use": "quantize.static", "calibration": len(images)}],
        data={"calibration": [(image[None],) for image in images]},
    )
    (fp32,) = emit(program, folder / "fp32", ["onnx"])
    (int8,) = emit(result.program, folder / "int8", ["onnx"])
    print(f"ours: {'; '.join(int8.notes)}")
    return fp32.path, int8.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    model = make_model()
    images = torch.randn(CALIBRATION, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp32, ours = our_files(model, images, folder)
        paths = {
            "fp32": fp32,
            "onnxruntime quantize_static": quantized_by_onnxruntime(fp32, images, folder),
            "fxcompress": ours,
        }
        sizes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        kernels = {name: sum(integer_kernels(path).values()) for name, path in paths.items()}
        sessions = {name: session(path) for name, path in paths.items()}
    feed = {"x": images[: options.batch].numpy()}
    outputs = {n: torch.from_numpy(s.run(None, feed)[0]) for n, s in sessions.items()}
    calls = {n: (lambda s=s: s.run(None, feed)) for n, s in sessions.items()}
    times = interleaved(calls, options.repeats, warmup=3)
    medians = {name: median(values) for name, values in times.items()}
    rows = [
        (
            name,
            f"{medians[name] * 1e3:.2f}",
            f"{min(times[name]) * 1e3:.2f}",
            f"{medians['fp32'] / medians[name]:.2f}",
            f"{medians['onnxruntime quantize_static'] / medians[name]:.3f}",
            kernels[name],
            f"{sizes[name]:.1f}",
            f"{compare(outputs['fp32'], outputs[name]).sqnr_db:.1f}",
        )
        for name in paths
    ]
    write_table(
        "resnet50_int8",
        "ResNet-50 in int8 in onnxruntime",
        f"python -m benchmarks.resnet50_int8 --repeats {options.repeats} --batch {options.batch}",
        (
            "file",
            "CPU ms, median",
            "min",
            "× fp32",
            "× quantize_static",
            "integer kernels",
            "MB",
            "SQNR, dB",
        ),
        rows,
        f"Batch {options.batch}, one thread, {options.repeats} interleaved repeats, random "
        f"weights, {CALIBRATION} calibration images. "
        "Goals: at least 0.95 × quantize_static and 3 × fp32.",
    )


if __name__ == "__main__":
    main()
