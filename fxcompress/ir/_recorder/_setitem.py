"""`x[index] = value` out of place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.ir._recorder._indexing import basic_index, scatter_index
from fxcompress.ir._recorder._mutation import fitted, store

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["set_item"]


def set_item(recorder: Recorder, target: torch.Tensor, index: Any, value: Any) -> None:
    """Write the new value of `target`, and tell everything that shares its memory."""
    steps = basic_index(target, index)
    if steps is not None:
        slot = target
        for step in steps:
            slot = step.apply(slot)
        new = fitted(recorder, _squeezed(recorder, value, slot), slot)
        if steps:
            new = scatter_index(recorder, target, recorder.node_of(target), steps, new)
        store(recorder, target, new)
        return
    store(recorder, target, _put(recorder, target, index, value))


def _squeezed(recorder: Recorder, value: Any, slot: torch.Tensor) -> Any:
    # Assignment, unlike expand, drops leading dimensions of size 1.
    if not isinstance(value, torch.Tensor) or value.dim() <= slot.dim():
        return value
    result = value.reshape(value.shape[value.dim() - slot.dim() :])
    node = recorder.emit(torch.reshape, (value, tuple(result.shape)), {}, result)
    recorder.values.define(result, node)
    return result


def _put(recorder: Recorder, target: torch.Tensor, index: Any, value: Any) -> fx.Node:
    items = list(index) if isinstance(index, tuple) else [index]
    if len(items) == 1 and _is_mask(items[0]) and _is_scalar(value):
        mask = items[0]
        node = recorder.node_of(mask)
        if mask.dim() < target.dim():
            shape = (*mask.shape, *(1,) * (target.dim() - mask.dim()))
            node = recorder.emit(torch.reshape, (node, shape), {}, mask.reshape(shape))
        if not isinstance(value, torch.Tensor):
            return recorder.emit(torch.masked_fill, (target, node, value), {}, target)
        return recorder.emit(torch.where, (node, value.to(target.dtype), target), {}, target)
    indices = _all_tensors(recorder, target, items)
    if not isinstance(value, torch.Tensor):
        plain = torch.full((), value, dtype=target.dtype, device=target.device)
        options = {"dtype": target.dtype, "device": target.device}
        value_node = recorder.emit(torch.full, ((), value), options, plain)
    else:
        value_node = recorder.node_of(value)
        if value.dtype != target.dtype:
            value_node = recorder.emit("to", (value_node, target.dtype), {}, None)
    return recorder.emit(torch.index_put, (target, indices, value_node), {}, target)


def _is_mask(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _all_tensors(recorder: Recorder, target: torch.Tensor, items: list[Any]) -> tuple[Any, ...]:
    width = sum(i.dim() if _is_mask(i) else 1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (target.dim() - width)
    while items and items[-1] == slice(None):
        items.pop()
    if all(isinstance(item, torch.Tensor) for item in items):
        return tuple(items)
    slices = [place for place, item in enumerate(items) if isinstance(item, slice)]
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    advanced = max((t.dim() for t in tensors), default=0)
    first = min(p for p, item in enumerate(items) if not isinstance(item, slice))
    result: list[Any] = []
    for place, item in enumerate(items):
        if isinstance(item, slice):
            before = place < first
            trailing = sum(1 for other in slices if other > place) + (advanced if before else 0)
            result.append(_positions(recorder, target, place, item, trailing))
        else:
            trailing = sum(1 for other in slices if other > place)
            result.append(_with_trailing(recorder, target, item, trailing))
    return tuple(result)


def _positions(
    recorder: Recorder, target: torch.Tensor, place: int, cut: slice, trailing: int
) -> fx.Node:
    recorder.writer.asked(target, tuple(target.shape))
    size = target.shape[place]
    start, stop, step = 0, size, 1
    if cut != slice(None):
        start, stop, step = cut.indices(int(size))
    values = torch.arange(start, stop, step, device=target.device)
    node = recorder.emit(torch.arange, (start, stop, step), {"device": target.device}, values)
    if trailing:
        shape = (-1, *(1,) * trailing)
        node = recorder.emit(torch.reshape, (node, shape), {}, values.reshape(shape))
    return node


def _with_trailing(recorder: Recorder, target: torch.Tensor, item: Any, trailing: int) -> fx.Node:
    if not isinstance(item, torch.Tensor):
        plain = torch.full((), item, dtype=torch.int64, device=target.device)
        options = {"dtype": torch.int64, "device": target.device}
        return recorder.emit(torch.full, ((), item), options, plain)
    node = recorder.node_of(item)
    if trailing:
        shape = (*item.shape, *(1,) * trailing)
        node = recorder.emit(torch.reshape, (node, shape), {}, item.reshape(shape))
    return node
