"""The knapsack: take the least score away until costs that are products of sizes fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.prune._budget.cost import CostArrays

__all__ = ["Blocks", "Bound", "solve"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EAGER = 0.3
"""The part of what is above the bound that one round takes away, far from it."""

_NEAR = 0.02
"""From this part of the bound on, a round takes all that is above it."""


@dataclass(frozen=True)
class Bound:
    """A cost that must not be above a limit."""

    cost: CostArrays
    limit: float

    @property
    def slack(self) -> float:
        """The rounding error that is no violation."""
        return 1e-9 * max(abs(self.limit), 1.0)


@dataclass(frozen=True)
class Blocks:
    """What can be removed, in runs of one axis, each run in the order it must be removed.

    Attributes:
        start: First block of each axis, and the number of blocks at the end, `[axes + 1]`.
        axis: The axis of each block.
        width: How many indices it holds.
        loss: By how much the loss rises.
    """

    start: Ints
    axis: Ints
    width: Floats
    loss: Floats

    @classmethod
    def of(
        cls,
        scores: Sequence[Floats],
        allowed: Sequence[Ints],
        weights: Sequence[float] | None = None,
    ) -> Blocks:
        """Cut each axis into blocks.

        Args:
            scores: Per axis, the score of each index.
            allowed: Per axis, its sizes in descending order, its own first.
            weights: Per axis, what (removed score / kept score) is multiplied by to give the loss;
                None takes the removed score itself.
        """
        counts = np.array([len(sizes) - 1 for sizes in allowed], dtype=np.int64)
        widths, losses = [np.zeros(0)], [np.zeros(0)]
        for index, (values, sizes) in enumerate(zip(scores, allowed, strict=True)):
            if len(sizes) > 1:
                total = np.concatenate([np.zeros(1), np.cumsum(np.sort(values))])
                lost = total[len(values) - sizes]
                if weights is not None:
                    tiny = np.finfo(np.float64).tiny
                    lost = weights[index] * lost / np.maximum(total[-1] - lost, tiny)
                losses.append(np.diff(lost))
                widths.append(-np.diff(sizes).astype(np.float64))
        return cls(
            np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate(widths),
            np.concatenate(losses),
        )

    def removed(self, taken: Ints) -> Floats:
        """Return how many indices of each axis are gone with its first `taken` blocks."""
        gone = self._gone(taken)
        total = np.bincount(self.axis[gone], weights=self.width[gone], minlength=len(taken))
        return total.astype(np.float64, copy=False)

    def lost(self, taken: Ints) -> float:
        """Return the total loss."""
        return float(self.loss[self._gone(taken)].sum())

    def _gone(self, taken: Ints) -> NDArray[np.bool_]:
        rank = np.arange(len(self.axis)) - self.start[self.axis]
        return np.asarray(rank < taken[self.axis])


def solve(blocks: Blocks, whole: Floats, bounds: Sequence[Bound]) -> Ints:
    """Return how many blocks of each axis go so that all bounds hold at little loss.

    Cost is multilinear in the sizes, so that the price of a block depends on what else goes: each
    round orders blocks by loss per cost saved at the present sizes, takes some of the best, and
    looks again (a Lagrangian relaxation whose multiplier rises). What the last ones overshot is
    given back, and blocks are exchanged while that loses less.

    Args:
        blocks: What can go.
        whole: Sizes of the axes.
        bounds: What must hold; must be reachable with every block gone.
    """
    taken = _descend(blocks, whole, bounds)
    return _Exchange(blocks, whole, bounds, taken).run()


def _descend(blocks: Blocks, whole: Floats, bounds: Sequence[Bound]) -> Ints:
    taken = np.zeros(len(whole), dtype=np.int64)
    rank = np.arange(len(blocks.axis)) - blocks.start[blocks.axis]
    left = np.arange(len(blocks.axis))
    while True:
        sizes = whole - blocks.removed(taken)
        excess = [(b.cost.at(sizes) - b.limit) / max(abs(b.limit), 1.0) for b in bounds]
        worst = int(np.argmax(excess))
        bound = bounds[worst]
        above = bound.cost.at(sizes) - bound.limit
        if above <= bound.slack:
            return taken
        left = left[rank[left] >= taken[blocks.axis[left]]]
        saving = bound.cost.gradient(sizes)[blocks.axis[left]] * blocks.width[left]
        price = np.full(len(left), np.inf)
        np.divide(blocks.loss[left], saving, out=price, where=saving > 0)
        wanted = above if excess[worst] < _NEAR else above * _EAGER
        chosen = left[_cheapest(price, saving, wanted)]
        if not len(chosen):
            return taken
        # Blocks of an axis are in the order of their price, but for rounding: take the first ones.
        taken = taken + np.bincount(blocks.axis[chosen], minlength=len(whole))


def _cheapest(price: Floats, saving: Floats, wanted: float) -> Ints:
    """Return the cheapest blocks that together save `wanted`, at least one."""
    finite = np.flatnonzero(np.isfinite(price))
    order = finite[np.argsort(price[finite], kind="stable")]
    count = int(np.searchsorted(np.cumsum(saving[order]), wanted)) + 1
    return order[:count]


class _Exchange:
    """Gives blocks back and exchanges them while the bounds hold and the loss falls."""

    def __init__(self, blocks: Blocks, whole: Floats, bounds: Sequence[Bound], taken: Ints) -> None:
        self.blocks, self.whole, self.bounds = blocks, whole, bounds
        self.taken = taken.copy()
        self.sizes = whole - blocks.removed(taken)

    def run(self, rounds: int = 400, tries: int = 24) -> Ints:
        """Return the number of blocks of each axis that go in the end."""
        self._refill()
        for _ in range(rounds):
            if not any(self._swap(axis) for axis in self._dearest(tries)):
                break
            self._refill()
        return self.taken

    def _last(self) -> tuple[Floats, Floats]:
        """Return loss and width of the last block that is gone, per axis; loss -1 if none is."""
        index = self.blocks.start[:-1] + self.taken - 1
        return self._pick(index, self.taken > 0, -1.0)

    def _next(self) -> tuple[Floats, Floats]:
        """Return loss and width of the next block that could go, per axis; loss inf if none."""
        index = self.blocks.start[:-1] + self.taken
        return self._pick(index, index < self.blocks.start[1:], np.inf)

    def _pick(self, index: Ints, valid: NDArray[np.bool_], missing: float) -> tuple[Floats, Floats]:
        loss, width = np.full(len(index), missing), np.zeros(len(index))
        loss[valid] = self.blocks.loss[index[valid]]
        width[valid] = self.blocks.width[index[valid]]
        return loss, width

    def _room(self) -> list[float]:
        return [b.limit + b.slack - b.cost.at(self.sizes) for b in self.bounds]

    def _dearest(self, count: int) -> list[int]:
        loss, _ = self._last()
        order = np.argsort(-loss, kind="stable")[:count]
        return [int(axis) for axis in order if loss[axis] > 0]

    def _refill(self) -> None:
        """Give back the dearest block that fits, until none does."""
        while True:
            loss, width = self._last()
            fits = loss > 0
            for bound, room in zip(self.bounds, self._room(), strict=True):
                fits &= bound.cost.differences(self.sizes, width) <= room
            if not fits.any():
                return
            self._move(int(np.argmax(np.where(fits, loss, -1.0))), -1)

    def _swap(self, axis: int) -> bool:
        """Give back an axis's last block for cheaper ones of others; whether that was possible."""
        gained = float(self._last()[0][axis])
        self._move(axis, -1)
        moved: list[int] = []
        spent = 0.0
        while min(self._room()) < 0 and len(moved) < 4:
            other = self._replacement(axis, gained - spent)
            if other is None:
                break
            spent += float(self._next()[0][other])
            self._move(other, 1)
            moved.append(other)
        if min(self._room()) >= 0 and spent < gained * (1 - 1e-9):
            return True
        for other in reversed(moved):
            self._move(other, -1)
        self._move(axis, 1)
        return False

    def _replacement(self, axis: int, most: float) -> int | None:
        """Return whose next block to take: enough at the least loss, else the best per saving."""
        loss, width = self._next()
        enough = loss < most
        enough[axis] = False
        saved = np.zeros(len(loss))
        candidates = enough.copy()
        for bound, room in zip(self.bounds, self._room(), strict=True):
            if room < 0:
                saving = -bound.cost.differences(self.sizes, -width)
                enough &= saving >= -room
                saved += saving / -room
        if enough.any():
            return int(np.argmin(np.where(enough, loss, np.inf)))
        candidates &= saved > 0
        if not candidates.any():
            return None
        price = np.full(len(loss), np.inf)
        np.divide(loss, saved, out=price, where=candidates)
        return int(np.argmin(price))

    def _move(self, axis: int, blocks: int) -> None:
        """Take one block more (1) of an axis, or give its last one back (-1)."""
        index = self.blocks.start[axis] + self.taken[axis] - (blocks < 0)
        self.sizes[axis] -= blocks * self.blocks.width[index]
        self.taken[axis] += blocks
