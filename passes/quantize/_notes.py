"""What is unusual about the weights and ranges of a decision: named, counted, and no error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize._observers import Observer
    from passes.quantize._overrides import Formats
    from passes.quantize.static import WeightEntry

__all__ = ["activation_notes", "weight_notes"]

_SHOWN = 5


def weight_notes(
    program: Program,
    entries: Iterable[WeightEntry],
    formats: Formats,
    layers: Iterable[fx.Node],
    ids: Mapping[fx.Node, str],
) -> tuple[str, ...]:
    """Return notes on weights of zeros, and on those with fewer scales than asked for."""
    nodes = {ids[node]: node for node in layers}
    state = program.state()
    zeros, channels, whole = [], [], []
    for entry in entries:
        weight = state[entry.tensor].detach()
        per = formats.of_weight([nodes[name] for name in entry.layers]).per
        if per == "channel" and entry.axis is None:
            whole.append(entry.tensor)
        if weight.is_meta:
            continue
        rows = weight.movedim(entry.axis or 0, 0).flatten(1)
        dead = len(rows) - int(rows.any(dim=1).sum())
        if dead == len(rows):
            zeros.append(entry.tensor)
        elif dead and entry.axis is not None:
            channels.append(f"{entry.tensor} ({dead} of {len(rows)})")
    return _notes(
        ("weights of nothing but zeros get scale 1", zeros),
        ("output channels of nothing but zeros get scale 1", channels),
        ("one scale per tensor: groups of a transposed convolution share channels", whole),
    )


def activation_notes(observers: Mapping[str, Observer]) -> tuple[str, ...]:
    """Return notes on activations that are one number, by the paths of their quantizers."""
    constant = [
        f"{path} ({observer.constant:.4g})"
        for path, observer in observers.items()
        if observer.constant is not None
    ]
    return _notes(("activations are one number on all calibration data", constant))


def _notes(*found: tuple[str, list[str]]) -> tuple[str, ...]:
    lines = []
    for text, names in found:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} × {text}: {', '.join(names[:_SHOWN])}{more}")
    return tuple(lines)
