"""Time and bits per character of a model whose blocks see a share of the tokens.

python -m benchmarks.depth.mixture_of_depths RUN

RUN is the folder that `fxcompress run specs/mixture_of_depths/spec.yaml --output RUN` wrote: what
is timed are the files that it emitted. About 2 CPU-minutes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._common import write_table
from benchmarks.depth._sides import FORMATS, Call, call_of, originals, timings
from fxcompress.spec import Spec, load_data

__all__ = ["main"]

SPEC = Path(__file__).parents[2] / "specs" / "mixture_of_depths" / "spec.yaml"
SINGLE, REPEATS = 24, 9
BATCH, BATCHES = 8, 4


def main() -> None:
    """Time all files, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run / "artifacts"
    spec = Spec.load(SPEC)
    data: list[Any] = list(load_data(spec)["eval"])
    windows = torch.cat([batch["input_ids"] for batch, _ in data])
    rows: list[list[object]] = []
    with TemporaryDirectory() as made:
        first = originals(spec, Path(made))
        for name, title in FORMATS.items():
            calls = {"original": call_of(first[name]), "routed": call_of(folder / f"model.{name}")}
            rows += _rows(title, calls, windows)
    write_table(
        "depth_mixture_of_depths",
        "Mixture of depths: bits per character and time",
        "python -m benchmarks.depth.mixture_of_depths RUN",
        ["runtime", "what runs", "bits per character", "one window, ms", "faster",
         "8 windows, ms", "faster "],
        rows,
        notes="A causal transformer of 3 blocks and 128 characters (`specs/mixture_of_depths`): "
        "bits per character on held-out text, the predictor choosing, as it would while writing. "
        f"CPU time on one thread: {SINGLE} single windows and {BATCHES} batches of {BATCH}, "
        f"{REPEATS} times, both sides in turns; `faster` is the median of the ratios.",
    )  # fmt: skip


def _rows(title: str, calls: dict[str, Call], windows: Tensor) -> list[list[object]]:
    one = [windows[i : i + 1] for i in range(SINGLE)]
    many = [windows[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)]
    single, batched = timings(calls, one, REPEATS), timings(calls, many, REPEATS)
    rows: list[list[object]] = []
    for name, call in calls.items():
        logits = torch.cat([call(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        rows.append(
            [
                title,
                name,
                f"{float(loss) / math.log(2):.3f}",
                f"{single[name].ours:.2f}",
                f"{single[name].ratio:.2f}×",
                f"{batched[name].ours:.2f}",
                f"{batched[name].ratio:.2f}×",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
