"""The candidates of the quality benchmark: one function from a trained model to a pruned one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._peer import prune_with_peer, recipe
from ._quality_train import Split, macs

__all__ = ["CANDIDATES", "prune"]

CALIBRATION = 256
SLACK = 1.02
"""A candidate may have this many times the MACs asked for: sizes are whole numbers."""

_PEER = ("L1", "L2", "BN scale", "Taylor", "random", "Taylor, global")
_OURS: dict[str, dict[str, Any]] = {
    "budget, Taylor": {"criterion": {"name": "taylor"}},
    "budget, L2": {"criterion": {"name": "l2"}},
    "uniform, Taylor": {"criterion": {"name": "taylor"}, "uniform": True},
    "uniform, L2": {"criterion": {"name": "l2"}, "uniform": True},
}
CANDIDATES = (*(f"Torch-Pruning: {name}" for name in _PEER), *(f"ours: {name}" for name in _OURS))
"""What is compared; the first word before the colon is the side."""


def prune(name: str, model: nn.Module, data: Split, size: int, share: float) -> nn.Module | None:
    """Prune a copy to at most `share` of its MACs; None where the criterion does not apply.

    Args:
        name: One of `CANDIDATES`.
        model: A trained model.
        data: Training data; the first images are for calibration.
        size: Side of the images in pixels.
        share: The MACs that may be left, as a part of those of the model.
    """
    side, _, how = name.partition(": ")
    target = share * macs(model, size) * SLACK
    calibration = data[0][:CALIBRATION], data[1][:CALIBRATION]
    if side == "ours":
        return _ours(how, model, calibration, target)
    if how == "BN scale" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return None
    return _peer(how, model, calibration, size, target)


def _peer(
    how: str, model: nn.Module, calibration: Split, size: int, target: float
) -> nn.Module | None:
    """Prune by the smallest ratio whose result is cheap enough, found by halving.

    With one ratio for every layer the cost does not depend on the criterion, so that the ratio is
    found with the cheapest one.
    """
    example = ((torch.randn(1, 1, size, size),), {})

    def attempt(ratio: float, how: str) -> nn.Module | None:
        candidate = copy.deepcopy(model)
        torch.manual_seed(0)
        try:
            _peer_step(how, candidate, calibration, example, ratio)
            return candidate if macs(candidate, size) <= target else None
        except (RuntimeError, IndexError, ValueError):
            return None  # a layer is empty

    low, high = 0.0, 0.95
    for _ in range(7):
        ratio = (low + high) / 2
        fits = attempt(ratio, how if "global" in how else "L1") is not None
        low, high = (low, ratio) if fits else (ratio, high)
    return attempt(high, how)


def _peer_step(how: str, model: nn.Module, calibration: Split, example: Any, ratio: float) -> None:
    import torch_pruning as tp

    importance = tp.pruner.importance
    criterion, _, scope = how.partition(", ")
    scorer = {
        "L1": lambda: importance.GroupMagnitudeImportance(p=1),
        "L2": lambda: importance.GroupMagnitudeImportance(p=2),
        "BN scale": importance.BNScaleImportance,
        "Taylor": importance.GroupTaylorImportance,
        "random": importance.RandomImportance,
    }[criterion]()
    how_to = recipe(model, example, text=False)
    if criterion == "Taylor":
        model.zero_grad()
        F.cross_entropy(model(calibration[0]), calibration[1]).backward()
    prune_with_peer(model, example, how_to, ratio, importance=scorer, across=scope == "global")
    model.zero_grad(set_to_none=True)


def _ours(how: str, model: nn.Module, calibration: Split, target: float) -> nn.Module:
    import fxcompress as fxc

    options = dict(_OURS[how])
    uniform = options.pop("uniform", False)
    program = fxc.capture(copy.deepcopy(model), (calibration[0][:2],), verify=False)
    if uniform:
        options["ratio"] = _uniform_ratio(program, target)
    else:
        options["budget"] = {"macs": int(target)}
    splits = {"calibration": list(_batches(calibration))}
    step = {"use": "prune.channels", "max_ratio": 0.95, **options}
    return fxc.compress(program, [step], data=splits).program.module


def _uniform_ratio(program: Any, target: float) -> float:
    """Return the smallest ratio, in steps of half a percent, whose MACs are at most the target."""
    from fxcompress.axes import analyze

    analysis = analyze(program)
    for step in range(1, 190):
        sizes = dict(analysis.sizes)
        for axis in analysis.axes:
            sizes[axis.id] = max(1, axis.size - int(axis.size * step / 200 + 1e-9))
        if analysis.macs.at(sizes) <= target:
            return step / 200
    raise ValueError(f"no ratio leaves {target:.0f} MACs")


def _batches(data: Split, size: int = 64) -> Iterator[Any]:
    for images, classes in zip(data[0].split(size), data[1].split(size), strict=True):
        yield (images,), classes
