"""`x[…]` and `x[…] = v` as selects, slices and scatters."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["Step", "basic_index", "scatter_index"]

_INTEGERS = (int, torch.SymInt)


@dataclass(frozen=True)
class Step:
    """One step of a basic index: it picks, cuts or inserts one dimension."""

    kind: Literal["select", "slice", "unsqueeze"]
    dim: int
    start: Any = None
    stop: Any = None
    step: Any = 1

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what the step gives on `tensor`."""
        if self.kind == "select":
            return tensor.select(self.dim, self.start)
        if self.kind == "unsqueeze":
            return tensor.unsqueeze(self.dim)
        cut = slice(self.start, self.stop, self.step)
        return tensor[(slice(None),) * self.dim + (cut,)]

    def write(self, recorder: Recorder, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """Write the node of the step's result."""
        if self.kind == "select":
            return recorder.emit(torch.select, (node, self.dim, self.start), {}, value)
        if self.kind == "unsqueeze":
            return recorder.emit(torch.unsqueeze, (node, self.dim), {}, value)
        cut = slice(self.start, self.stop, self.step if self.step != 1 else None)
        index = (slice(None),) * self.dim + (cut,)
        return recorder.emit(operator.getitem, (node, index), {}, value)

    def scatter(
        self, recorder: Recorder, old: fx.Node, new: fx.Node, value: torch.Tensor
    ) -> fx.Node:
        """Write the node that puts `new` back where the step took it from."""
        if self.kind == "select":
            return recorder.emit(torch.select_scatter, (old, new, self.dim, self.start), {}, value)
        if self.kind == "unsqueeze":
            return recorder.emit(torch.squeeze, (new, self.dim), {}, value)
        args = (old, new, self.dim, self.start, self.stop)
        return recorder.emit(
            torch.slice_scatter, args if self.step in (1, None) else (*args, self.step), {}, value
        )


def basic_index(tensor: torch.Tensor, index: Any) -> list[Step] | None:
    """Return the steps of an index of integers, slices, `None` and `…`; None for any other."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not _is_basic(item) for item in items):
        return None
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    rest = tensor.dim() - used
    if Ellipsis not in items:
        items.append(Ellipsis)
    steps: list[Step] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += rest
        elif item is None:
            steps.append(Step("unsqueeze", dim))
            dim += 1
        elif isinstance(item, slice):
            if item != slice(None):
                steps.append(Step("slice", dim, item.start, item.stop, item.step or 1))
            dim += 1
        else:
            steps.append(Step("select", dim, item))
    return steps


def _is_basic(item: Any) -> bool:
    if isinstance(item, bool):
        return False
    return item is None or item is Ellipsis or isinstance(item, (slice, *_INTEGERS))


def scatter_index(
    recorder: Recorder, tensor: torch.Tensor, old: fx.Node, steps: list[Step], new: fx.Node
) -> fx.Node:
    """Write the node of `tensor` after the part that `steps` pick became `new`."""
    values, nodes = [tensor], [old]
    for step in steps[:-1]:
        values.append(step.apply(values[-1]))
        nodes.append(step.write(recorder, nodes[-1], values[-1]))
    for step, value, node in zip(reversed(steps), reversed(values), reversed(nodes), strict=True):
        new = step.scatter(recorder, node, new, value)
    return new
