"""The digits of the example `digits`, with training images shifted about for the fine-tuning."""

from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((images [batch, 1, 8, 8],), classes [batch])`."""


def neighbour() -> ModuleType:
    """Load `../digits/data.py` by its place; the examples are no package."""
    file = Path(__file__).parents[1] / "digits" / "data.py"
    spec = spec_from_file_location("specs_digits_data", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(
    batch: int = 64, calibration: int = 256, copies: int = 4, seed: int = 0
) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `train`, `calibration` (of train) and `eval` (597).

    `train` holds the 1,200 training images and further copies of them, each copy of an image
    shifted by up to one pixel each way.
    """
    data = neighbour()
    images, classes = data.load()
    images, classes, test = images[: data.TRAIN], classes[: data.TRAIN], data.digits()["eval"]
    generator = torch.Generator().manual_seed(seed)
    moved = [images, *(shift(images, generator) for _ in range(copies - 1))]
    return {
        "train": data.batches(torch.cat(moved), classes.repeat(copies), batch),
        "calibration": data.batches(images[:calibration], classes[:calibration], batch),
        "eval": test,
    }


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image `[n, 1, 8, 8]` by up to one pixel each way, filling with background."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    places = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # [n, 1, 3, 3, 8, 8]
    down, right = torch.randint(0, 3, (2, len(images)), generator=generator)
    return places[torch.arange(len(images)), :, down, right].contiguous()
