"""Ops that join dimensions, take them apart, or move positions within them."""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import is_static
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES", "cut_static"]


def cat(site: Site) -> Value:
    """Join along a dimension; unify the others."""
    tensors = [site.dims_of(each) for each in site.args["tensors"]]
    shapes = [each.meta["val"].shape for each in site.args["tensors"]]
    tensors = [
        dims for dims, shape in zip(tensors, shapes, strict=True) if tuple(shape) != (0,)
    ] or tensors[:1]
    place = site.axis(site.get("dim", 0), len(tensors[0]))
    result = list(tensors[0])
    for dims in tensors[1:]:
        for i, dim in enumerate(dims):
            if i != place:
                site.solver.unify(result[i], dim)
    parts = [dims[place] for dims in tensors]
    size = site.shape()[place]
    if is_static(size) and all(is_static(site.solver.size(part)) for part in parts):
        result[place] = site.solver.join(parts)
    else:
        for part in parts:
            site.solver.freeze(part, "it is joined to a dynamic size")
        result[place] = site.solver.fixed(size, "a dynamic size")
    return result


def stack(site: Site) -> Value:
    """Join along a new dimension, one index per tensor."""
    tensors = site.args["tensors"]
    result = site.dims_of(tensors[0])
    for each in tensors[1:]:
        result = site.broadcast([result, site.dims_of(each)])
    place = site.axis(site.get("dim", 0), len(result) + 1)
    return [*result[:place], site.solver.join([UNIT] * len(tensors)), *result[place:]]


def cut_static(site: Site, dim: Dim, at: Sequence[int]) -> list[Dim] | None:
    """Cut a dimension, or return None where it is dynamic."""
    return site.solver.cut(dim, at) if is_static(site.solver.size(dim)) else None


def split(site: Site) -> Value:
    """Cut along a dimension into parts."""
    name = next(n for n in ("split_size", "chunks", "indices_or_sections") if n in site.args)
    dims = site.dims("input")
    place = site.axis(site.get("dim", 0), len(dims))
    values = site.node.meta["val"]
    sizes = [site.solver.sizes(each.shape[place]) for each in values]
    bounds = [sum(size[0] for size in sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = None
    if all(is_static(size) for size in sizes):
        parts = cut_static(site, dims[place], bounds)
    if parts is None:
        site.solver.freeze(dims[place], "it is cut at dynamic sizes")
        parts = [site.solver.fixed(size, "it is cut at dynamic sizes") for size in sizes]
    else:
        site.sections(name, parts, place)
    return tuple([*dims[:place], part, *dims[place + 1 :]] for part in parts)


def unbind(site: Site) -> Value:
    """Take each index of a dimension apart."""
    dims = site.dims("input")
    place = site.axis(site.get("dim", 0), len(dims))
    count = len(site.node.meta["val"])
    units = site.solver.join([UNIT] * count)
    if is_static(site.solver.size(dims[place])):
        site.solver.unify(dims[place], units)
    else:
        site.solver.freeze(dims[place], "it is taken apart")
    return tuple([*dims[:place], *dims[place + 1 :]] for _ in range(count))


def roll(site: Site) -> Value:
    """Rotate positions."""
    dims, over = site.dims("input"), site.args.get("dims", ())
    over = over if isinstance(over, (tuple, list)) else (over,)
    for place in over if over else range(len(dims)):
        site.solver.freeze(dims[place % len(dims)], "its positions are moved")
    return dims


def diagonal(site: Site) -> Value:
    """Take or make a diagonal."""
    site.freeze_all("a diagonal is taken over it")
    return site.fixed_result("a diagonal")


def meshgrid(site: Site) -> Value:
    """Positions of a grid: every pair of coordinates."""
    site.freeze_all("coordinates of a grid")
    return site.fixed_result("coordinates of a grid")


def glu(site: Site) -> Value:
    """Gate one half by the other."""
    dims = list(site.dims("input"))
    place = site.axis(site.get("dim", -1), len(dims))
    halves = cut_static(site, dims[place], [site.solver.size(dims[place])[0] // 2])
    if halves is None:
        site.solver.freeze(dims[place], "it is cut at dynamic sizes")
        dims[place] = site.solver.fixed(site.shape()[place], "it is cut at dynamic sizes")
        return dims
    site.solver.unify(*halves)
    dims[place] = halves[0]
    return dims


RULES: dict[str, Rule] = {
    "cat": cat,
    "stack": stack,
    "split": split,
    "chunk": split,
    "tensor_split": split,
    "unbind": unbind,
    "roll": roll,
    "flip": roll,
    "diagonal": diagonal,
    "diag": diagonal,
    "diag_embed": diagonal,
    "meshgrid": meshgrid,
    "glu": glu,
}
