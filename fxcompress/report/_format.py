"""Numbers as people read them: the Jinja filters and tests of the report's templates."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
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


def small(value: float) -> str:
    """Return a number of any size in two digits: `0.31`, `4.1e-07`, `0`."""
    if value == 0 or not math.isfinite(value):
        return quantity(value)
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 else exponent(value)


def shades(rows: Sequence[Sequence[float | None]]) -> list[list[str]]:
    """Return how dark each number of a table is, 0 to 0.9, by its logarithm.

    Six powers of ten below the largest are shades apart; what is less, or 0, is left white.
    """
    found = [v for row in rows for v in row if v is not None and v > 0 and math.isfinite(v)]
    top = math.log10(max(found, default=1.0))
    bottom = max(math.log10(min(found, default=1.0)), top - 6)

    def shade(value: float | None) -> str:
        if value is None or not value > 0:
            return "0"
        part = (math.log10(min(value, 10**top)) - bottom) / max(top - bottom, 1e-9)
        return f"{0.04 + 0.86 * min(max(part, 0.0), 1.0):.2f}"

    return [[shade(value) for value in row] for row in rows]


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
    "shades": shades,
    "shorten": shorten,
    "si": si,
    "small": small,
    "thousands": thousands,
}
TESTS: Mapping[str, Callable[..., bool]] = {"finite": math.isfinite}
