"""What the tests of the examples share: loading their factories, and counting right answers."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

SPECS = Path(__file__).parents[2] / "specs"


def load(path: str) -> ModuleType:
    file = SPECS / path
    spec = importlib.util.spec_from_file_location(f"example_{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def count_right(model: nn.Module, split: Iterable[Any]) -> tuple[int, int]:
    """Return how many samples a classifier gets right, and how many there are."""
    right = count = 0
    with torch.no_grad():
        for batch, target in split:
            right += int((model(*batch).argmax(1) == target).sum())
            count += len(target)
    return right, count
