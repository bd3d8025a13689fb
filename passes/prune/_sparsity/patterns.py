"""Where zeros may go: anywhere up to a ratio or below a threshold, or M − N of every M."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from passes._layers.weights import Weight
from passes.prune._sparsity.ranking import count_of, lowest, lowest_of_all, lowest_of_groups
from passes.prune._sparsity.sparsegpt import Choose

__all__ = ["Anywhere", "NOfM", "Pattern"]


class Pattern(Protocol):
    """Chooses zeros from scores; entries that are zero for good have a score below all others."""

    def obstacle(self, weight: Weight, shape: torch.Size) -> str | None:
        """Return why a weight `[groups, out, taps, in]` cannot have such zeros, or None."""

    def zeros(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which entries become zero, by weight, from scores `[groups, out, columns]`."""

    def chooser(self, fixed: Tensor | None, block: int) -> tuple[Choose, int, int]:
        """Return how SparseGPT chooses, how many columns at a time, and its block of columns."""


@dataclass(frozen=True)
class Anywhere:
    """Unstructured zeros.

    Attributes:
        ratio: Part of the entries; None with a threshold.
        threshold: Scores below it are pruned.
        scope: What is ranked together: each output's row, each weight, or all weights.
    """

    ratio: float | None
    threshold: float | None = None
    scope: Literal["row", "layer", "global"] = "layer"

    def obstacle(self, weight: Weight, shape: torch.Size) -> str | None:
        """Return None: every weight can have zeros anywhere."""
        return None

    def zeros(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries with the lowest scores."""
        if self.ratio is None:
            limit = self.threshold or 0.0
            return {name: each < limit for name, each in scores.items()}
        if self.scope == "global":
            return lowest_of_all(scores, self.ratio)
        return {name: self._of_one(each, self.ratio) for name, each in scores.items()}

    def _of_one(self, scores: Tensor, ratio: float) -> Tensor:
        if self.scope == "row":
            return lowest(scores, count_of(ratio, scores.shape[-1]))
        flat = scores.flatten()
        return lowest(flat, count_of(ratio, flat.numel())).reshape(scores.shape)

    def chooser(self, fixed: Tensor | None, block: int) -> tuple[Choose, int, int]:
        """Choose in each block of columns; over all blocks the ratio of a matrix is exact."""
        ratio = self.ratio or 0.0

        def choose(scores: Tensor, start: int) -> Tensor:
            out, width = scores.shape[1:]
            done = count_of(ratio, out * start)
            count = count_of(ratio, out * (start + width)) - done
            chosen = lowest(_below(scores, fixed, start).flatten(1), count)
            return _with(chosen.reshape(scores.shape), fixed, start)

        return choose, block, block


@dataclass(frozen=True)
class NOfM:
    """At most `n` of `m` consecutive input channels, at one tap and for one output, are kept."""

    n: int
    m: int

    def obstacle(self, weight: Weight, shape: torch.Size) -> str | None:
        """Refuse a weight whose input channels cannot be divided into groups."""
        channels = shape[-1]
        if channels % self.m:
            per = " per group" if weight.form.groups > 1 else ""
            return f"its {channels} input channels{per} are no multiple of {self.m}"
        return None

    def zeros(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all but the `n` highest of every `m` entries."""
        return {name: lowest_of_groups(each, self.n, self.m) for name, each in scores.items()}

    def chooser(self, fixed: Tensor | None, block: int) -> tuple[Choose, int, int]:
        """Choose in each group of `m` columns when it is reached."""

        def choose(scores: Tensor, start: int) -> Tensor:
            chosen = lowest(_below(scores, fixed, start), self.m - self.n)
            return _with(chosen, fixed, start)

        return choose, self.m, max(1, block // self.m) * self.m


def _below(scores: Tensor, fixed: Tensor | None, start: int) -> Tensor:
    if fixed is None:
        return scores
    return scores.masked_fill(fixed[..., start : start + scores.shape[-1]], -1.0)


def _with(chosen: Tensor, fixed: Tensor | None, start: int) -> Tensor:
    return chosen if fixed is None else chosen | fixed[..., start : start + chosen.shape[-1]]
