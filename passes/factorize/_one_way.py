"""What the options of a factorisation owe: exactly one way to choose ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["check_one_way"]


def check_one_way(ways: Mapping[str, bool], table: str, numbers: Iterable[int]) -> None:
    """Check that one way is given, or a table of numbers by layer alone, which may go with it.

    Args:
        ways: The options that choose for all layers -> whether they are given.
        table: The option that names layers.
        numbers: All numbers in it.

    Raises:
        ValueError: None or several are given, or a number is below 1.
    """
    found = list(numbers)
    if sum(ways.values()) > 1 or not (any(ways.values()) or found):
        *most, last = ways
        raise ValueError(f"give exactly one of {', '.join(most)} and {last}, or {table} alone")
    if any(number < 1 for number in found):
        raise ValueError(f"{table} must be at least 1")
