"""Time and accuracy of a model with early exits, beside the model without.

python -m benchmarks.depth.early_exit RUN

RUN is the folder that `fxcompress run specs/early_exit/spec.yaml --output RUN` wrote: what is timed
are the files that it emitted. About 2 CPU-minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import write_table
from benchmarks.depth._sides import FORMATS, Call, call_of, call_of_program, originals, timings
from fxcompress.rewrite import at_exit, early_exits
from fxcompress.spec import Spec, load_data, load_program
from fxcompress.spec.load_teacher import load_teacher

__all__ = ["main"]

SPEC = Path(__file__).parents[2] / "specs" / "early_exit" / "spec.yaml"
SINGLE, REPEATS = 100, 7
BATCH, BATCHES = 16, 6
NAMES = ("original", "model", "model.exit_0", "model.exit_1")


def main() -> None:
    """Time all files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run.resolve()
    folder = run / "artifacts"
    spec = Spec.load(SPEC)
    data: list[Any] = list(load_data(spec)["eval"])
    images = torch.cat([batch[0] for batch, _ in data])
    labels = torch.cat([target for _, target in data])
    result = load_teacher(run.parent, run=run.name)
    programs = {"original": load_program(spec), "model": result}
    programs |= {f"model.{e.name}": at_exit(result, e.name) for e in early_exits(result)}
    eager = {name: call_of_program(each) for name, each in programs.items()}
    rows = _rows("eager PyTorch", eager, images, labels)
    with TemporaryDirectory() as made:
        first = originals(spec, Path(made))
        for name, title in FORMATS.items():
            files = {"original": first[name]}
            files |= {each: folder / f"{each}.{name}" for each in NAMES[1:]}
            calls = {key: call_of(path) for key, path in files.items() if path.exists()}
            rows += _rows(title, calls, images, labels)
    write_table(
        "depth_early_exit",
        "Early exits: accuracy and time",
        "python -m benchmarks.depth.early_exit RUN",
        ["runtime", "what runs", "accuracy", "one image, ms", "faster", "16 images, ms", "faster "],
        rows,
        notes=__notes__,
    )


__notes__ = (
    "A vision transformer of 6 blocks on Fashion-MNIST (`specs/early_exit`): accuracy on all "
    f"10,000 test images in onnxruntime. CPU time on one thread: {SINGLE} single images and "
    f"{BATCHES} batches of {BATCH}, {REPEATS} times, all sides in turns; `faster` is the median of "
    "the ratios to the original. `exits` chooses for each image; `exit_0` and `exit_1` always stop "
    "after blocks 1 and 3, counted from 0. A batch stops early only where all of its images may. "
    "Eager PyTorch is `fxcompress.emit.eager_module`, which branches in Python; a file of "
    "torch.export has `torch.cond`, whose own cost in eager PyTorch is more than it saves on so "
    "small a model."
)


def _rows(title: str, calls: dict[str, Call], images: Tensor, labels: Tensor) -> list[list[object]]:
    one = [images[i : i + 1] for i in range(SINGLE)]
    many = [images[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)]
    single, batched = timings(calls, one, REPEATS), timings(calls, many, REPEATS)
    rows: list[list[object]] = []
    for name, call in calls.items():
        right = _accuracy(call, images, labels) if title == FORMATS["onnx"] else ""
        rows.append(
            [
                title,
                {"model": "exits"}.get(name, name.removeprefix("model.")),
                right,
                f"{single[name].ours:.2f}",
                f"{single[name].ratio:.2f}×",
                f"{batched[name].ours:.2f}",
                f"{batched[name].ratio:.2f}×",
            ]
        )
    return rows


def _accuracy(call: Call, images: Tensor, labels: Tensor) -> str:
    found = torch.cat([call(images[i : i + 250]) for i in range(0, len(images), 250)])
    return f"{float((found.argmax(1) == labels).double().mean()):.2%}"


if __name__ == "__main__":
    main()
