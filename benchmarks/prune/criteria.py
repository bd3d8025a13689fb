"""Accuracy of every criterion at one budget, with and without compensation.

python -m benchmarks.prune.criteria [--networks ResNet ViT] [--seeds 3] [--share 0.3]

Digits of 8 x 8 pixels. A network is trained, pruned in one step by a budget over all axes, and
trained for two more epochs; results/prune_criteria.md gets the mean test accuracy over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Sequence

import torch
from torch import nn

import fxcompress as fxc
from benchmarks._common import write_table

from ._quality_models import network
from ._quality_train import DATASETS, Split, accuracy, fit, load

__all__ = ["main"]

CRITERIA = (
    "random", "l1", "l2", "fpgm", "lamp", "bn_scale", "apoz", "activation_norm", "wanda",
    "taylor", "obd", "fisher",
)  # fmt: skip
METHODS = ("none", "least_squares")
NETWORKS = ("ResNet", "ViT")
CALIBRATION, RATE, TUNE_RATE, TUNE_EPOCHS = 256, 3e-3, 1e-3, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune.criteria")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.networks:
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        dense = []
        for seed in range(options.seeds):
            dense.append(_measure(name, seed, options.share, found))
        rows += _rows(name, found)
        rows.append([f"{name} before", _percent(dense), *["–"] * 3])
    _write(rows, options)
    return 0


def _measure(
    name: str, seed: int, share: float, found: dict[tuple[str, str], list[tuple[float, float]]]
) -> float:
    """Fill in what one trained network gives; return its accuracy."""
    train, test = load("digits")
    model = network(name, DATASETS["digits"].size, seed)
    fit(model, train, DATASETS["digits"].epochs, RATE, seed)
    images = train[0]
    program = fxc.capture(copy.deepcopy(model), (images[:2],), dynamic="batch")
    for criterion in CRITERIA:
        if criterion == "bn_scale" and not any(
            isinstance(m, nn.BatchNorm2d) for m in model.modules()
        ):
            continue
        for method in METHODS:
            pruned = _pruned(program, train, criterion, method, share, seed)
            before = accuracy(pruned, test)
            fit(pruned, train, TUNE_EPOCHS, TUNE_RATE, seed)
            found.setdefault((criterion, method), []).append((before, accuracy(pruned, test)))
            print(f"{name} {seed} {criterion} {method}: {found[criterion, method][-1]}", flush=True)
    return accuracy(model, test)


def _pruned(
    program: fxc.Program, train: Split, criterion: str, method: str, share: float, seed: int
) -> nn.Module:
    images, classes = (part[:CALIBRATION] for part in train)
    batches = [((x,), y) for x, y in zip(images.split(32), classes.split(32), strict=True)]
    step = {
        "use": "prune.channels",
        "budget": {"macs": f"{share:.0%}"},
        "max_ratio": 0.9,
        "criterion": {"name": criterion, "samples": CALIBRATION},
        "compensation": {"method": method, "samples": CALIBRATION},
    }
    done = fxc.compress(program, [step], data={"calibration": batches}, seed=seed)
    # What was not pruned is shared with the Program, and training would change it.
    return copy.deepcopy(done.program.module)


def _rows(name: str, found: dict[tuple[str, str], list[tuple[float, float]]]) -> list[list[object]]:
    rows: list[list[object]] = []
    for criterion in CRITERIA:
        if (criterion, "none") in found:
            cells = [
                _percent([pair[stage] for pair in found[criterion, method]])
                for method in METHODS
                for stage in (0, 1)
            ]
            rows.append([f"{name} {criterion}", *cells])
    return rows


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}"


def _write(rows: list[list[object]], options: argparse.Namespace) -> None:
    stages = ("pruned", "trained")
    write_table(
        "prune_criteria",
        "Criteria and compensation of prune.channels",
        f"python -m benchmarks.prune.criteria --networks {' '.join(options.networks)}",
        ["criterion", *(f"{method}: {stage}" for method in METHODS for stage in stages)],
        rows,
        f"Test accuracy in percent on 8 x 8 digits, mean of {options.seeds} seeds, after pruning "
        f"to {options.share:.0%} of the MACs in one step (over all axes, `max_ratio: 0.9`, "
        f"{CALIBRATION} labelled samples) and after {TUNE_EPOCHS} epochs of training that.",
    )


if __name__ == "__main__":
    raise SystemExit(main())
