"""Time and quality of models whose blocks see a share of the tokens, beside the originals.

python -m benchmarks.depth.mixture_of_depths IMAGES CHARACTERS

The arguments are the folders that `fxcompress run` wrote (`--output`) for the specs images.yaml and
spec.yaml of specs/mixture_of_depths: what is timed are the files that it emitted, and the
programs in eager PyTorch. About 3 CPU-minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._common import write_table
from benchmarks.depth._sides import FORMATS, Call, call_of, call_of_program, originals, timings
from fxcompress.spec import Spec, load_data, load_program
from fxcompress.spec.load_teacher import load_teacher

__all__ = ["main"]

SPECS = Path(__file__).parents[2] / "specs" / "mixture_of_depths"
SINGLE, REPEATS = 24, 9
BATCH, BATCHES = 16, 4
Judge = Callable[[Call], str]


def main() -> None:
    """Time all files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("characters", type=Path)
    given = parser.parse_args()
    rows = _model("images", Spec.load(SPECS / "images.yaml"), given.images)
    rows += _model("characters", Spec.load(SPECS / "spec.yaml"), given.characters)
    write_table(
        "depth_mixture_of_depths",
        "Mixture of depths: quality and time",
        "python -m benchmarks.depth.mixture_of_depths IMAGES CHARACTERS",
        ["model", "runtime", "what runs", "quality", "one, ms", "faster", f"{BATCH}, ms",
         "faster "],
        rows,
        notes=__notes__,
    )  # fmt: skip


__notes__ = (
    "Two examples of `specs/mixture_of_depths`. `images` is a vision transformer of 6 blocks on "
    "Fashion-MNIST (`images.yaml`): its quality is the accuracy on all 10,000 test images. "
    "`characters` is a causal transformer of 3 blocks and 128 characters (`spec.yaml`): its "
    "quality is bits per character of held-out text, the predictor choosing, as in writing. "
    f"CPU time on one thread: {SINGLE} single inputs and {BATCHES} batches of {BATCH}, {REPEATS} "
    "times, both sides in turns; `faster` is the median of the ratios. Eager PyTorch is "
    "`fxcompress.emit.eager_module`."
)


def _model(title: str, spec: Spec, run: Path) -> list[list[object]]:
    """Return the rows of a model."""
    run = run.resolve()
    data: list[Any] = list(load_data(spec)["eval"])
    if title == "images":
        inputs = torch.cat([batch[0] for batch, _ in data])
        labels = torch.cat([target for _, target in data])
    else:
        inputs = torch.cat([batch["input_ids"] for batch, _ in data])
        labels = inputs
    judge = _judge(inputs, labels)
    programs = {"original": load_program(spec), "routed": load_teacher(run.parent, run=run.name)}
    eager = {name: call_of_program(each) for name, each in programs.items()}
    rows = [[title, *row] for row in _rows("eager PyTorch", eager, inputs, judge)]
    with TemporaryDirectory() as made:
        first = originals(spec, Path(made))
        for name, format_title in FORMATS.items():
            routed = run / "artifacts" / f"model.{name}"
            calls = {"original": call_of(first[name]), "routed": call_of(routed)}
            rows += [[title, *row] for row in _rows(format_title, calls, inputs, judge)]
    return rows


def _judge(inputs: Tensor, labels: Tensor) -> Judge:
    """Return what measures the accuracy of a call, or where inputs are labels its bits."""

    def judged(call: Call) -> str:
        found = torch.cat([call(inputs[i : i + 64]) for i in range(0, len(inputs), 64)])
        if labels is not inputs:
            return f"{float((found.argmax(1) == labels).double().mean()):.2%}"
        loss = F.cross_entropy(found[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        return f"{float(loss) / math.log(2):.3f}"

    return judged


def _rows(title: str, calls: dict[str, Call], inputs: Tensor, judge: Judge) -> list[list[object]]:
    one = [inputs[i : i + 1] for i in range(SINGLE)]
    many = [inputs[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)]
    single, batched = timings(calls, one, REPEATS), timings(calls, many, REPEATS)
    return [
        [
            title,
            name,
            judge(call) if title == FORMATS["onnx"] else "",
            f"{single[name].ours:.2f}",
            f"{single[name].ratio:.2f}×",
            f"{batched[name].ours:.2f}",
            f"{batched[name].ratio:.2f}×",
        ]
        for name, call in calls.items()
    ]


if __name__ == "__main__":
    main()
