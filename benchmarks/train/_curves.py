"""Curves of a metric over steps as SVG: a line per recipe, its range over seeds as a band."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

__all__ = ["curves"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 640, 392, 56, 16, 44, 66
_COLOURS = ("#64748b", "#2563eb", "#d97706", "#059669", "#9333ea")

Points = Sequence[tuple[int, Sequence[float]]]
"""Steps, and the metric of each seed after them."""


_Place = Callable[[float, float], tuple[float, float]]


def curves(series: Mapping[str, Points], marks: Mapping[str, float], least: float) -> str:
    """Draw lines of means; `marks` are named levels, `least` is where the metric's axis begins.

    What is lower than `least` is cut off.
    """
    last = max(steps for points in series.values() for steps, _ in points)
    most = max([*marks.values(), *(max(each) for points in series.values() for _, each in points)])
    top = least + 1.04 * (most - least)

    def place(steps: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * steps / last
        share = (max(value, least) - least) / (top - least)
        return round(x, 1), round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="11" fill="#334155">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_axes(place, last, least, top),
    ]
    for name, level in marks.items():
        x, y = place(0, level)
        end, _ = place(last, level)
        parts.append(f'<path d="M{x} {y}H{end}" stroke="#94a3b8" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x + 4}" y="{y - 4}">{name}</text>')
    for index, (colour, (name, points)) in enumerate(zip(_COLOURS, series.items(), strict=False)):
        parts += _line(colour, [(steps, each) for steps, each in points], place)
        x, y = _LEFT + index % 2 * (_WIDTH - _LEFT) // 2, 14 + 17 * (index // 2)
        parts.append(f'<path d="M{x} {y - 4}h16" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 21}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(place: _Place, last: int, least: float, top: float) -> list[str]:
    parts = []
    for part in range(5):
        x, y = place(last * part / 4, least)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{last * part / 4:g}</text>')
        left, y = place(0, least + (top - least) * part / 4)
        right, _ = place(last, least)
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#e2e8f0"/>')
        value = least + (top - least) * part / 4
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.1f} %</text>')
    x, y = place(last / 2, least)
    return [*parts, f'<text x="{x}" y="{y + 34}" text-anchor="middle">steps</text>']


def _line(colour: str, points: Points, place: _Place) -> list[str]:
    upper = [place(steps, max(each)) for steps, each in points]
    lower = [place(steps, min(each)) for steps, each in reversed(points)]
    middle = [place(steps, sum(each) / len(each)) for steps, each in points]
    band, line = (" ".join(f"{x},{y}" for x, y in path) for path in (upper + lower, middle))
    return [
        f'<polygon points="{band}" fill="{colour}" opacity="0.15"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
    ]
