"""Time and accuracy of a model with early exits, beside the model without.

python -m benchmarks.depth.early_exit RUN

RUN is the folder that `fxcompress run specs/early_exit/spec.yaml --output RUN` wrote: what is timed
are the files that it emitted. About 2 CPU-minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks._common import write_table
from benchmarks.depth._sides import FORMATS, Call, call_of, originals, timings
from fxcompress.spec import Spec, load_data

__all__ = ["main"]

SPEC = Path(__file__).parents[2] / "specs" / "early_exit" / "spec.yaml"
SINGLE, REPEATS = 200, 9
BATCH, BATCHES = 16, 12
NAMES = ("original", "model", "model.exit_0", "model.exit_1")


def main() -> None:
    """Time all files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run / "artifacts"
    spec = Spec.load(SPEC)
    data = list(load_data(spec)["eval"])
    images = torch.cat([batch[0] for batch, _ in data])
    labels = torch.cat([target for _, target in data])
    rows: list[list[object]] = []
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
    f"10,000 test images. CPU time on one thread: {SINGLE} single images and {BATCHES} batches of "
    f"{BATCH}, {REPEATS} times, all sides in turns; `faster` is the median of the ratios to the "
    "original. `exits` chooses for each image; `exit_0` and `exit_1` always stop after blocks 1 "
    "and 3, counted from 0. A batch stops early only where all of its images may."
)


def _rows(title: str, calls: dict[str, Call], images: Tensor, labels: Tensor) -> list[list[object]]:
    one = [images[i : i + 1] for i in range(SINGLE)]
    many = [images[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)]
    single, batched = timings(calls, one, REPEATS), timings(calls, many, REPEATS)
    rows: list[list[object]] = []
    for name, call in calls.items():
        found = torch.cat([call(images[i : i + 250]) for i in range(0, len(images), 250)])
        right = float((found.argmax(1) == labels).double().mean())
        rows.append(
            [
                title,
                {"model": "exits"}.get(name, name.removeprefix("model.")),
                f"{right:.2%}",
                f"{single[name].ours:.2f}",
                f"{single[name].ratio:.2f}×",
                f"{batched[name].ours:.2f}",
                f"{batched[name].ratio:.2f}×",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
