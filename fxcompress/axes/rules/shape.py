"""Ops that see the same values in another shape: reshapes, permutations, expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import ONE, is_static
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES"]


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
}
