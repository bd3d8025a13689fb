"""scikit-learn's 1,797 hand-written digits (UCI, CC BY 4.0) as sequences of 8 rows."""

from collections.abc import Mapping, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((rows [batch, 8, 8],), classes [batch])`."""

TRAIN = 1200


def rows(batch: int = 64) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `train` (1,200) and `eval` (597)."""
    images, classes = load()
    parts = {"train": slice(None, TRAIN), "eval": slice(TRAIN, None)}
    return {
        name: [
            ((x,), y)
            for x, y in zip(images[part].split(batch), classes[part].split(batch), strict=True)
        ]
        for name, part in parts.items()
    }


def load() -> tuple[Tensor, Tensor]:
    """Return rows `[1797, 8, 8]` in -1..1 and classes `[1797]`, in a fixed random order."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 8 - 1
    classes = torch.tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], classes[order]
