"""A plot of seconds over nodes as SVG: one line per family, axes from zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["plot"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 360, 56, 44, 16
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")


def plot(series: Mapping[str, Sequence[tuple[str, int, float]]]) -> str:
    """Draw points (label, nodes, seconds) per family; a straight line through zero is linear."""
    most = _round_up(max(nodes for points in series.values() for _, nodes, _ in points))
    longest = _round_up(max(seconds for points in series.values() for *_, seconds in points))

    def place(nodes: float, seconds: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 96) * nodes / most
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * seconds / longest
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="11" fill="#334155">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for step in range(5):
        x, y = place(most * step / 4, 0)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{most * step / 4:g}</text>')
        left, y = place(0, longest * step / 4)
        right, _ = place(most, 0)
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#e2e8f0"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{longest * step / 4:g} s</text>'
        )
    x, y = place(most / 2, 0)
    parts.append(f'<text x="{x}" y="{y + 34}" text-anchor="middle">nodes</text>')
    for colour, (family, points) in zip(_COLOURS, series.items(), strict=False):
        spots = [(label, *place(nodes, seconds)) for label, nodes, seconds in points]
        line = " ".join(f"{x},{y}" for _, x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"><title>{family}: {label}</title>'
            "</circle>"
            for label, x, y in spots
        ]
        label, x, y = spots[-1]
        parts.append(f'<text x="{x + 7}" y="{y + 4}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 4, 5, 8 or 10 times a power of ten."""
    power = 10.0 ** int(f"{value:e}".partition("e")[2])
    return next(power * step for step in (1, 2, 4, 5, 8, 10) if power * step >= value)
