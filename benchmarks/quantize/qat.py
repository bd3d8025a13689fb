"""Accuracy of trained quantization: int8 without training, then 4, 2, 1.58 and 1 bits with it.

python -m benchmarks.quantize.qat [--seeds 2] [--models digits/resnet8 …] [--recipes "int4*" …]

The digits of scikit-learn (1,200 to train, 597 to test) with the ResNet-8 of specs/digits and the
MobileNet of specs/mobilenet_qat; Fashion-MNIST with the ResNet-14 of specs/fashion_mnist and a
MobileNet of `benchmarks.quantize.fashion_mobilenet`, trained on a part of it. Every row starts from
the shipped float32 weights; each seed shuffles the training data anew. Learned rows keep the
weights of the last epoch. Sizes are of tensors as stored. Each row is written when it is done, and
rows that are there are not measured again: delete one to renew it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks._common import RESULTS, write_table
from benchmarks.quantize.dynamic import SPECS, load
from benchmarks.quantize.fashion_mobilenet import WEIGHTS, fashion_mobilenet
from fxcompress.analysis import cost

Step = Mapping[str, Any]
Batch = tuple[tuple[Tensor, ...], Tensor]
NAME = "quantize_qat"
MODELS = ("digits/resnet8", "digits/mobilenet", "fashion/resnet14", "fashion/mobilenet")
HEADER = ("network", "recipe", "accuracy", "to float32", "range", "epochs", "size %", "CPU s")
Row = dict[str, str]
IMAGES = 10_000  # of Fashion-MNIST, to train on
NOTES = (
    "Per cent of right classes: mean, and range over two seeds, which shuffle the training data; "
    "without a range, of one. Every row starts from the shipped float32 weights and is trained on "
    "labels and on the float32 network's answers (Adam, cosine); of Fashion-MNIST on "
    f"{IMAGES:,} of the 60,000 images. int4 and int2 are weights and activations of all layers; "
    "ternary and binary rows leave the first and last layer in float. Size: tensors as stored, of "
    "float32's. Recipes that a network has no row of were not measured."
)
FOLD: Step = {"use": "tidy.fold_batchnorm"}


def fit(epochs: int, lr: float) -> Step:
    """Train on labels and on the float32 network's own answers."""
    return {
        "use": "train.fit",
        "epochs": epochs,
        "teacher": "original",
        "losses": [
            {"use": "hard_labels", "weight": 0.5},
            {"use": "soft_labels", "weight": 0.5, "temperature": 4},
        ],
        "optimizer": {"use": "Adam", "lr": lr},
        "scheduler": {"use": "CosineAnnealingLR", "T_max": "all"},
    }


def qat(bits: int, activations: int, method: str) -> Step:
    """Insert quantizers that train."""
    return {
        "use": "quantize.qat",
        "method": method,
        "weights": {"bits": bits},
        "activations": {"bits": activations},
        "calibration": 256,
    }


def rows(short: int, long: int) -> dict[str, list[Step]]:
    """Return the recipes, by name; `short` and `long` are epochs."""
    return {
        "int8, no training": [FOLD, {"use": "quantize.static", "calibration": 256}],
        "int4 weights, int8 activations, no training": [
            FOLD,
            {"use": "quantize.static", "calibration": 256,
             "weights": {"bits": 4, "observer": "mse"}},
        ],
        "int4, lsq": [qat(4, 4, "lsq"), fit(short, 1e-3), FOLD],
        "int4, ste": [qat(4, 4, "ste"), fit(short, 1e-3), FOLD],
        "int4 weights, int8 activations, lsq": [qat(4, 8, "lsq"), fit(short, 1e-3), FOLD],
        "int2, lsq": [qat(2, 2, "lsq"), fit(long, 1e-3), FOLD],
        "int2, ste": [qat(2, 2, "ste"), fit(long, 1e-3), FOLD],
        "int2, lsq, short": [qat(2, 2, "lsq"), fit(short, 1e-3), FOLD],
        "int2, ste, short": [qat(2, 2, "ste"), fit(short, 1e-3), FOLD],
        "ternary weights, twn": [{"use": "quantize.ternary"}, fit(long, 2e-3)],
        "ternary weights, absmean": [
            {"use": "quantize.ternary", "method": "absmean"}, fit(long, 2e-3),
        ],
        "binary weights": [{"use": "quantize.binary", "activations": "none"}, fit(long, 5e-3)],
        "binary": [{"use": "quantize.binary"}, fit(long, 5e-3)],
        "binary, input scale": [
            {"use": "quantize.binary", "input_scale": True}, fit(long, 5e-3),
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class Shuffled:
    """Batches of a training set in another order each time it is read."""

    images: Tensor
    classes: Tensor
    size: int = 64

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.images))
        for start in range(0, len(order), self.size):
            index = order[start : start + self.size]
            yield (self.images[index],), self.classes[index]


@dataclass(frozen=True)
class Case:
    """A network, what it reads, and how long it is trained."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: Sequence[Batch]
    short: int
    long: int


def case(name: str) -> Case:
    """Load one of `MODELS`."""
    if name.startswith("fashion"):
        data = load("fashion_mnist/data")
        x, y = data.load(data.find_root(), "train")
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:IMAGES]
        test = data.Batches(*data.load(data.find_root(), "t10k"), 500)
        if name == "fashion/resnet14":
            model = load("fashion_mnist/model").resnet14()
            weights = SPECS / "fashion_mnist/resnet14.safetensors"
        else:
            model, weights = fashion_mobilenet(), WEIGHTS
        epochs, train = (1, 4), (x[chosen], y[chosen])
    else:
        data = load("digits/data")
        x, y = data.load()
        train, test = (x[: data.TRAIN], y[: data.TRAIN]), data.digits()["eval"]
        folder, file = ("digits", "resnet8") if "resnet" in name else ("mobilenet_qat", "mobilenet")
        model = getattr(load(f"{folder}/model"), file)()
        weights, epochs = SPECS / folder / f"{file}.safetensors", (3, 12)
    model.load_state_dict(load_file(weights))
    return Case(model.eval(), train, list(test), *epochs)


@torch.no_grad()
def accuracy(model: nn.Module, test: Sequence[Batch]) -> float:
    """Return the per cent of right classes."""
    model.eval()
    right = sum(int((model(*x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / sum(len(y) for _, y in test)


def measure(name: str, options: argparse.Namespace, found: list[Row]) -> None:
    """Run the recipes asked for that a network has no row of, once for each seed."""
    done = {row["recipe"]: row for row in found if row["network"] == name}
    given = case(name)
    recipes = {
        recipe: steps
        for recipe, steps in rows(given.short, given.long).items()
        if recipe not in done and any(fnmatchcase(recipe, each) for each in options.recipes)
    }
    if not recipes:
        return
    program = fxc.capture(given.model, (given.train[0][:2],), dynamic={"x": {0: "batch"}})
    if "float32" not in done:
        score = accuracy(program.module, given.test)
        done["float32"] = _row(name, "float32", f"{score:.2f}", "", "", "", "100", "")
        _write(found, done["float32"])
    original = float(done["float32"]["accuracy"])
    for recipe, steps in recipes.items():
        _write(found, _measured(name, recipe, steps, given, program, original, options.seeds))


def _measured(
    name: str,
    recipe: str,
    steps: list[Step],
    given: Case,
    program: fxc.Program,
    original: float,
    seeds: int,
) -> Row:
    """Return the row of one recipe."""
    x, y = given.train
    epochs = sum(int(step.get("epochs", 0)) for step in steps)
    scores, part, start = [], 0.0, time.process_time()
    for seed in range(seeds if epochs else 1):
        splits: dict[str, Any] = {
            "train": Shuffled(x, y),
            "calibration": [((x[:256],), y[:256])],
        }
        torch.manual_seed(seed)
        result = fxc.compress(program, list(steps), data=splits, seed=seed)
        scores.append(accuracy(result.module, given.test))
        part = cost(result.program).bytes / cost(program).bytes
    seconds = (time.process_time() - start) / len(scores)
    mean = statistics.mean(scores)
    spread = f"{min(scores):.2f} to {max(scores):.2f}" if len(scores) > 1 else ""
    return _row(
        name, recipe, f"{mean:.2f}", f"{mean - original:+.2f}", spread, str(epochs or ""),
        f"{100 * part:.1f}", f"{seconds:.0f}",
    )  # fmt: skip


def _row(*cells: str) -> Row:
    return dict(zip(HEADER, cells, strict=True))


def _write(found: list[Row], *new: Row) -> None:
    """Add rows, and write the table in the order of networks and recipes."""
    for row in new:
        print(" | ".join(row.values()), flush=True)
    found += new
    recipes = ["float32", *rows(1, 1)]
    found.sort(key=lambda row: (MODELS.index(row["network"]), recipes.index(row["recipe"])))
    with contextlib.redirect_stdout(None):
        write_table(
            NAME,
            "Accuracy of trained quantization",
            "python -m benchmarks.quantize.qat",
            HEADER,
            [list(row.values()) for row in found],
            notes=NOTES,
        )


def main() -> None:
    """Measure what is missing of what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--recipes", nargs="*", default=["*"], help="globs over their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in options.models:
        measure(name, options, found)
    _write(found)


if __name__ == "__main__":
    main()
