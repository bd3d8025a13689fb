"""Products: the contracted dimensions are unified, the others go to the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

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


def product(site: Site, left: list[Dim], right: list[Dim]) -> list[Dim]:
    """Return the dims of `left @ right`, broadcasting what comes before the matrices."""
    if len(left) == 1 and len(right) == 1:
        site.solver.unify(left[0], right[0])
        site.multiply(left[0])
        return []
    if len(right) == 1:
        site.solver.unify(left[-1], right[0])
        site.multiply(*left)
        return left[:-1]
    if len(left) == 1:
        site.solver.unify(left[0], right[-2])
        site.multiply(*right)
        return [*right[:-2], right[-1]]
    site.solver.unify(left[-1], right[-2])
    batch = site.broadcast([left[:-2], right[:-2]]) if left[:-2] or right[:-2] else []
    result = [*batch, left[-2], right[-1]]
    site.multiply(*result, left[-1])
    return result


def matmul(site: Site) -> Value:
    """`[..., m, k] × [..., k, n] → [..., m, n]`."""
    names = [name for name in ("input", "other", "mat2", "vec", "tensor") if name in site.args]
    left, right = (site.dims(name) for name in names[:2])
    for name, dims, roles in ((names[1], right, ("in", "out")), (names[0], left, ("out", "in"))):
        if len(dims) >= 2 and site.tensor_name(name) is not None:
            site.role(name, len(dims) - 2, roles[0])  # type: ignore[arg-type]
            site.role(name, len(dims) - 1, roles[1])  # type: ignore[arg-type]
            site.solver.tag(dims[-1] if roles[1] == "out" else dims[-2], "neuron")
            if len(dims) == 3:
                site.solver.tag(dims[0], "expert")
    return product(site, left, right)


def added(site: Site) -> Value:
    """`input + mat1 × mat2`."""
    left = site.dims("mat1") or site.dims("batch1")
    right = site.dims("mat2") or site.dims("batch2")
    name = "mat2" if "mat2" in site.args else "batch2"
    if len(right) == 2 and site.tensor_name(name) is not None:
        site.role(name, 0, "in")
        site.role(name, 1, "out")
        site.role("input", 0, "bias")
        site.solver.tag(right[1], "neuron")
    return site.broadcast([product(site, left, right), site.dims("input")])


def inner(site: Site) -> Value:
    """Contract the last dimensions."""
    left, right = site.dims("input"), site.dims("other")
    site.solver.unify(left[-1], right[-1])
    site.multiply(*left, *right[:-1])
    return [*left[:-1], *right[:-1]]


def outer(site: Site) -> Value:
    """Every pair of elements."""
    return [site.dims("input")[0], site.dims("vec2")[0]]


def einsum(site: Site) -> Value:
    """One dimension per letter."""
    equation = site.args["equation"]
    operands = site.args.get("operands", ())
    operands = operands if isinstance(operands, (tuple, list)) else (operands,)
    left, _, right = equation.replace(" ", "").partition("->")
    shared: dict[str, Dim] = {}
    for letters, operand in zip(left.split(","), operands, strict=True):
        dims = site.dims_of(operand)
        for letter, dim in zip(_spell(letters, len(dims)), dims, strict=True):
            known = shared.get(letter, UNIT)
            if known and dim:
                site.solver.unify(known, dim)
            else:
                shared[letter] = known or dim
    if len(operands) > 1:
        site.multiply(*shared.values())
        _weights(site, left.split(","), operands, right)
    if "->" not in equation:
        counts = [c for c in left if c.isalpha()]
        right = "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
        right = ("..." if "..." in left else "") + right
    dots = sorted((k for k in shared if k.startswith(".")), key=lambda k: -int(k[1:]))
    result: list[Dim] = []
    head, ellipsis, tail = right.partition("...")
    for letter in [*head, *(dots if ellipsis else ()), *tail]:
        result.append(shared[letter])
    return result


def _weights(site: Site, spelled: list[str], operands: Sequence[Any], right: str) -> None:
    """Tell what the letters of a parameter do: made, read, or one per expert."""
    for place, (letters, operand) in enumerate(zip(spelled, operands, strict=True)):
        name = site.tensor_of(operand) if isinstance(operand, fx.Node) else None
        if name is None or "." in letters:
            continue
        others = "".join(spelled[:place] + spelled[place + 1 :])
        for i, (letter, dim) in enumerate(zip(letters, site.dims_of(operand), strict=True)):
            if letter not in right:
                site.roles.setdefault((name, i), "in")
            elif letter not in others:
                site.roles.setdefault((name, i), "out")
                site.solver.tag(dim, "neuron")
            elif len(letters) == 3:
                site.solver.tag(dim, "expert")


def _spell(letters: str, rank: int) -> list[str]:
    """Return a label per dimension; those of an ellipsis are numbered from its right."""
    head, dots, tail = letters.partition("...")
    hidden = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f".{place}" for place in range(hidden, 0, -1)), *tail]


def grouped_mm(site: Site) -> Value:
    """Rows sorted by expert times one matrix per expert: `[T, K] × [E, K, N] → [T, N]`."""
    left, right = site.dims("mat_a"), site.dims("mat_b")
    if len(left) != 2 or len(right) != 3:
        site.freeze_all("a grouped product of this form has no rule")
        return site.fixed_result("a grouped product of this form has no rule")
    site.solver.unify(left[1], right[1])
    site.solver.freeze(right[0], "rows are given to it by offsets")
    site.solver.freeze(left[0], "rows are sorted by expert")
    site.role("mat_b", 1, "in")
    site.role("mat_b", 2, "out")
    site.solver.tag(right[2], "neuron")
    site.multiply(left[0], left[1], right[2])
    return [left[0], right[2]]


def weight_norm(site: Site) -> Value:
    """`g · v / ‖v‖`: a norm is a sum, which nothing removed adds to."""
    return site.broadcast([site.dims("v"), site.dims("g")])


def tensordot(site: Site) -> Value:
    """Contract the dimensions named, or the last of one with the first of the other."""
    left, right, dims = site.dims("a"), site.dims("b"), site.args.get("dims", 2)
    if isinstance(dims, int):
        over = ([*range(len(left) - dims, len(left))], [*range(dims)])
    else:
        over = tuple(
            [d % len(o) for d in each] for each, o in zip(dims, (left, right), strict=True)
        )  # type: ignore[assignment]
    for a, b in zip(*over, strict=True):
        site.solver.unify(left[a], right[b])
    site.multiply(*left, *(d for i, d in enumerate(right) if i not in over[1]))
    return [
        *(d for i, d in enumerate(left) if i not in over[0]),
        *(d for i, d in enumerate(right) if i not in over[1]),
    ]


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
    "addmm": added,
    "baddbmm": added,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "mv": matmul,
    "dot": matmul,
    "inner": inner,
    "outer": outer,
    "einsum": einsum,
    "tensordot": tensordot,
    "grouped_mm": grouped_mm,
    "weight_norm": weight_norm,
}
