"""Accuracy of trained quantization: int8 without training, then 4, 2, 1.58 and 1 bits with it.

python -m benchmarks.quantize.qat [--seeds 2] [--models digits/resnet8 …] [--images 10000]

The digits of scikit-learn (1,200 to train, 597 to test) with the ResNet-8 of specs/digits and the
MobileNet of specs/mobilenet_qat; Fashion-MNIST with the ResNet-14 of specs/fashion_mnist, trained
on a part of it. Every row starts from the shipped float32 weights; each seed shuffles the training
data anew. Learned rows keep the weights of the last epoch. Sizes are of tensors as stored. Rows of
networks that are not named stay as the last run left them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks._common import RESULTS, write_table
from benchmarks.quantize.dynamic import SPECS, load
from fxcompress.analysis import cost

Step = Mapping[str, Any]
Batch = tuple[tuple[Tensor, ...], Tensor]
NAME = "quantize_qat"
MODELS = ("digits/resnet8", "digits/mobilenet", "fashion/resnet14")
HEADER = ("network", "recipe", "accuracy", "to float32", "range", "epochs", "size %", "CPU s")
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


def case(name: str, images: int) -> Case:
    """Load `digits/resnet8`, `digits/mobilenet` or `fashion/resnet14`."""
    if name == "fashion/resnet14":
        data = load("fashion_mnist/data")
        x, y = data.load(data.find_root(), "train")
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:images]
        test = data.Batches(*data.load(data.find_root(), "t10k"), 500)
        model = load("fashion_mnist/model").resnet14()
        weights = SPECS / "fashion_mnist/resnet14.safetensors"
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


def measure(name: str, seeds: int, images: int) -> list[list[str]]:
    """Run every recipe on a network, once for each seed; return the rows of the table."""
    given = case(name, images)
    x, y = given.train
    program = fxc.capture(given.model, (x[:2],), dynamic={"x": {0: "batch"}})
    size = cost(program).bytes
    original = accuracy(program.module, given.test)
    found = [[name, "float32", f"{original:.2f}", "", "", "", "100", ""]]
    for recipe, steps in rows(given.short, given.long).items():
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
            part = cost(result.program).bytes / size
        seconds = (time.process_time() - start) / len(scores)
        mean = statistics.mean(scores)
        spread = f"{min(scores):.2f} to {max(scores):.2f}" if len(scores) > 1 else ""
        found.append([
            name, recipe, f"{mean:.2f}", f"{mean - original:+.2f}", spread, str(epochs or ""),
            f"{100 * part:.1f}", f"{seconds:.0f}",
        ])  # fmt: skip
        print(" | ".join(found[-1]), flush=True)
    return found


def _kept(models: Sequence[str]) -> list[list[str]]:
    """Return the rows that the last run wrote of other networks."""
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [list(row.values()) for row in rows if row["network"] not in models]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="of Fashion-MNIST, to train on")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = _kept(options.models)
    for name in options.models:
        found += measure(name, options.seeds, options.images)
    part = (
        f"Fashion-MNIST is trained on {options.images:,} of its images. "
        if any(row[0].startswith("fashion") for row in found)
        else ""
    )
    found.sort(key=lambda row: MODELS.index(row[0]))
    write_table(
        NAME,
        "Accuracy of trained quantization",
        "python -m benchmarks.quantize.qat",
        HEADER,
        found,
        notes="Per cent of right classes: mean and range over seeds, which shuffle the training "
        "data. Every row starts from the shipped float32 weights and is trained on labels and on "
        "the float32 network's answers (Adam, cosine). int4 and int2 are weights and activations "
        "of all layers; ternary and binary rows leave the first and last layer in float. "
        f"{part}Size: tensors as stored, of float32's.",
    )


if __name__ == "__main__":
    main()
