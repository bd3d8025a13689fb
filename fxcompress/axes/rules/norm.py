"""Norms, softmax and reductions: what spans an axis is noted, so that proofs allow for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES"]


def _affine(site: Site, dim: Dim) -> None:
    """Unify the per-channel parameters with a dimension."""
    for name, role in (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "other"),
        ("running_var", "other"),
    ):
        tensor = site.weight(name)
        if tensor:
            site.solver.unify(tensor[0], dim)
            site.role(name, 0, role)  # type: ignore[arg-type]


def batch_norm(site: Site) -> Value:
    """Per channel, dimension 1; statistics over the others only when they come from the input."""
    dims = site.dims("input")
    _affine(site, dims[1])
    site.attribute("num_features", dims[1])
    uses_input = site.weight("running_mean") is None
    if uses_input:
        site.span(dims[0], *dims[2:])
    return dims


def instance_norm(site: Site) -> Value:
    """Per sample and channel; statistics over positions."""
    dims = site.dims("input")
    channel = 1 if len(dims) > 2 else 0
    _affine(site, dims[channel])
    site.attribute("num_features", dims[channel])
    site.span(*dims[channel + 1 :])
    return dims


def layer_norm(site: Site) -> Value:
    """Statistics over the last dimensions."""
    dims = site.dims("input")
    shape = site.get("normalized_shape")
    count = len(shape) if isinstance(shape, (tuple, list)) else 1
    last = dims[len(dims) - count :]
    for name, role in (("weight", "scale"), ("bias", "bias")):
        tensor = site.weight(name)
        for i, dim in enumerate(tensor or ()):
            site.solver.unify(dim, last[i])
            site.role(name, i, role)  # type: ignore[arg-type]
    for i, dim in enumerate(last):
        index = i if isinstance(shape, (tuple, list)) else None
        if site.module is not None:
            site.attribute("normalized_shape", dim, index)
        else:
            site.literal("normalized_shape", dim, index)
    site.span(*last)
    return dims


def group_norm(site: Site) -> Value:
    """Statistics over the channels of a group and all positions; a whole group may go."""
    dims = site.dims("input")
    groups = int(site.get("num_groups"))
    size = site.solver.size(dims[1])[0]
    group, inner = site.solver.regroup([dims[1]], [(groups, ()), (size // groups, ())])
    for name, role in (("weight", "scale"), ("bias", "bias")):
        tensor = site.weight(name)
        if tensor:
            site.solver.unify(tensor[0], dims[1])
            site.role(name, 0, role)  # type: ignore[arg-type]
    site.constant("num_groups", group)
    site.attribute("num_channels", dims[1])
    site.span(inner, *dims[2:])
    return dims


def local_response_norm(site: Site) -> Value:
    """A window slides over the channels."""
    dims = site.dims("input")
    site.solver.freeze(dims[1], "a normalisation window slides over it")
    return dims


def softmax(site: Site) -> Value:
    """Shares over a dimension."""
    dims = site.dims("input")
    over = site.get("dim")
    if over is None:
        over = 0 if len(dims) in (0, 1, 3) else 1
    site.span(dims[site.axis(over, len(dims))])
    return dims


def normalize(site: Site) -> Value:
    """Divide by a norm: a sum, to which what is removed adds nothing."""
    return site.dims("input")


def _over(site: Site, dims: list[Dim]) -> set[int]:
    over = site.args.get("dim")
    if isinstance(over, fx.Node):
        over = None
    if over is None or over == () or over == []:
        return set(range(len(dims)))
    return {site.axis(d, len(dims)) for d in (over if isinstance(over, (tuple, list)) else (over,))}


def _reduced(site: Site, dims: list[Dim], over: set[int]) -> list[Dim]:
    if site.args.get("keepdim"):
        return [UNIT if i in over else dim for i, dim in enumerate(dims)]
    return [dim for i, dim in enumerate(dims) if i not in over]


def _result(site: Site, dims: list[Dim]) -> Value:
    value = site.node.meta["val"]
    return tuple(dims for _ in value) if isinstance(value, (tuple, list)) else dims


def additive(site: Site) -> Value:
    """Sums and norms: what is zero adds nothing."""
    dims = site.dims("input")
    return _result(site, _reduced(site, dims, _over(site, dims)))


def statistic(site: Site) -> Value:
    """Means, extrema and the like: what is removed must not count."""
    for name in ("other", "dim"):  # max(a, b): the second operand stands where a dim would
        if site.has(name):
            return site.broadcast([site.dims("input"), site.dims(name)])
    dims = site.dims("input")
    over = _over(site, dims)
    site.span(*(dims[i] for i in over))
    return _result(site, _reduced(site, dims, over))


def positional(site: Site) -> Value:
    """Results that are positions, or that depend on them."""
    dims = site.dims("input")
    over = _over(site, dims)
    for i in over:
        site.solver.freeze(dims[i], "results depend on positions in it")
    return _result(site, _reduced(site, dims, over))


def running(site: Site) -> Value:
    """Cumulative results along a dimension."""
    dims = site.dims("input")
    over = site.args.get("dim", -1)
    site.solver.freeze(dims[site.axis(over, len(dims))], "results accumulate along it")
    return _result(site, dims)


def ordered(site: Site) -> Value:
    """Sorted or chosen along a dimension, by data."""
    dims = list(site.dims("input"))
    place = site.axis(site.get("dim", -1) if site.args.get("dim") is not None else -1, len(dims))
    site.solver.freeze(dims[place], "it is ordered by data")
    value = site.node.meta["val"]
    first: Any = value[0] if isinstance(value, (tuple, list)) else value
    if isinstance(first, torch.Tensor) and len(first.shape) == len(dims):
        dims[place] = site.solver.fixed(site.shape(first)[place], "it is ordered by data")
    else:
        dims.pop(place)
    return _result(site, dims)


def similarity(site: Site) -> Value:
    """Products of two tensors over a dimension, by their norms."""
    dims = site.broadcast([site.dims("x1"), site.dims("x2")])
    over = site.axis(site.get("dim", 1), len(dims))
    return [dim for i, dim in enumerate(dims) if i != over]


RULES: dict[str, Rule] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    "local_response_norm": local_response_norm,
    "normalize": normalize,
    "cosine_similarity": similarity,
    **dict.fromkeys(("softmax", "softmin", "log_softmax"), softmax),
    **dict.fromkeys(("sum", "nansum", "norm", "vector_norm", "count_nonzero", "any"), additive),
    **dict.fromkeys(
        ("mean", "nanmean", "prod", "max", "min", "amax", "amin", "aminmax", "all", "median",
         "nanmedian", "logsumexp", "var", "std", "var_mean", "std_mean"),
        statistic,
    ),
    **dict.fromkeys(("argmax", "argmin", "mode", "kthvalue", "quantile"), positional),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), running),
    **dict.fromkeys(("topk", "sort", "argsort"), ordered),
}  # fmt: skip
