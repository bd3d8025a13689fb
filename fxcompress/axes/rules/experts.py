"""The leaf of a mixture of experts: all of them share a width and a hidden width."""

from __future__ import annotations

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.nn import Experts

__all__ = ["RULES"]


def experts(site: Site) -> Value:
    """`[..., width]`, `[..., k]` twice `→ [..., width]`, through `[experts, hidden, width]`.

    Nothing is removed of one expert alone: its matrices lie in one tensor with those of the others.
    """
    assert isinstance(site.module, Experts)
    solver, x = site.solver, site.dims("input")
    choices = site.broadcast([site.dims("weights"), site.dims("indices")])
    each, hidden, width = site.weight("up") or []
    solver.tag(each, "expert")
    solver.freeze(each, "experts are chosen by number (moe.prune_experts removes some)")
    solver.freeze(choices[-1], "the experts of a token")
    solver.tag(hidden, "neuron")
    for left, right in zip(x, (*choices[:-1], width), strict=True):
        solver.unify(left, right)
    for name in ("gate", "up", "down"):
        inner, outer = (width, hidden) if name == "down" else (hidden, width)
        matrix, bias = site.weight(name), site.weight(f"{name}_bias")
        if matrix is None:
            continue
        for own, shared in zip(matrix, (each, inner, outer), strict=True):
            solver.unify(own, shared)
        site.role(name, 1, "out")
        site.role(name, 2, "in")
        if bias is not None:
            solver.unify(bias[0], each)
            solver.unify(bias[1], inner)
            site.role(f"{name}_bias", 1, "bias")
        site.multiply(*choices, hidden, width)
    return [*x[:-1], width]


RULES: dict[str, Rule] = {"experts": experts}
