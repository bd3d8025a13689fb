"""Layers with a weight: linear, bilinear and convolutions."""

from __future__ import annotations

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES"]


def linear(site: Site) -> Value:
    """`[..., in] × [out, in] → [..., out]`."""
    x, weight = site.dims("input"), site.weight("weight")
    assert weight is not None
    if len(weight) == 1:  # F.linear takes a vector too
        site.solver.unify(x[-1], weight[0])
        site.multiply(*x[:-1], weight[0])
        return x[:-1]
    out, into = weight
    site.solver.unify(x[-1], into)
    _bias(site, out)
    site.role("weight", 0, "out")
    site.role("weight", 1, "in")
    site.solver.tag(out, "neuron")
    site.attribute("in_features", into)
    site.attribute("out_features", out)
    site.multiply(*x[:-1], out, into)
    return [*x[:-1], out]


def _bias(site: Site, out: Dim) -> None:
    bias = site.weight("bias")
    if bias:
        site.solver.unify(bias[-1], out)
        site.role("bias", len(bias) - 1, "bias")


def bilinear(site: Site) -> Value:
    """`x1 · W[o] · x2`."""
    left, right, weight = site.dims("input1"), site.dims("input2"), site.weight("weight")
    assert weight is not None
    site.solver.unify(left[-1], weight[1])
    site.solver.unify(right[-1], weight[2])
    _bias(site, weight[0])
    for name, dim in (("out_features", 0), ("in1_features", 1), ("in2_features", 2)):
        site.attribute(name, weight[dim])
    site.role("weight", 0, "out")
    site.role("weight", 1, "in")
    site.role("weight", 2, "in")
    batch = site.broadcast([left[:-1], right[:-1]])
    site.multiply(*batch, *weight)
    return [*batch, weight[0]]


def convolution(site: Site) -> Value:
    """`[N, in, *] × [out, in / groups, *k] → [N, out, *]`, channels in groups."""
    weight = site.weight("weight")
    assert weight is not None
    x = site.dims("input")
    place = len(x) - len(weight) + 1  # channels come after the batch, if there is one
    groups = int(site.get("groups", 1))
    if groups == 1:
        site.solver.unify(x[place], weight[1])
    else:
        group, inner = _in_groups(site, x[place], groups)
        group_out, _ = _in_groups(site, weight[0], groups)
        site.solver.unify(group, group_out)
        site.solver.unify(inner, weight[1])
        site.constant("groups", group)
    _bias(site, weight[0])
    site.role("weight", 0, "out")
    site.role("weight", 1, "in" if groups == 1 else "other")
    site.solver.tag(weight[0], "channel")
    site.attribute("in_channels", x[place])
    site.attribute("out_channels", weight[0])
    spatial = _spatial(site, x[place + 1 :], weight[2:], place)
    result = [*x[:place], weight[0], *spatial]
    site.multiply(*result, weight[1], *weight[2:])
    return result


def _in_groups(site: Site, dim: Dim, groups: int) -> tuple[Dim, Dim]:
    size = site.solver.size(dim)
    outer, inner = site.solver.regroup([dim], [(groups, ()), (size[0] // groups, ())])
    return outer, inner


def _spatial(site: Site, spatial: list[Dim], kernel: list[Dim], place: int) -> list[Dim]:
    """Positions pass through a pointwise convolution; any other fixes them."""
    for dim in kernel:
        site.solver.freeze(dim, "a kernel's positions")
    shape = site.shape()[place + 1 :]
    same = [site.solver.size(dim) for dim in spatial] == shape
    if same and all(dim == UNIT for dim in kernel) and _is_zero(site.get("padding", 0)):
        return spatial
    for dim in spatial:
        site.solver.freeze(dim, "a kernel slides over it")
    return [site.solver.fixed(size, "a kernel slides over it") for size in shape]


def _is_zero(padding: object) -> bool:
    return padding in (0, "valid") or (isinstance(padding, (tuple, list)) and not any(padding))


def transposed(site: Site) -> Value:
    """`[N, in, *] × [in, out / groups, *k] → [N, out, *]`."""
    weight = site.weight("weight")
    assert weight is not None
    x = site.dims("input")
    place = len(x) - len(weight) + 1
    groups = int(site.get("groups", 1))
    site.solver.unify(x[place], weight[0])
    out = weight[1]
    if groups > 1:
        group, _ = _in_groups(site, weight[0], groups)
        out = (*group, *weight[1])
        site.constant("groups", group)
    _bias(site, out)
    site.role("weight", 0, "in" if groups == 1 else "other")
    site.role("weight", 1, "out")
    site.solver.tag(out, "channel")
    site.attribute("in_channels", x[place])
    site.attribute("out_channels", out)
    site.multiply(*x, weight[1], *weight[2:])
    for dim in (*x[place + 1 :], *weight[2:]):
        site.solver.freeze(dim, "a kernel slides over it")
    shape = site.shape()[place + 1 :]
    spatial = [site.solver.fixed(size, "a kernel slides over it") for size in shape]
    return [*x[:place], out, *spatial]


def aten_convolution(site: Site) -> Value:
    """Either of them, told by an argument."""
    return transposed(site) if site.get("transposed") else convolution(site)


RULES: dict[str, Rule] = {
    "linear": linear,
    "bilinear": bilinear,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "convolution": aten_convolution,
    "conv_transpose1d": transposed,
    "conv_transpose2d": transposed,
    "conv_transpose3d": transposed,
}
