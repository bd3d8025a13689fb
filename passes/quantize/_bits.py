"""Widths of integers as options. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

__all__ = ["Width"]


def _told_elsewhere(bits: object) -> object:
    if bits in (1, 1.58) and not isinstance(bits, bool):
        raise ValueError(
            "should be at least 2 (1 bit is quantize.binary's, 1.58 bits, three levels, are "
            "quantize.ternary's)"
        )
    return bits


Width = Annotated[int, BeforeValidator(_told_elsewhere)]
"""A number of bits; 1 and 1.58 are refused with the passes that have them."""
