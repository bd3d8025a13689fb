"""The 1,797 hand-written digits that scikit-learn carries (UCI, CC BY 4.0), as a spec's splits."""

from collections.abc import Mapping, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((images [batch, 1, 8, 8],), classes [batch])`."""

TRAIN = 1200


def digits(batch: int = 64, calibration: int = 256) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `train` (1,200), `calibration` (of train) and `eval` (597)."""
    images, classes = load()
    return {
        "train": batches(images[:TRAIN], classes[:TRAIN], batch),
        "calibration": batches(images[:calibration], classes[:calibration], batch),
        "eval": batches(images[TRAIN:], classes[TRAIN:], batch),
    }


def load() -> tuple[Tensor, Tensor]:
    """Return images `[1797, 1, 8, 8]` in -1..1 and classes `[1797]`, in a fixed random order.

    scikit-learn keeps the writers in order: without the shuffle the test set would hold
    other hands than the training set, and in other shares.
    """
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], classes[order]


def batches(images: Tensor, classes: Tensor, size: int) -> Sequence[Batch]:
    """Cut a split into batches of `size`; the last one may be smaller."""
    return [((x,), y) for x, y in zip(images.split(size), classes.split(size), strict=True)]
