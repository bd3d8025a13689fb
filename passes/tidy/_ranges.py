"""Where numbers lie in the range of a float format: how near its end, how many near its zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import NumericsError
from passes._observe import observe

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["Extent", "extents", "finite_extent", "too_large", "too_small"]


@dataclass
class Extent:
    """What was seen of a tensor.

    Attributes:
        smallest: The smallest normal number of the format.
        largest: The largest magnitude.
        small: How many numbers that are not 0 lie below `smallest`.
        count: How many numbers are not 0.
    """

    smallest: float
    largest: float = 0.0
    small: int = 0
    count: int = 0

    def see(self, result: Any) -> None:
        """Take in the floats of a node's result."""
        for value in pytree.tree_leaves(result):
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
                continue
            size = value.detach().abs()
            self.largest = max(self.largest, float(size.amax()))
            self.count += int((size > 0).sum())
            self.small += int(((size > 0) & (size < self.smallest)).sum())

    @property
    def share(self) -> float:
        """The share of numbers that lose precision, of those that are not 0."""
        return self.small / self.count if self.count else 0.0


def finite_extent(name: str, tensor: Tensor, smallest: float) -> Extent:
    """Return the extent of a weight.

    Raises:
        NumericsError: It holds a NaN or an infinity.
    """
    found = Extent(smallest)
    found.see(tensor)
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(
            f"a NaN or an infinity in {name}",
            hint="check the weights that the model was given",
            where=name,
        )
    return found


def extents(
    program: Program, nodes: Iterable[fx.Node], context: Context, samples: int, smallest: float
) -> dict[fx.Node, Extent]:
    """Return what nodes give on so many samples of the calibration split."""
    found = {node: Extent(smallest) for node in nodes}
    batches = context.samples("calibration", samples)
    observe(program, batches, {node: extent.see for node, extent in found.items()})
    return found


def too_large(what: str, extent: Extent, limit: float, margin: float) -> str | None:
    """Return why a tensor may overflow, with its numbers, or None.

    Args:
        what: Which tensor.
        extent: What was seen of it.
        limit: The largest number of the format.
        margin: How many times larger than what was seen the limit must be.
    """
    if extent.largest <= limit / margin:
        return None
    beyond = f", less than {margin:g} times that" if extent.largest <= limit else ""
    return f"{what} reaches {extent.largest:.4g}, and float16 ends at {limit:.0f}{beyond}"


def too_small(what: str, extent: Extent, allowed: float, format: str) -> str | None:
    """Return why a tensor loses too much near 0, with its numbers, or None."""
    if extent.share <= allowed:
        return None
    return (
        f"{extent.share:.1%} of {what} are below {extent.smallest:.2g}, where {format} loses "
        f"precision ({allowed:.1%} are allowed)"
    )
