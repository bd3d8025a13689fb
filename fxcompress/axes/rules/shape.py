"""Ops that move values: reshapes, permutations, expansions, cuts and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import ONE, is_static
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES", "cut_static"]


def reshape(site: Site) -> Value:
    """Regroup the factors in row-major order."""
    name = "shape" if "shape" in site.args else "size"
    sizes = site.args.get(name)
    if isinstance(sizes, torch.dtype) or (
        isinstance(sizes, (tuple, list)) and sizes and isinstance(sizes[0], torch.dtype)
    ):
        site.solver.freeze(site.dims("input")[-1], "its bytes are read as another type")
        dims = site.dims("input")[:-1]
        return [*dims, site.solver.fixed(site.shape()[-1], "its bytes are read as another type")]
    dims = site.solver.regroup(site.dims("input"), site.shape())
    _sizes(site, name, sizes, dims)
    return dims


def _sizes(site: Site, name: str, sizes: Any, dims: Sequence[Dim]) -> None:
    """Note every size argument that follows a dimension."""
    if isinstance(sizes, (tuple, list)) and len(sizes) == len(dims):
        for index, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
            if isinstance(size, fx.Node) or (isinstance(size, int) and size > 0):
                site.literal(name, dim, index)


def reshape_as(site: Site) -> Value:
    """Reshape like another tensor, which is then unified."""
    dims = site.solver.regroup(site.dims("input"), site.shape())
    for mine, other in zip(dims, site.dims("other"), strict=True):
        site.solver.unify(mine, other)
    return dims


def flatten(site: Site) -> Value:
    """Regroup a range of dimensions into one."""
    return site.solver.regroup(site.dims("input"), site.shape())


def unflatten(site: Site) -> Value:
    """Regroup one dimension into several."""
    dims = site.solver.regroup(site.dims("input"), site.shape())
    sizes = site.get("sizes") or site.get("unflattened_size")
    start = site.axis(site.get("dim", 0), len(site.dims("input")))
    if isinstance(sizes, (tuple, list)):
        name = "sizes" if site.module is None else "unflattened_size"
        for index, size in enumerate(sizes):
            if isinstance(size, int) and size < 0:
                continue
            if site.module is None:
                site.literal(name, dims[start + index], index)
            else:
                site.attribute(name, dims[start + index], index)
    return dims


def squeeze(site: Site) -> Value:
    """Drop dimensions of size 1."""
    dims, over = site.dims("input"), site.args.get("dim")
    sizes = [site.solver.size(dim) for dim in dims]
    if over is None or over == ():
        left = [dim for dim, size in zip(dims, sizes, strict=True) if size != ONE]
        site.squeezed(left)
        return left
    chosen = {
        site.axis(d, len(dims)) for d in (over if isinstance(over, (tuple, list)) else (over,))
    }
    return [dim for i, dim in enumerate(dims) if not (i in chosen and sizes[i] == ONE)]


def unsqueeze(site: Site) -> Value:
    """Add a dimension of size 1."""
    dims = list(site.dims("input"))
    dims.insert(site.axis(site.args["dim"], len(dims) + 1), UNIT)
    return dims


def transpose(site: Site) -> Value:
    """Swap two dimensions."""
    dims = list(site.dims("input"))
    a, b = (site.axis(site.args[name], len(dims)) for name in ("dim0", "dim1"))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def matrix_transpose(site: Site) -> Value:
    """Swap the last two dimensions."""
    dims = list(site.dims("input"))
    return dims if len(dims) < 2 else [*dims[:-2], dims[-1], dims[-2]]


def permute(site: Site) -> Value:
    """Reorder the dimensions."""
    dims = site.dims("input")
    order = site.args["dims"]
    return [dims[site.axis(place, len(dims))] for place in order]


def movedim(site: Site) -> Value:
    """Move dimensions to other places."""
    dims = site.dims("input")
    source, target = site.args["source"], site.args["destination"]
    source = source if isinstance(source, (tuple, list)) else (source,)
    target = target if isinstance(target, (tuple, list)) else (target,)
    rank = len(dims)
    fixed = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(i for i in range(rank) if i not in fixed.values())
    return [dims[fixed[i] if i in fixed else next(rest)] for i in range(rank)]


def expand(site: Site) -> Value:
    """Repeat dimensions of size 1; each becomes a dimension of its own."""
    dims = _expanded(site, site.dims("input"))
    sizes = site.args.get("size")
    if isinstance(sizes, (tuple, list)):
        for index, (size, dim) in enumerate(zip(sizes, dims, strict=False)):
            if isinstance(size, fx.Node) or (isinstance(size, int) and size > 0):
                site.literal("size", dim, index)
    return dims


def _expanded(site: Site, dims: list[Dim]) -> list[Dim]:
    shape = site.shape()
    dims = [UNIT] * (len(shape) - len(dims)) + list(dims)
    return [
        dim if dim or size == ONE else _repeat_of_one(site, size)
        for dim, size in zip(dims, shape, strict=True)
    ]


def _repeat_of_one(site: Site, size: Any) -> Dim:
    return _copies(site, size) if is_static(size) else site.solver.fixed(size, "a dynamic size")


def _copies(site: Site, size: Any) -> Dim:
    made = site.solver.fresh(size)
    site.solver.tag(made, "copy")
    return made


def expand_as(site: Site) -> Value:
    """Expand like another tensor."""
    dims = _expanded(site, site.dims("input"))
    for mine, other in zip(dims, site.dims("other"), strict=True):
        if mine and other:
            site.solver.unify(mine, other)
    return dims


def broadcast_tensors(site: Site) -> Value:
    """Expand all to one shape."""
    tensors = site.args["tensors"]
    joint = site.broadcast([site.dims_of(each) for each in tensors])
    return tuple(joint for _ in tensors)


def repeat(site: Site) -> Value:
    """Tile: the copies are the outer factor."""
    dims = site.dims("input")
    name = "repeats" if "repeats" in site.args else "dims"
    counts = site.args[name]
    counts = counts if isinstance(counts, (tuple, list)) else (counts,)
    rank = max(len(counts), len(dims))
    dims = [UNIT] * (rank - len(dims)) + list(dims)
    start = rank - len(counts)
    result = []
    for place, (dim, size) in enumerate(zip(dims, site.shape(), strict=True)):
        if place < start or counts[place - start] == 1:
            result.append(dim)
        elif isinstance(counts[place - start], int) and is_static(site.solver.size(dim)):
            copies = _copies(site, (counts[place - start], ()))
            site.literal(name, copies, place - start)
            result.append((*copies, *dim))
        else:
            site.solver.freeze(dim, "it is tiled")
            result.append(site.solver.fixed(size, "it is tiled"))
    return result


def repeat_interleave(site: Site) -> Value:
    """Repeat each element: the copies are the inner factor."""
    dims, count, over = site.dims("input"), site.args.get("repeats"), site.args.get("dim")
    if not isinstance(count, int) or over is None:
        site.freeze_all("its elements are repeated")
        return site.fixed_result("its elements are repeated")
    place = site.axis(over, len(dims))
    copies = _copies(site, (count, ()))
    site.literal("repeats", copies)
    return [*dims[:place], (*dims[place], *copies), *dims[place + 1 :]]


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
    "view": reshape,
    "reshape": reshape,
    "view_as": reshape_as,
    "reshape_as": reshape_as,
    "flatten": flatten,
    "ravel": flatten,
    "unflatten": unflatten,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "transpose": transpose,
    "t": matrix_transpose,
    "adjoint": matrix_transpose,
    "permute": permute,
    "movedim": movedim,
    "expand": expand,
    "broadcast_to": expand,
    "expand_as": expand_as,
    "broadcast_tensors": broadcast_tensors,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
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
