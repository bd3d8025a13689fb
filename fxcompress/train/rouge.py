"""ROUGE-L between sequences, and a filter that drops what is nearly there already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = ["Distinct", "rouge_l"]

BUCKETS: Final = 256
"""Columns of the counts that are compared first; tokens that share one only raise the bound."""


def rouge_l(one: Sequence[Hashable], other: Sequence[Hashable], least: float = 0.0) -> float:
    """Return the F1 of the longest common subsequence, 2 · LCS / (m + n), from 0 to 1.

    Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, with beta 1.
    Two empty sequences are alike. Values below `least` may come back as 0, which spares most
    subsequences.
    """
    total = len(one) + len(other)
    if total == 0:
        return 1.0
    if 2 * (Counter(one) & Counter(other)).total() < least * total:
        return 0.0  # a common subsequence is no longer than what the bags of tokens share
    return 2 * _common(one, other) / total


class Distinct:
    """Keeps sequences that are not nearly those kept before.

    Calling it with a sequence returns whether that is kept: whether ROUGE-L to each kept one is
    below `below`. Self-Instruct (Wang et al., 2023, arXiv:2212.10560, section 2.2) asks for less
    than 0.7.

    Args:
        below: ROUGE-L from which on two sequences count as one; above 1 only counts nothing.
    """

    def __init__(self, below: float) -> None:
        self.below = below
        self.kept: list[tuple[Hashable, ...]] = []
        self._counts = torch.zeros(64, BUCKETS, dtype=torch.int32)
        self._lengths = torch.zeros(64, dtype=torch.int32)

    def __call__(self, sequence: Sequence[Hashable]) -> bool:
        """Return whether a sequence is kept."""
        found = tuple(sequence)
        counts = _counted(found)
        if any(rouge_l(found, self.kept[place]) >= self.below for place in self._near(counts)):
            return False
        self._remember(found, counts)
        return True

    def _near(self, counts: Tensor) -> list[int]:
        """Return the places of kept sequences that may be near.

        No common subsequence is longer than what the bags of tokens share.
        """
        size = len(self.kept)
        shared = torch.minimum(self._counts[:size], counts).sum(1)
        total = self._lengths[:size] + counts.sum()
        return (2 * shared >= self.below * total).nonzero().flatten().tolist()

    def _remember(self, sequence: tuple[Hashable, ...], counts: Tensor) -> None:
        size = len(self.kept)
        if size == len(self._counts):
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._lengths = torch.cat([self._lengths, torch.zeros_like(self._lengths)])
        self._counts[size], self._lengths[size] = counts, counts.sum()
        self.kept.append(sequence)


def _counted(sequence: Sequence[Hashable]) -> Tensor:
    counts = torch.zeros(BUCKETS, dtype=torch.int32)
    for token, count in Counter(sequence).items():
        counts[hash(token) % BUCKETS] += count
    return counts


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for place, candidate in enumerate(other, 1):
            above = lengths[place]
            longest = max(above, lengths[place - 1])
            lengths[place] = diagonal + 1 if token == candidate else longest
            diagonal = above
    return lengths[-1]
