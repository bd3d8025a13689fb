"""Axes in another order: the same function, with channels at other places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.axes import Axis, analyze, positions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.prune._sparsity.decision import AxisOrder

__all__ = ["apply_orders", "ordered_tensors", "reordered"]


def apply_orders(
    rewriter: GraphRewriter, orders: Iterable[AxisOrder], arrays: Mapping[str, Any]
) -> None:
    """Put every place of the axes into their orders."""
    for name, tensor in ordered_tensors(rewriter.program, orders, arrays).items():
        rewriter.set_tensor(name, tensor, tied=True)


def ordered_tensors(
    program: Program, orders: Iterable[AxisOrder], arrays: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors that orders change, by name, as they are then."""
    orders = tuple(orders)
    if not orders:
        return {}
    analysis = analyze(program)
    chosen = {
        analysis.axis(each.axis): torch.as_tensor(arrays[f"{each.axis}.order"]) for each in orders
    }
    return reordered(program, chosen)


def reordered(program: Program, orders: Mapping[Axis, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in which the axes occur, by name, with their indices in other orders.

    Args:
        program: What was analysed.
        orders: Axis -> the old index at each new one.
    """
    state = program.state()
    found: dict[str, Tensor] = {}
    for axis, order in orders.items():
        for place in axis.places:
            tensor = found.get(place.tensor, state[place.tensor].detach())
            where = positions(place.term, axis)
            index = np.arange(tensor.shape[place.dim])
            index[where] = where[order.numpy()]
            at = torch.from_numpy(index).to(tensor.device)
            found[place.tensor] = tensor.index_select(place.dim, at)
    return found
