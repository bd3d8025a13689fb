"""Fit routers to how far a block moves each token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from passes._observe import observe
from passes.depth._blocks import Region, ends
from passes.depth._scores import all_of

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.depth.mixture_of_depths import MixtureOfDepthsOptions

__all__ = ["fitted"]

_RIDGE = 1e-3


class _Fit:
    """Least squares of log(‖y − x‖ / ‖x‖) on x, over tokens; kept as normal equations."""

    def __init__(self, path: str, width: int) -> None:
        self.path = path
        self.state: Tensor | None = None
        # One column more for the mean, which a router has no use for.
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.target = torch.zeros(width + 1, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def enter(self, state: Tensor) -> None:
        self.state = state

    def leave(self, made: Tensor) -> None:
        assert self.state is not None, "the entry comes before the exit"
        x = self.state.detach().double().cpu().flatten(0, 1)
        y = made.detach().double().cpu().flatten(0, 1)
        self.state = None
        moved = ((y - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)).clamp(min=1e-12).log()
        if not bool(moved.isfinite().all()):
            raise NumericsError(
                f"a NaN or an infinity in a hidden state of {self.path}",
                hint="check the data and the weights",
                where=self.path,
            )
        wide = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        self.gram += wide.T @ wide
        self.target += wide.T @ moved
        self.seen.append(x.float())

    def weight(self) -> Tensor:
        """Return the router's weight, scaled so that scores have a deviation of 1."""
        ridge = _RIDGE * self.gram.diagonal().mean()
        found = torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram)).double(),
                                   self.target)[:-1]  # fmt: skip
        scores = torch.cat([x @ found.float() for x in self.seen])
        weight: Tensor = found / scores.std().clamp(min=1e-6).double()
        return weight.float()

    def threshold(self, weight: Tensor, capacity: float) -> float:
        """Return the score that the share `capacity` of the tokens is above."""
        scores = torch.cat([x @ weight for x in self.seen]).sort().values
        return float(scores[min(round((1 - capacity) * len(scores)), len(scores) - 1)])


def fitted(
    program: Program,
    regions: Mapping[str, Region],
    options: MixtureOfDepthsOptions,
    context: Context,
) -> dict[str, Tensor]:
    """Return `PATH.weight` `[1, width]` and `PATH.threshold` `[1]` of each block's router.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A state holds a NaN or an infinity.
    """
    fits: dict[str, _Fit] = {}
    observers: dict[fx.Node, list[Callable[[Any], None]]] = defaultdict(list)
    for path, region in regions.items():
        entry, exit_ = ends(region)
        fits[path] = fit = _Fit(path, int(entry.meta["val"].shape[-1]))
        observers[exit_].append(fit.leave)
        observers[entry].append(fit.enter)
    batches = context.samples("calibration", options.calibration)
    observe(program, batches, {node: all_of(each) for node, each in observers.items()})
    found: dict[str, Tensor] = {}
    for path, fit in fits.items():
        weight = fit.weight()
        found[f"{path}.weight"] = weight.unsqueeze(0)
        found[f"{path}.threshold"] = torch.tensor([fit.threshold(weight, options.capacity)])
    return found
