"""Pooling, resampling, padding, windows and pixel shuffles: positions freeze, channels go on."""

from __future__ import annotations

from typing import Any

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._sizes import is_static
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES"]

_POSITIONS = "positions of a grid"


def _over_last(count: int) -> Rule:
    """Return the rule of an op over the last `count` dimensions."""

    def rule(site: Site) -> Value:
        dims = site.dims("input")
        samples = site.dims("_random_samples")  # of fractional pooling, `[N, C, count]`
        for sample, dim in zip(samples[:2], dims, strict=False):
            site.solver.unify(sample, dim)
        return _positions(site, dims, count)

    return rule


def _positions(site: Site, dims: list[Dim], count: int) -> Value:
    start = len(dims) - count
    for dim in dims[start:]:
        site.solver.freeze(dim, _POSITIONS)
    value = site.node.meta["val"]
    if isinstance(value, (tuple, list)):
        return tuple(_kept(site, dims[:start], each) for each in value)
    return _kept(site, dims[:start], value)


def _kept(site: Site, dims: list[Dim], value: Any) -> list[Dim]:
    rest = [site.solver.fixed(size, _POSITIONS) for size in site.shape(value)[len(dims) :]]
    return [*dims, *rest]


def interpolate(site: Site) -> Value:
    """Resample all but the first two dimensions."""
    dims = site.dims("input")
    return _positions(site, dims, len(dims) - 2)


def grid_sample(site: Site) -> Value:
    """Read `[N, C, *]` at the positions of a grid."""
    dims = site.dims("input")
    for dim in (*dims[2:], *site.dims("grid")):
        site.solver.freeze(dim, _POSITIONS)
    return _kept(site, dims[:2], site.node.meta["val"])


def affine_grid(site: Site) -> Value:
    """Positions of a grid."""
    site.freeze_all(_POSITIONS)
    return site.fixed_result(_POSITIONS)


def pad(site: Site) -> Value:
    """Add entries at the ends; with a constant they are parts of their own."""
    dims, amounts = list(site.dims("input")), site.get("pad") or site.get("padding")
    constant = site.get("mode", "constant") in ("constant", None)
    shape = site.shape()
    if not isinstance(amounts, (tuple, list)):
        amounts = (amounts,) * (2 * (len(dims) - 2))
    for pair in range(len(amounts) // 2):
        place = len(dims) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if before == 0 and after == 0:
            continue
        dims[place] = _padded(site, dims[place], before, after, shape[place], constant)
    return dims


def _padded(site: Site, dim: Dim, before: Any, after: Any, size: Any, constant: bool) -> Dim:
    solver = site.solver
    numbers = isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0
    if solver.is_frozen(dim) or not (constant and numbers and is_static(solver.size(dim))):
        solver.freeze(dim, "it is padded")
        return solver.fixed(size, "it is padded")
    padding = [solver.join([UNIT] * count) if count > 1 else UNIT for count in (before, after)]
    parts = [padding[0]] * bool(before) + [dim] + [padding[1]] * bool(after)
    return solver.join(parts)


def pixel_shuffle(site: Site) -> Value:
    """`[*, C · r · r, H, W] → [*, C, H · r, W · r]`."""
    dims, factor = site.dims("input"), int(site.get("upscale_factor"))
    channels = site.solver.size(dims[-3])[0] // factor**2
    sizes = [(channels, ()), (factor, ()), (factor, ())]
    channel, *inner = site.solver.regroup([dims[-3]], sizes)
    for dim in inner:
        site.solver.freeze(dim, "it becomes positions")
    return _kept(site, [*dims[:-3], channel], site.node.meta["val"])


def pixel_unshuffle(site: Site) -> Value:
    """`[*, C, H · r, W · r] → [*, C · r · r, H, W]`."""
    dims, factor = site.dims("input"), int(site.get("downscale_factor"))
    for dim in dims[-2:]:
        site.solver.freeze(dim, _POSITIONS)
    inner = site.solver.fixed((factor**2, ()), "it was positions")
    return _kept(site, [*dims[:-3], (*dims[-3], *inner)], site.node.meta["val"])


def channel_shuffle(site: Site) -> Value:
    """`(groups, channels)` becomes `(channels, groups)`."""
    dims, groups = list(site.dims("input")), int(site.get("groups"))
    size = site.solver.size(dims[1])[0]
    outer, inner = site.solver.regroup([dims[1]], [(groups, ()), (size // groups, ())])
    site.constant("groups", outer)
    dims[1] = (*inner, *outer)
    return dims


def unfold(site: Site) -> Value:
    """`[N, C, *] → [N, C · kernel, positions]`."""
    dims = site.dims("input")
    channel = len(dims) - 3
    for dim in dims[channel + 1 :]:
        site.solver.freeze(dim, _POSITIONS)
    shape = site.shape()
    kernel = shape[-2][0] // site.solver.size(dims[channel])[0]
    taps = site.solver.fixed((kernel, ()), "a kernel's positions")
    return _kept(site, [*dims[:channel], (*dims[channel], *taps)], site.node.meta["val"])


def fold(site: Site) -> Value:
    """`[N, C · kernel, positions] → [N, C, *]`."""
    dims, shape = site.dims("input"), site.shape()
    channel = len(dims) - 2
    count = shape[channel]
    kernel = site.solver.size(dims[channel])[0] // count[0]
    outer, taps = site.solver.regroup([dims[channel]], [count, (kernel, ())])
    site.solver.freeze(taps, "a kernel's positions")
    site.solver.freeze(dims[-1], _POSITIONS)
    return _kept(site, [*dims[:channel], outer], site.node.meta["val"])


def window(site: Site) -> Value:
    """Sliding windows of one dimension, their entries last."""
    dims = list(site.dims("input"))
    place = site.axis(site.args["dimension"], len(dims))
    site.solver.freeze(dims[place], "windows slide over it")
    shape = site.shape()
    dims[place] = site.solver.fixed(shape[place], "windows slide over it")
    return [*dims, site.solver.fixed(shape[-1], "windows slide over it")]


RULES: dict[str, Rule] = {
    **{
        f"{kind}{rank}d": _over_last(rank)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool",
                     "max_unpool", "fractional_max_pool")
        for rank in (1, 2, 3)
    },
    "interpolate": interpolate,
    "grid_sample": grid_sample,
    "affine_grid": affine_grid,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "unfold": unfold,
    "fold": fold,
    "window": window,
}  # fmt: skip
