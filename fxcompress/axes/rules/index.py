"""Indexing: slices cut a dimension, numbers take one of its indices, tensors freeze it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import is_static
from fxcompress.axes._solver import UNIT, Dim
from fxcompress.axes.rules.parts import cut_static

__all__ = ["RULES"]

_BY_DATA = "values are picked from it by data"


def getitem(site: Site) -> Value:
    """`x[index]`: of a tuple, or of a tensor by slices, numbers, None and tensors."""
    source, index = site.args["input"], site.args["index"]
    value = site.values.get(source)
    if isinstance(value, tuple):
        return value[index]  # type: ignore[no-any-return]
    if not isinstance(value, list):
        return site.fixed_result("it comes from no tensor")
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(_is_tensor(item) for item in items):
        return _advanced(site, value, items)
    return _basic(site, value, _spread(items, len(value)))


def _is_tensor(item: Any) -> bool:
    if isinstance(item, (list, tuple)):
        return True
    return isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor)


def _spread(items: list[Any], rank: int) -> list[Any]:
    """Replace the ellipsis, and add what is left out at the end."""
    used = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (rank - used)
    if any(item is Ellipsis for item in items):
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        return [*items[:place], *missing, *items[place + 1 :]]
    return [*items, *missing]


def _basic(site: Site, dims: list[Dim], items: list[Any]) -> list[Dim]:
    result: list[Dim] = []
    source = iter(dims)
    shape = iter(site.shape())
    for place, item in enumerate(items):
        if item is None:
            result.append(UNIT)
            next(shape)
        elif isinstance(item, slice):
            result.append(_sliced(site, next(source), item, next(shape), place))
        else:
            _selected(site, next(source), item, place)
    return result


def _sliced(site: Site, dim: Dim, item: slice, size: Any, place: int | None) -> Dim:
    total = site.solver.size(dim)
    if total == size:
        return dim
    start, stop, step = item.start or 0, item.stop, 1 if item.step is None else item.step
    plain = all(isinstance(each, int) for each in (start, step)) and (
        stop is None or isinstance(stop, int)
    )
    if site.solver.is_frozen(dim) or not (plain and is_static(total)):
        site.solver.freeze(dim, "it is cut at dynamic sizes")
        return site.solver.fixed(size, "a part of a frozen dimension")
    low, high, step = slice(start, stop, step).indices(total[0])
    if step == 1:
        parts = cut_static(site, dim, [low, high])
        assert parts is not None
        _bounds(site, item, parts, place)
        return parts[1]
    if step > 1 and total[0] % step == 0 and 0 <= low < step and high > total[0] - step:
        outer, inner = site.solver.regroup([dim], [(total[0] // step, ()), (step, ())])
        site.solver.freeze(inner, "every n-th index is taken")
        return outer
    site.solver.freeze(dim, "every n-th index is taken")
    return site.solver.fixed(size, "every n-th index is taken")


def _bounds(site: Site, item: slice, parts: list[Dim], place: int | None) -> None:
    """Note slice bounds that follow sizes; negative ones count from the end."""
    name = "index" if place is not None else ""
    before, taken, after = parts
    start, stop = item.start, item.stop
    if isinstance(start, int) and start:
        dims = (before,) if start > 0 else (taken, after)
        site.bound(name, dims, place, "start", negative=start < 0)
    if isinstance(stop, int):
        dims = (before, taken) if stop > 0 else (after,)
        site.bound(name, dims, place, "stop", negative=stop < 0)


def _selected(site: Site, dim: Dim, item: Any, place: int | None) -> None:
    total = site.solver.size(dim)
    if site.solver.is_frozen(dim):
        return
    if not isinstance(item, int) or not is_static(total):
        site.solver.freeze(dim, "an index of it is taken by a dynamic number")
        return
    index = item % total[0]
    before, _, after = site.solver.cut(dim, [index, index + 1])
    if item >= 0:
        site.bound("index", (before,), place, "index")
    else:
        site.bound("index", (UNIT, after), place, "index", negative=True)


def _advanced(site: Site, dims: list[Dim], items: list[Any]) -> Value:
    """Dimensions indexed by tensors freeze; those taken whole go on."""
    value = site.node.meta["val"]
    masks = [i for i in items if _is_tensor(i) and _is_mask(i)]
    if masks:
        site.freeze_all(_BY_DATA)
        return site.fixed_result(_BY_DATA)
    items = _spread(items, len(dims))
    places = [i for i, item in enumerate(items) if _is_tensor(item)]
    indices = [site.dims_of(items[i]) for i in places if isinstance(items[i], fx.Node)]
    rank = max((len(each) for each in indices), default=1)
    adjacent = places == list(range(places[0], places[-1] + 1)) and not any(
        isinstance(item, int) for item in items
    )
    kept: list[Dim | None] = []
    source = iter(dims)
    for item in items:
        if item is None:
            kept.append(UNIT)
            continue
        dim = next(source)
        if isinstance(item, slice) and item == slice(None):
            kept.append(dim)
            continue
        site.solver.freeze(dim, _BY_DATA)
        if isinstance(item, slice):
            kept.append(None)
    lead = sum(item is None or isinstance(item, slice) for item in items[: places[0]])
    start = lead if adjacent else 0
    index_dims = site.broadcast(indices) if len(indices) == len(places) else []
    known: dict[int, Dim] = {}
    if len(index_dims) == rank:
        known |= {start + i: dim for i, dim in enumerate(index_dims)}
    for i, whole in enumerate(kept):
        if whole is not None:
            known[i if i < start else i + rank] = whole
    return site.rest(value, known, _BY_DATA)


def _is_mask(item: Any) -> bool:
    if isinstance(item, fx.Node):
        return bool(item.meta["val"].dtype in (torch.bool, torch.uint8))
    return any(isinstance(each, bool) for each in item)


def select(site: Site) -> Value:
    """Take one index of a dimension."""
    dims = list(site.dims("input"))
    place = site.axis(site.args["dim"], len(dims))
    _selected(site, dims.pop(place), site.args["index"], None)
    return dims


def slice_(site: Site) -> Value:
    """Take a range of a dimension."""
    dims = list(site.dims("input"))
    place = site.axis(site.get("dim", 0), len(dims))
    size = site.shape()[place]
    if site.solver.size(dims[place]) != size:
        site.solver.freeze(dims[place], "it is cut at given places")
        dims[place] = site.solver.fixed(size, "it is cut at given places")
    return dims


def narrow(site: Site) -> Value:
    """Take a range of a dimension by start and length."""
    dims = list(site.dims("input"))
    place = site.axis(site.args["dim"], len(dims))
    start, length = site.args["start"], site.args["length"]
    dim, size = dims[place], site.shape()[place]
    plain = isinstance(start, int) and isinstance(length, int) and start >= 0
    if site.solver.is_frozen(dim) or not plain or not is_static(site.solver.size(dim)):
        site.solver.freeze(dim, "it is cut at dynamic sizes")
        dims[place] = site.solver.fixed(size, "it is cut at dynamic sizes")
        return dims
    before, taken, _ = site.solver.cut(dim, [start, start + length])
    site.literal("start", before)
    site.literal("length", taken)
    dims[place] = taken
    return dims


RULES: dict[str, Rule] = {
    "getitem": getitem,
    "select": select,
    "slice": slice_,
    "narrow": narrow,
}
