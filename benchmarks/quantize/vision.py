"""Int8 vision models: ours against each runtime's own quantiser, in that runtime.

python -m benchmarks.quantize.vision [--models resnet18 …] [--runtimes onnxruntime …] [--repeats 30]

One model at a time; all its files are made from the same calibration images and take turns in one
process on one thread. Weights are random. SQNR is that of the logits of images that calibration did
not see, against eager fp32. Needs a CPU with VNNI, and for the peers
`pip install openvino nncf executorch`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks._common import RESULTS, interleaved, median, write_table
from benchmarks.quantize._vision_ours import OURS
from benchmarks.quantize._vision_peers import PEERS, Call, eager
from fxcompress._torchvision import declare_operators
from fxcompress.emit import emit

MODELS: Final = (
    "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16",
)  # fmt: skip
CALIBRATION: Final = 16
JUDGED: Final = 8
NAME: Final = "quantize_vision"
HEADER: Final = (
    "model, runtime", "ours, × eager", "peer, × eager", "ours / peer", "ours, SQNR dB",
    "peer, SQNR dB", "ours, made in CPU s", "peer, made in CPU s", "peer", "repeats",
)  # fmt: skip
# What the committed rows do not say of themselves, by batch.
REMARKS: Final = {
    1: "Rows were measured one or a few at a time, beside other work. Those of MobileNetV2 and "
    "EfficientNet-B0 in ExecuTorch were measured again after its programs got the fixed batch that "
    "the peers' have. Other runs, beside more work, gave 0.96 and 0.99 (EfficientNet-B0 in "
    "OpenVINO), 0.97 and 0.99 (MobileNetV2 in inductor, which makes the same calls as its peer, "
    "scales aside) and 0.97 (ViT-B/16 in OpenVINO). ViT-B/16 has its classifier in float (30.0 dB "
    "with it in integers).",
    16: "Earlier runs beside other jobs gave 0.89 (MobileNetV2 in onnxruntime, 6 repeats) and 0.89 "
    "(ResNet-50 in OpenVINO, 5 repeats).",
}


def pictures(count: int) -> Tensor:
    """Return crops of two photographs at many places and sizes, `[count, 3, 224, 224]`."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(1)
    photographs = [
        torch.tensor(each).permute(2, 0, 1) / 255 for each in load_sample_images().images
    ]
    crops = []
    for index in range(count):
        whole = photographs[index % len(photographs)]
        side = int(torch.randint(96, 400, (), generator=generator))
        top, left = (
            int(torch.randint(0, size - side, (), generator=generator)) for size in whole.shape[1:]
        )
        crop = whole[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (224, 224), mode="bilinear", antialias=True))
    return (torch.cat(crops) - 0.45) / 0.225


def make_model(name: str, images: Tensor) -> nn.Module:
    """Return a model of torchvision with random weights, and the statistics of `images`.

    With the statistics that torchvision starts from, logits shrink to 1e-9 (MobileNet-v2) and 1e-14
    (EfficientNet), where OpenVINO's rewrites take scales for zero; ViT's start at exactly 0.
    """
    declare_operators()
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def timed(make: Callable[[], Call]) -> tuple[Call, float]:
    """Return what is made, and the CPU seconds that it took."""
    started = time.process_time()
    made = make()
    return made, time.process_time() - started


def sqnr(expected: Tensor, found: Tensor) -> float:
    """Return the power of `expected` over that of the difference, in decibels."""
    noise = (found.double() - expected.double()).pow(2).sum()
    return 10 * math.log10(expected.double().pow(2).sum() / noise)


def measure(name: str, runtimes: Sequence[str], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each runtime."""
    images = pictures(CALIBRATION + JUDGED)
    model = make_model(name, images[:CALIBRATION])
    seen, unseen = images[:CALIBRATION], images[CALIBRATION:]
    program = fxc.capture(model, (images[:2],))
    # Their peers compile for one batch size.
    programs = {}
    if batch == 1:
        fixed = fxc.capture(model, (images[:1],), dynamic=None)
        programs = {"executorch": fixed, "inductor": fixed}
    calls: dict[str, Call] = {"eager": eager(model)}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (onnx,) = emit(program, folder, ["onnx"])
        for runtime in runtimes:
            makers: Mapping[str, Callable[[], Call]] = {
                f"{runtime}, ours": lambda r=runtime: OURS[r](
                    programs.get(r, program), seen, folder
                ),
                f"{runtime}, peer": lambda r=runtime: PEERS[r][1](model, onnx.path, seen, folder),
            }
            for key, make in makers.items():
                try:
                    calls[key], seconds[key] = timed(make)
                except Exception as error:
                    print(f"{name}, {key}: {type(error).__name__}: {error}")
    expected = torch.cat([calls["eager"](image[None]) for image in unseen])
    noise = {
        key: sqnr(expected, torch.cat([call(image[None]) for image in unseen]))
        for key, call in calls.items()
        if key != "eager"
    }
    feed = images[:batch]
    times = interleaved({key: (lambda c=call: c(feed)) for key, call in calls.items()}, repeats, 3)
    medians = {key: median(values) for key, values in times.items()}
    print(name, {k: f"{v * 1e3:.2f} ms" for k, v in medians.items()}, flush=True)
    return [_row(name, runtime, medians, noise, seconds, repeats) for runtime in runtimes]


def _row(
    name: str,
    runtime: str,
    medians: Mapping[str, float],
    noise: Mapping[str, float],
    seconds: Mapping[str, float],
    repeats: int,
) -> dict[str, Any]:
    ours, peer = f"{runtime}, ours", f"{runtime}, peer"

    def cell(values: Mapping[str, float], key: str, form: str) -> str:
        return format(values[key], form) if key in values else "fails"

    speeds = {key: medians["eager"] / value for key, value in medians.items()}
    both = ours in medians and peer in medians
    cells = (
        f"{name}, {runtime}", cell(speeds, ours, ".2f"), cell(speeds, peer, ".2f"),
        f"{medians[peer] / medians[ours]:.3f}" if both else "", cell(noise, ours, ".1f"),
        cell(noise, peer, ".1f"), cell(seconds, ours, ".1f"), cell(seconds, peer, ".1f"),
        PEERS[runtime][0], str(repeats),
    )  # fmt: skip
    return dict(zip(HEADER, cells, strict=True))


def main() -> None:
    """Measure, and write the table; rows of an earlier table that are not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    # With AMX, OpenVINO 2026.4 gives wrong numbers for int8 depthwise convolutions, ours or NNCF's.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    torch.set_num_threads(1)
    name = NAME if options.batch == 1 else f"{NAME}_batch{options.batch}"
    earlier = RESULTS / f"{name}.json"
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    found = {row[HEADER[0]]: row for row in rows}
    for model in options.models:
        made = measure(model, options.runtimes, options.batch, options.repeats)
        found.update({row[HEADER[0]]: row for row in made})
        _write(name, list(found.values()), options.batch)


def _write(name: str, rows: Sequence[Mapping[str, Any]], batch: int) -> None:
    order = {f"{model}, {runtime}": i * 10 + j for i, model in enumerate(MODELS)
             for j, runtime in enumerate(PEERS)}  # fmt: skip
    rows = sorted(rows, key=lambda row: order[row[HEADER[0]]])
    write_table(
        name,
        "Int8 vision models against each runtime's own quantiser",
        f"python -m benchmarks.quantize.vision --batch {batch}",
        HEADER,
        [[row[column] for column in HEADER] for row in rows],
        f"Batch {batch}, 224 pixels, one thread, interleaved repeats, random weights and real "
        f"batch statistics, {CALIBRATION} calibration images, SQNR on {JUDGED} others; oneDNN kept "
        "to VNNI. Goal: at least 0.98 × the peer's speed, SQNR at least the best peer's. "
        + REMARKS.get(batch, ""),
    )


if __name__ == "__main__":
    main()
