"""Search an order of input channels whose groups of M keep the most under N:M.

Channels are swapped between groups, the best swap first, until none helps. Then a swap at random is
taken even if it loses something, the search goes on from there, and what it finds is kept if it is
better: a bounded regression (Pool & Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021).

The gain of every swap is known: with a group's other columns fixed, putting column c in place of
one of its own keeps, in each row, the N − 1 largest of the rest plus max(c, the N-th of the rest).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_part", "search_order"]

# Products of rows and pairs of columns that are looked at; more rows are sampled evenly.
_WORK = 1 << 31
_CHUNK = 1 << 26


def kept_part(scores: Tensor, keep: int, size: int) -> float:
    """Return which part of all scores `[rows, columns]` the `keep` highest of `size` hold."""
    best = torch.unflatten(scores, -1, (-1, size)).topk(keep, dim=-1).values
    return float(best.sum() / scores.sum().clamp(min=1e-30))


def search_order(scores: Tensor, keep: int, size: int, *, escapes: int, seed: int) -> Tensor:
    """Return the columns in an order that keeps more, int64 `[columns]`.

    Args:
        scores: `[rows, columns]`, not negative; the columns are a multiple of `size`.
        keep: N of N:M.
        size: M of N:M.
        escapes: How many random swaps to go on from.
        seed: Of the random swaps.
    """
    rows, columns = scores.shape
    limit = max(size, _WORK // columns**2)
    search = _Search(scores[:: -(-rows // limit)].double(), keep, size)
    search.descend()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(escapes if columns > size else 0):
        best = search.copy()
        one, other = torch.randperm(columns, generator=generator)[:2].tolist()
        search.swap(one, other)
        search.descend()
        if search.total <= best.total:
            search = best
    return search.order


class _Search:
    """An order under way.

    Attributes:
        order: Slot -> column; a group is `size` consecutive slots.
        scores: `[rows, slots]`.
        instead: `[slots, slots]`: what the first slot's group keeps with the second slot's column
            in its place; on the diagonal, what it keeps now.
    """

    def __init__(self, scores: Tensor, keep: int, size: int) -> None:
        columns = scores.shape[1]
        self.keep, self.size, self.scores = keep, size, scores.clone()
        self.order = torch.arange(columns)
        self.group = self.order // size
        self.instead = torch.zeros(columns, columns, dtype=scores.dtype)
        for group in range(columns // size):
            self._measure(group)

    def copy(self) -> _Search:
        made = object.__new__(_Search)
        made.__dict__ = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return made

    @property
    def total(self) -> float:
        """What all groups keep."""
        return float(self.instead.diagonal()[:: self.size].sum())

    def descend(self) -> None:
        """Swap the two columns with the largest gain until there is none."""
        least = 1e-9 * abs(self.total)
        now = self.instead.diagonal()
        same = self.group[:, None] == self.group[None, :]
        # Each swap raises what is kept, so this ends; the bound is for rounding alone.
        for _ in range(16 * len(self.order)):
            gain = self.instead + self.instead.T - now[:, None] - now[None, :]
            best = int(gain.masked_fill_(same, 0.0).argmax())
            one, other = divmod(best, len(self.order))
            if float(gain[one, other]) <= least:
                return
            self.swap(one, other)

    def swap(self, one: int, other: int) -> None:
        """Exchange the columns of two slots."""
        pair, turned = [one, other], [other, one]
        self.order[pair] = self.order[turned]
        self.scores[:, pair] = self.scores[:, turned]
        self.instead[:, pair] = self.instead[:, turned]
        for group in {one // self.size, other // self.size}:
            self._measure(group)

    def _measure(self, group: int) -> None:
        """Compute the rows of `instead` that belong to a group."""
        slots = range(group * self.size, (group + 1) * self.size)
        for slot in slots:
            rest = self.scores[:, [each for each in slots if each != slot]]
            best = rest.topk(self.keep, dim=1).values
            threshold = best[:, -1:]
            total = best[:, :-1].sum()
            self.instead[slot] = total + self._above(threshold)
        for slot in slots:
            self.instead[slot, slots.start : slots.stop] = self.instead[slot, slot]

    def _above(self, threshold: Tensor) -> Tensor:
        """Return the sum over rows of max(column, threshold), `[slots]`."""
        step = max(1, _CHUNK // self.scores.shape[1])
        parts = zip(torch.split(self.scores, step), torch.split(threshold, step), strict=True)
        sums = [torch.maximum(part, limit).sum(0) for part, limit in parts]
        return torch.stack(sums).sum(0)
