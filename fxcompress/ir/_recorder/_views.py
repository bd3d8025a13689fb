"""Views: taken again after their memory changed, and written back into what they view."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.ir._recorder._indexing import basic_index, scatter_index
from fxcompress.ir._recorder._spelling import spell

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["view_of"]

Again = Callable[[fx.Node], fx.Node]
Scatter = Callable[[fx.Node, fx.Node], fx.Node]
ViewCall = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def view_of(
    recorder: Recorder, call: ViewCall, result: torch.Tensor
) -> tuple[Again | None, Scatter | None]:
    """Return how to take a view again from another node of its parent, and how to write it back.

    Args:
        recorder: Where nodes are written.
        call: The call that made the view; its first argument is the parent.
        result: The view.
    """
    func, args, kwargs = call
    kwargs = dict(kwargs)
    item = kwargs.pop("__item__", None)
    parent = args[0]
    if not isinstance(parent, torch.Tensor):
        return None, None
    target, positional, named = spell(func, args, kwargs)

    def again(node: fx.Node) -> fx.Node:
        view = recorder.emit(target, (node, *positional[1:]), named, None)
        if item is None:
            view.meta["val"] = result
            return view
        return recorder.emit(operator.getitem, (view, item), {}, result)

    make = _SCATTERS.get(target)
    if make is None:
        return again, None
    return again, make(recorder, parent, result, positional[1:], named, item)


def _argument(
    rest: tuple[Any, ...], named: dict[str, Any], place: int, name: str, default: Any
) -> Any:
    return rest[place] if len(rest) > place else named.get(name, default)


def _reshaped(recorder: Recorder, parent: torch.Tensor, result: torch.Tensor, *_: Any) -> Scatter:
    def scatter(old: fx.Node, new: fx.Node) -> fx.Node:
        return recorder.emit(torch.reshape, (new, tuple(parent.shape)), {}, parent)

    return scatter


def _same(recorder: Recorder, parent: torch.Tensor, *_: Any) -> Scatter:
    return lambda old, new: new


def _permuted(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    dims = [d % parent.dim() for d in _argument(rest, named, 0, "dims", ())]
    inverse = tuple(dims.index(i) for i in range(len(dims)))
    return lambda old, new: recorder.emit(torch.permute, (new, inverse), {}, parent)


def _transposed(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    first = _argument(rest, named, 0, "dim0", 0)
    second = _argument(rest, named, 1, "dim1", 1)
    return lambda old, new: recorder.emit(torch.transpose, (new, first, second), {}, parent)


def _selected(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    dim = _argument(rest, named, 0, "dim", 0)
    index = _argument(rest, named, 1, "index", item)
    return lambda old, new: recorder.emit(torch.select_scatter, (old, new, dim, index), {}, parent)


def _narrowed(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    dim = _argument(rest, named, 0, "dim", 0)
    start = _argument(rest, named, 1, "start", 0)
    return _slice(recorder, parent, dim, start, start + result.shape[dim])


def _piece(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    dim = _argument(rest, named, 1, "dim", 0)
    sizes = rest[0] if rest else named.get("split_size", named.get("split_size_or_sections"))
    start = sum(sizes[:item]) if isinstance(sizes, (tuple, list)) else sizes * item
    return _slice(recorder, parent, dim, start, start + result.shape[dim])


def _chunk(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    dim = _argument(rest, named, 1, "dim", 0)
    chunks = _argument(rest, named, 0, "chunks", 1)
    start = (parent.shape[dim] + chunks - 1) // chunks * item
    return _slice(recorder, parent, dim, start, start + result.shape[dim])


def _slice(recorder: Recorder, parent: torch.Tensor, dim: int, start: Any, stop: Any) -> Scatter:
    return lambda old, new: recorder.emit(
        torch.slice_scatter, (old, new, dim, start, stop), {}, parent
    )


def _indexed(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter | None:
    steps = basic_index(parent, rest[0])
    if steps is None:
        return None
    return lambda old, new: scatter_index(recorder, parent, old, steps, new)


def _diagonal(
    recorder: Recorder,
    parent: torch.Tensor,
    result: torch.Tensor,
    rest: tuple[Any, ...],
    named: dict[str, Any],
    item: Any,
) -> Scatter:
    return lambda old, new: recorder.emit(torch.diagonal_scatter, (old, new, *rest), named, parent)


_SCATTERS: dict[Any, Callable[..., Scatter | None]] = {
    torch.reshape: _reshaped,
    torch.flatten: _reshaped,
    torch.unflatten: _reshaped,
    torch.squeeze: _reshaped,
    torch.unsqueeze: _reshaped,
    torch.ravel: _reshaped,
    torch.permute: _permuted,
    torch.transpose: _transposed,
    torch.t: lambda recorder, parent, *_: (
        lambda old, new: recorder.emit(torch.t, (new,), {}, parent)
    ),
    torch.detach: _same,
    torch.select: _selected,
    torch.unbind: lambda recorder, parent, result, rest, named, item: _selected(
        recorder, parent, result, (*rest[:1],) or (0,), named, item
    ),
    torch.narrow: _narrowed,
    torch.split: _piece,
    torch.chunk: _chunk,
    torch.diagonal: _diagonal,
    operator.getitem: _indexed,
}
