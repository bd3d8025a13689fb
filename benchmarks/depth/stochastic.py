"""What training with drops gains when blocks are skipped afterwards.

python -m benchmarks.depth.stochastic [--seeds 2]

A vision transformer of 6 blocks is trained on scikit-learn's digits from scratch, as it is and with
`depth.stochastic`; then blocks are skipped by block influence, without any healing. About 2
CPU-minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks._common import write_table
from fxcompress.api import compress
from fxcompress.ir import Program, capture
from fxcompress.train.metrics import BUILT_IN

__all__ = ["main"]

EXAMPLE = Path(__file__).parents[2] / "specs" / "vit_heads"
BLOCKS, WIDTH, HEADS, EPOCHS = 6, 32, 4, 15
SKIPPED = (0, 1, 2, 3)
FIT = {
    "use": "train.fit",
    "epochs": EPOCHS,
    "shuffle": "samples",
    "optimizer": {"use": "AdamW", "lr": 2e-3, "weight_decay": 0.05},
    "scheduler": {"use": "OneCycleLR", "max_lr": 2e-3},
}
WAYS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "as it is": [],
    "stochastic depth, p = 0.3": [{"use": "depth.stochastic", "p": 0.3}],
    "LayerDrop, p = 0.2": [
        {"use": "depth.stochastic", "form": "block", "schedule": "uniform", "p": 0.2}
    ],
}


def main() -> None:
    """Train, skip, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    seeds = parser.parse_args().seeds
    sys.path.insert(0, str(EXAMPLE))
    data = import_module("data").digits(copies=2)
    rows = []
    for name, steps in WAYS.items():
        found = [_accuracies(steps, data, seed) for seed in range(seeds)]
        rows.append([name, *(f"{mean(each):.2%}" for each in zip(*found, strict=True))])
    write_table(
        "depth_stochastic",
        "Skipping blocks after training with drops",
        "python -m benchmarks.depth.stochastic",
        ["trained", "all blocks", *(f"{n} skipped" for n in SKIPPED[1:])],
        rows,
        notes=f"Accuracy on 597 digits of a vision transformer of {BLOCKS} blocks, width {WIDTH}, "
        f"trained from scratch for {EPOCHS} epochs; blocks skipped by block influence and not "
        f"healed. Means of {seeds} seeds.",
    )


def _accuracies(
    steps: Sequence[Mapping[str, Any]], data: Mapping[str, Sequence[Any]], seed: int
) -> list[float]:
    """Return the accuracy of a trained model with 0, 1, … blocks skipped."""
    torch.manual_seed(seed)
    model = import_module("model").vit(width=WIDTH, heads=HEADS, blocks=BLOCKS)
    program = capture(model.eval(), (torch.zeros(2, 1, 8, 8),))
    metric = BUILT_IN["accuracy"]
    trained = compress(program, [*steps, FIT], data=data, seed=seed).program
    return [metric.evaluate(_without(trained, count, data).module, data) for count in SKIPPED]


def _without(program: Program, count: int, data: Mapping[str, Sequence[Any]]) -> Program:
    if count == 0:
        return program
    step = {"use": "depth.skip_blocks", "count": count, "calibration": 256}
    return compress(program, [step], data=data).program


if __name__ == "__main__":
    main()
