"""Amounts as people write them: `50%`, `20MiB`, `2.5G`, `12ms`, `1pt`.

An Amount is relative (a share of the original's figure) or absolute (bytes, a count, seconds).
The pydantic types below are for specs and for the options of passes alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

__all__ = ["Amount", "Count", "Drop", "Duration", "Percent", "Size", "parse_amount"]

_NUMBER = re.compile(r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*")

_BYTES = {
    "B": 1.0,
    **{f"{p}B": 1000.0**i for i, p in enumerate("kMGT", 1)},
    "KB": 1000.0,
    **{f"{p}iB": 1024.0**i for i, p in enumerate("KMGT", 1)},
    "kiB": 1024.0,
}
_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_POINTS = {"": 1.0, "pt": 1e-2}


@dataclass(frozen=True)
class Amount:
    """A share of the original (`relative`, value 0.5 for 50 %) or an absolute value.

    Absolute values are in bytes, counts or seconds. `text` is what was written; it takes no part
    in comparison.
    """

    value: float
    relative: bool
    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Amount) and (self.value, self.relative) == (
            other.value,
            other.relative,
        )

    def __hash__(self) -> int:
        return hash((self.value, self.relative))

    def __str__(self) -> str:
        return self.text

    def of(self, original: float) -> float:
        """Return the absolute amount, given the original's figure in the same unit."""
        return self.value * original if self.relative else self.value


def parse_amount(
    raw: object, units: Mapping[str, float], what: str, *, percent: bool = True
) -> Amount:
    """Read an amount written with one of `units` (name -> factor) or, if allowed, as a percentage.

    Raises:
        ValueError: It is not a number with such a unit, is negative, or is not finite.
    """
    if isinstance(raw, Amount):
        return raw
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"should be {what}")
    match = _NUMBER.fullmatch(str(raw))
    if match is None:
        raise ValueError(f"should be {what}")
    number, unit = float(match[1]), match[2]
    if unit == "%" and percent:
        factor = 0.01
    elif unit in units:
        factor = units[unit]
    elif not unit:
        raise ValueError(f"needs a unit: should be {what}")
    else:
        close = next((u for u in units if u.lower() == unit.lower()), None)
        also = f" (did you mean `{close}`?)" if close else ""
        raise ValueError(f"unknown unit `{unit}`{also}: should be {what}")
    if not 0 <= number < float("inf"):
        raise ValueError(f"should not be negative or infinite: should be {what}")
    return Amount(number * factor, unit == "%", str(raw).strip())


def _reader(
    units: Mapping[str, float], what: str, *, percent: bool = True
) -> Callable[[object], Amount]:
    return lambda raw: parse_amount(raw, units, what, percent=percent)


def _fraction(raw: object) -> float:
    what = "a percentage such as 50%, or a fraction such as 0.5"
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        value = float(raw)
        if value > 1:
            raise ValueError(f"{raw} is more than 1: write {raw}% for a percentage")
    else:
        value = parse_amount(raw, {"": 1.0}, what).value
    if not 0 <= value <= 1:
        raise ValueError(f"should be between 0% and 100%: should be {what}")
    return value


_WRITTEN = PlainSerializer(lambda amount: amount.text, return_type=str)


def _json(pattern: str, example: str, *, number: bool = False) -> Any:
    text = {"type": "string", "pattern": pattern, "examples": [example]}
    return WithJsonSchema({"anyOf": [text, {"type": "number", "minimum": 0}]} if number else text)


_NUM = r"^\s*\+?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*"

Percent: TypeAlias = Annotated[
    float, PlainValidator(_fraction), _json(_NUM + r"%?\s*$", "50%", number=True)
]
"""A fraction from 0 to 1, written `50%` or `0.5`."""

Size: TypeAlias = Annotated[
    Amount,
    PlainValidator(_reader(_BYTES, "a size such as 20MiB, or a percentage such as 25%")),
    _WRITTEN,
    _json(_NUM + r"([kKMGT]i?B|B|%)\s*$", "20MiB"),
]
"""Bytes: `20MiB`, `3.5MB`, or a share of the original's size."""

Count: TypeAlias = Annotated[
    Amount,
    PlainValidator(_reader(_COUNTS, "a count such as 2.5G, or a percentage such as 50%")),
    _WRITTEN,
    _json(_NUM + r"[kKMGBT%]?\s*$", "50%", number=True),
]
"""MACs, parameters, nodes: `2.5G`, `175000`, or a share of the original's."""

Duration: TypeAlias = Annotated[
    Amount,
    PlainValidator(_reader(_SECONDS, "a time such as 12ms, or a percentage such as 80%")),
    _WRITTEN,
    _json(_NUM + r"(s|ms|us|µs|%)\s*$", "12ms"),
]
"""Seconds: `12ms`, or a share of the original's latency."""

Drop: TypeAlias = Annotated[
    Amount,
    PlainValidator(_reader(_POINTS, "a percentage of the original's metric such as 1%, or 0.3pt")),
    _WRITTEN,
    _json(_NUM + r"(%|pt)?\s*$", "1%", number=True),
]
"""A loss of metric: `1%` of the original's value, `0.3pt` (0.003), or an absolute number."""
