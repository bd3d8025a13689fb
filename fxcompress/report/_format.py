"""Numbers as people read them: the Jinja filters and tests of the report's templates."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FILTERS", "TESTS", "binary", "exponent", "quantity", "seconds", "si", "signed_percent"]


def thousands(value: int) -> str:
    """Return `25,557,032`."""
    return f"{value:,}"


def si(value: float) -> str:
    """Return a count with an SI prefix: `4.09 G`, `335.7 M`, `902`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}"
    return f"{value:g}"


def binary(value: float) -> str:
    """Return bytes in binary units: `97.5 MiB`, `640 B`."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:g} B"


def _three(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def quantity(value: float | None) -> str:
    """Return a number in three or four significant digits, prefixed where large."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "NaN")
    if abs(value) >= 1000:
        return si(value)
    return f"{value:.3g}"


def exponent(value: float) -> str:
    """Return `4.1e-07`."""
    return "0" if value == 0 else f"{value:.1e}"


def seconds(value: float) -> str:
    """Return `3.8 s`, `120 ms` or `2 min 5 s`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def metric(value: float) -> str:
    """Return a metric in four significant digits."""
    return f"{value:.4g}"


def signed_percent(before: float, after: float) -> str:
    """Return a change as `−75.0%`; `unchanged` where there is none."""
    if before == after:
        return "unchanged"
    if not before:
        return f"was {before:g}"
    change = (after - before) / before * 100
    return f"{'−' if change < 0 else '+'}{abs(change):.1f}%"


def error_grade(value: float | None) -> str:
    """Return the colour of an error relative to the output's range."""
    if value is None:
        return ""
    if value <= 1e-4:
        return "good"
    return "warn" if math.isfinite(value) else "bad"


def shorten(text: str, length: int) -> str:
    """Return the end of a long name, which tells it apart, behind an ellipsis."""
    return text if len(text) <= length else "…" + text[1 - length :]


def markdown(text: str) -> str:
    """Escape what Markdown tables and HTML would read as markup."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", escaped).replace("\n", " ")


def pixels(value: float) -> str:
    """Return a coordinate with one decimal."""
    return f"{value:.1f}"


FILTERS: Mapping[str, Callable[..., Any]] = {
    "binary": binary,
    "change": signed_percent,
    "error_grade": error_grade,
    "exponent": exponent,
    "md": markdown,
    "metric": metric,
    "px": pixels,
    "quantity": quantity,
    "seconds": seconds,
    "shorten": shorten,
    "si": si,
    "thousands": thousands,
}
TESTS: Mapping[str, Callable[..., bool]] = {"finite": math.isfinite}
