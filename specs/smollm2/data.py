"""Editorials of the New York Times, cut into windows of tokens."""

from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Batch = tuple[Mapping[str, Tensor], Tensor]
"""`({input_ids [batch, window]}, input_ids)`: what follows a token is the next one."""


def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def editorials(
    window: int = 512, evaluate: int = 18, calibration: int = 8, train: int = 64, batch: int = 2
) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `eval`, `calibration` and `train`, sized in windows and disjoint.

    The 498 editorials run on as one text of 119,000 tokens, an empty line between any two.
    """
    text = "\n\n".join(beside("../_vader.py").editorials())
    ids = torch.tensor(beside("model.py").tokenizer().encode(text).ids)
    return split(ids, window, {"eval": evaluate, "calibration": calibration, "train": train}, batch)


def split(
    ids: Tensor, window: int, sizes: Mapping[str, int], batch: int
) -> Mapping[str, Sequence[Batch]]:
    """Cut token ids `[n]` into windows and deal them to the splits in order."""
    needed = window * sum(sizes.values())
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens and the splits need {needed}")
    parts = ids[:needed].view(-1, window).split(list(sizes.values()))
    return {
        name: [({"input_ids": windows}, windows) for windows in part.split(batch)]
        for name, part in zip(sizes, parts, strict=True)
    }
