"""Which experts become one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["led", "linked"]


def led(similarity: Tensor, usage: Tensor, count: int) -> list[list[int]]:
    """Return groups of a leader and those most alike to it; the `count` most used experts lead.

    Li et al., 2023, arXiv:2310.01334, section 3.2.
    """
    order = sorted(range(len(usage)), key=lambda each: (-float(usage[each]), each))
    groups = {leader: [leader] for leader in sorted(order[:count])}
    leaders = list(groups)
    for expert in sorted(order[count:]):
        alike = similarity[expert, leaders]
        groups[leaders[int(alike.argmax())]].append(expert)
    return list(groups.values())


def linked(similarity: Tensor, count: int) -> list[list[int]]:
    """Return groups by average linkage: the two that are most alike on average become one."""
    groups = [[each] for each in range(len(similarity))]
    while len(groups) > count:
        pairs = [
            (_mean(similarity, a, b), -i, -j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups[:i])
        ]
        _, i, j = max(pairs)
        groups[-j] = sorted([*groups[-j], *groups.pop(-i)])
    return sorted(groups)


def _mean(similarity: Tensor, a: Sequence[int], b: Sequence[int]) -> float:
    return float(similarity[list(a)][:, list(b)].mean())
