"""The candidates of the quality benchmark: one function from a trained model to a pruned one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ._peer import prune_with_peer, recipe
from ._quality_train import Split, macs

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["CANDIDATES", "Pruner"]

CALIBRATION = 256
SLACK = 1.02
"""A candidate may have this many times the MACs asked for: sizes are whole numbers."""

_PEER = ("L1", "L2", "BN scale", "Taylor", "random", "Taylor, global")
_TAYLOR = {"name": "taylor", "samples": CALIBRATION}
_REFIT = {"method": "least_squares", "samples": CALIBRATION}
_OURS: dict[str, dict[str, Any]] = {
    "budget, Taylor": {"criterion": _TAYLOR},
    "budget, L2": {"criterion": {"name": "l2"}},
    "budget, Taylor, refit": {"criterion": _TAYLOR, "compensation": _REFIT},
    "uniform, Taylor": {"criterion": _TAYLOR, "uniform": True},
    "uniform, L2": {"criterion": {"name": "l2"}, "uniform": True},
}
CANDIDATES = (*(f"Torch-Pruning: {name}" for name in _PEER), *(f"ours: {name}" for name in _OURS))
"""What is compared; the first word before the colon is the side."""


class Pruner:
    """Prunes copies of one trained model; what all candidates share is found once.

    Args:
        model: A trained model.
        data: Training data; the first images are for calibration.
        size: Side of the images in pixels.
    """

    def __init__(self, model: nn.Module, data: Split, size: int) -> None:
        self.model = model
        self.calibration = data[0][:CALIBRATION], data[1][:CALIBRATION]
        self.size = size
        self.cost = macs(model, size)
        self._ratios: dict[float, float] = {}

    @cached_property
    def program(self) -> Program:
        """The captured model."""
        import fxcompress as fxc

        return fxc.capture(copy.deepcopy(self.model), (self.calibration[0][:2],), verify=False)

    def prune(self, name: str, share: float) -> nn.Module | None:
        """Prune to at most `share` of the MACs; None where the criterion does not apply."""
        side, _, how = name.partition(": ")
        target = share * self.cost * SLACK
        if side == "ours":
            return self._ours(how, target)
        norms = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        if how == "BN scale" and not norms:
            return None
        if "global" in how:
            return self._attempt(how, self._peer_ratio(how, target))
        if share not in self._ratios:  # with one ratio for all layers no criterion changes the cost
            self._ratios[share] = self._peer_ratio("L1", target)
        return self._attempt(how, self._ratios[share])

    def _peer_ratio(self, how: str, target: float) -> float:
        """Find the smallest ratio whose result is cheap enough, by halving."""
        low, high = 0.0, 0.95
        for _ in range(7):
            ratio = (low + high) / 2
            candidate = self._attempt(how, ratio)
            fits = candidate is not None and macs(candidate, self.size) <= target
            low, high = (low, ratio) if fits else (ratio, high)
        return high

    def _attempt(self, how: str, ratio: float) -> nn.Module | None:
        candidate = copy.deepcopy(self.model)
        example = ((torch.randn(1, 1, self.size, self.size),), {})
        torch.manual_seed(0)
        try:
            _peer_step(how, candidate, self.calibration, example, ratio)
            macs(candidate, self.size)
        except (RuntimeError, IndexError, ValueError):
            return None  # a layer is empty
        return candidate

    def _ours(self, how: str, target: float) -> nn.Module:
        import fxcompress as fxc

        options = dict(_OURS[how])
        if options.pop("uniform", False):
            options["ratio"] = _uniform_ratio(self.program, target)
        else:
            options["budget"] = {"macs": int(target)}
        step = {"use": "prune.channels", "max_ratio": 0.95, **options}
        splits = {"calibration": list(_batches(self.calibration))}
        return fxc.compress(self.program, [step], data=splits).program.module


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


def _uniform_ratio(program: Program, target: float) -> float:
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
