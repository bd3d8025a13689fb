"""Search the share of the work whose result is measured to be as quick as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["TRIES", "Timed", "search"]

TOLERANCE: Final = 0.05
"""How far below the target a measurement may be, as a part of it."""

TRIES: Final = 12
"""Short measurements of one search."""

LONG_TRIES: Final = 6
"""Long measurements of one search, once short ones were found to be off."""


class Timed(NamedTuple):
    """A candidate: its share of the work, and the share of the time that was measured."""

    share: float
    ratio: float


_WHOLE: Final = Timed(1.0, 1.0)


def search(
    wanted: float,
    low: float,
    measure: Callable[[float], float],
    confirm: Callable[[float], float],
    tries: int = TRIES,
) -> Timed:
    """Return the candidate closest below what is wanted, its time confirmed.

    The one that wins is measured again by `confirm`. If that says otherwise (too slow, or that
    there is room), short measurements were off, and the search goes on with long ones: below the
    candidate or above it.

    Args:
        wanted: Share of the time, below 1.
        low: The least share of the work.
        measure: Share of the work -> share of the time.
        confirm: The same, measured for longer.
        tries: How many short measurements.

    Returns:
        What `confirm` said of the winner; slower than wanted only if the least share is.
    """
    winner = _bracketed(wanted, Timed(low, measure(low)), _WHOLE, measure, tries - 1)
    sure = Timed(winner.share, confirm(winner.share))
    if sure.ratio > wanted:
        least = sure if sure.share == low else Timed(low, confirm(low))
        return _bracketed(wanted, least, sure, confirm, LONG_TRIES)
    if _is_near(sure, wanted) or not _is_near(winner, wanted):
        return sure
    return _bracketed(wanted, sure, _WHOLE, confirm, LONG_TRIES)


def _bracketed(
    wanted: float, below: Timed, above: Timed, measure: Callable[[float], float], tries: int
) -> Timed:
    """Return the quick one of two candidates after moving both towards what is wanted.

    Time rises with work, but not in proportion, and is noisy: the next share is where a line
    between the two meets the middle of the tolerance, kept inside the bracket.
    """
    aim = wanted * (1 - TOLERANCE / 2)
    for _ in range(tries):
        if _is_near(below, wanted) or above.share - below.share < 1e-3:
            break
        part = (aim - below.ratio) / max(above.ratio - below.ratio, 1e-9)
        share = below.share + (above.share - below.share) * min(max(part, 0.1), 0.9)
        timed = Timed(share, measure(share))
        if timed.ratio <= wanted:
            below = timed
        else:
            above = timed
    return below


def _is_near(timed: Timed, wanted: float) -> bool:
    """Whether a time is within the tolerance of what is wanted, or above."""
    return timed.ratio >= wanted * (1 - TOLERANCE)
