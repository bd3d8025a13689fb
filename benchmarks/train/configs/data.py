"""A few labelled images in an order that is drawn beforehand, so that every loop sees the same."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((images [batch, 1, h, w],), classes [batch])`."""

SPECS = Path(__file__).parents[3] / "specs"


def fashion(
    labelled: int = 500,
    epochs: int = 10,
    batch: int = 50,
    seed: int = 0,
    choice: int = 1,
    test: int = 5000,
) -> Mapping[str, Sequence[Batch]]:
    """Return `train`, some images of Fashion-MNIST `epochs` times over, and `eval`.

    `choice` is the seed that says which images are labelled, `seed` the one of their order.
    """
    images, classes = _fashion("train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(choice))
    x, y = (each[:test].split(500) for each in _fashion("t10k"))
    return {
        "train": drawn(images, classes, chosen[:labelled], epochs, batch, seed),
        "eval": [((part,), target) for part, target in zip(x, y, strict=True)],
    }


def digits(
    labelled: int = 150, epochs: int = 60, batch: int = 50, seed: int = 0, choice: int = 1
) -> Mapping[str, Sequence[Batch]]:
    """Return `train`, some of scikit-learn's digits `epochs` times over, and `eval` (597)."""
    data = _beside("digits/data.py")
    images, classes = data.load()
    chosen = torch.randperm(data.TRAIN, generator=torch.Generator().manual_seed(choice))
    return {
        "train": drawn(images, classes, chosen[:labelled], epochs, batch, seed),
        "eval": data.batches(images[data.TRAIN :], classes[data.TRAIN :], 597),
    }


def drawn(
    images: Tensor, classes: Tensor, chosen: Tensor, epochs: int, batch: int, seed: int
) -> Sequence[Batch]:
    """Return all batches of a training, each epoch in an order of its own; only whole batches."""
    order = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(epochs):
        mixed = chosen[torch.randperm(len(chosen), generator=order)]
        made += [part for part in mixed.split(batch) if len(part) == batch]
    return [((images[index],), classes[index]) for index in made]


@cache
def _fashion(part: str) -> tuple[Tensor, Tensor]:
    data = _beside("fashion_mnist/data.py")
    images, classes = data.load(data.find_root(), part)
    return images, classes


def _beside(path: str) -> ModuleType:
    file = SPECS / path
    spec = spec_from_file_location(f"specs_{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
