"""Products: the contracted dimensions are unified, the others go to the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._solver import UNIT, Dim

__all__ = ["RULES"]


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
        return site.unknown()
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
