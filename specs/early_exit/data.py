"""Fashion-MNIST with 5,000 training images held back, on which thresholds can be calibrated."""

from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HELD = 5_000


def neighbour() -> ModuleType:
    """Load `../fashion_mnist/data.py` by its place; the examples are no package."""
    file = Path(__file__).parents[1] / "fashion_mnist" / "data.py"
    spec = spec_from_file_location("specs_fashion_mnist_data", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fashion(
    root: str | None = None, batch: int = 250, train: int = 55_000, held: int = HELD
) -> Mapping[str, Sequence[Any]]:
    """Return `train` (the first 55,000), `calibration` (the last 5,000) and `eval` (10,000).

    What is calibrated on images that the model was trained on comes out too bold: there it is
    surer than on others.
    """
    data = neighbour()
    folder = Path(root) if root is not None else data.find_root()
    images, classes = data.load(folder, "train")
    test_images, test_classes = data.load(folder, "t10k")
    order = torch.randperm(55_000, generator=torch.Generator().manual_seed(0))[:train]
    return {
        "train": data.Batches(images[order], classes[order], batch, 0),
        "calibration": data.Batches(images[-HELD:][:held], classes[-HELD:][:held], batch),
        "eval": data.Batches(test_images, test_classes, batch),
    }
