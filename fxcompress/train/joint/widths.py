"""Which dimension of a tapped tensor is its width, and which ones are places."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxcompress.axes import Analysis
from fxcompress.axes.terms import axes_of

__all__ = ["width_of"]


def width_of(analysis: Analysis, node: fx.Node, what: str) -> int | None:
    """Return the dim of a node's value that its layers' weights make: channels, or hidden width.

    It is the dim with an axis that a weight's rows or columns run over; the last of several, so
    that of `[batch, heads, seq, width]` the heads are places. Without one, dim 1 of feature maps
    and else the last. Attention probabilities have none.
    """
    rank = node.meta["val"].dim()
    if what == "attention" or rank < 2:
        return None
    made = list(_made(analysis, node))
    if made:
        return made[-1]
    return 1 if rank > 3 else rank - 1


def _made(analysis: Analysis, node: fx.Node) -> Iterator[int]:
    for dim, term in enumerate(analysis.terms(node) or ()):
        size = node.meta["val"].shape[dim]
        if dim == 0 or isinstance(size, torch.SymInt):
            continue
        if any(place.role in ("out", "in") for axis in axes_of(term) for place in axis.places):
            yield dim
