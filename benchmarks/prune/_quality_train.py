"""The data and the training loop of the quality benchmark: the same for every candidate."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["DATASETS", "Dataset", "accuracy", "fit", "load", "macs"]

_SPECS = Path(__file__).parents[2] / "specs"
BATCH = 64


@dataclass(frozen=True)
class Dataset:
    """How many images are trained and tested on, for how many epochs; `size` is in pixels."""

    size: int
    train: int
    test: int
    epochs: int
    tune_epochs: int


DATASETS = {
    "digits": Dataset(size=8, train=1200, test=597, epochs=25, tune_epochs=6),
    "Fashion-MNIST": Dataset(size=28, train=4000, test=4000, epochs=10, tune_epochs=3),
}
Split = tuple[Tensor, Tensor]


def load(name: str) -> tuple[Split, Split]:
    """Return the images and classes that are trained on, and those of the test set."""
    if name == "digits":
        images, classes = _spec("digits").load()
        count = DATASETS[name].train
        return (images[:count], classes[:count]), (images[count:], classes[count:])
    data = _spec("fashion_mnist")
    root = data.find_root()
    images, classes = data.load(root, "train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: DATASETS[name].train]
    test, labels = data.load(root, "t10k")
    count = DATASETS[name].test
    return (images[chosen], classes[chosen]), (test[:count], labels[:count])


def _spec(folder: str) -> Any:
    """Import the data module of a spec by its place: spec folders are no packages."""
    place = _SPECS / folder / "data.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{folder}_data", place)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(place)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while it is executed
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fit(model: nn.Module, data: Split, epochs: int, rate: float, seed: int) -> None:
    """Train in place: AdamW, one cycle of the rate, cross entropy, shuffled by the seed."""
    images, classes = data
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images[index]), classes[index]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of images whose class is right."""
    images, classes = data
    model.eval()
    parts = zip(images.split(500), classes.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(images)


def macs(model: nn.Module, size: int) -> int:
    """Count multiply-accumulates of one image with torch's flop counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(torch.zeros(1, 1, size, size))
    return int(counter.get_total_flops()) // 2
