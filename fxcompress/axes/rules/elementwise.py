"""Ops that act on each element at its place: operands are unified from the right."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.ir.ops import all_ops

__all__ = ["RULES"]


def elementwise(site: Site) -> Value:
    """Unify all tensor operands."""
    if site.owns_tensors():
        return site.unknown()  # they may mix what the op itself does not
    nodes = [n for n in _nodes(site.args.values()) if isinstance(site.values.get(n), list)]
    return site.broadcast([site.dims_of(node) for node in nodes])


def _nodes(values: Any) -> list[fx.Node]:
    found = []
    for value in values:
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _nodes(value)
    return found


def add(site: Site) -> Value:
    """Unify both operands; what two activations share is a residual stream."""
    result = elementwise(site)
    left, right = site.args.get("input"), site.args.get("other")
    if not (_is_activation(left) and _is_activation(right)):
        return result
    for a, b in zip(site.dims_of(left)[::-1], site.dims_of(right)[::-1], strict=False):
        if a and b and site.static(a):
            site.solver.tag(a, "residual")
    return result


def _is_activation(value: Any) -> bool:
    """Whether a value is computed from inputs, and not only from parameters."""
    while isinstance(value, fx.Node) and value.op != "placeholder":
        sources = value.all_input_nodes
        if len(sources) != 1:
            return bool(sources) or value.op == "call_module"
        if value.op == "call_module":
            return True
        value = sources[0]
    return isinstance(value, fx.Node)


def prelu(site: Site) -> Value:
    """One slope per channel, or one for all."""
    dims, slope = site.dims("input"), site.weight("weight")
    if slope and slope[0] and len(dims) > 1:
        site.solver.unify(slope[0], dims[1])
        site.role("weight", 0, "scale")
        site.attribute("num_parameters", slope[0])
    return dims


def fake_quant(site: Site) -> Value:
    """Scales and zero points follow the axis that they are given per."""
    dims = site.dims("input")
    module: Any = site.module
    if module is None or module.axis is None:
        return dims
    names = ("scale", "zero_point", *(("tracker.low", "tracker.high") if module.tracker else ()))
    for name in names:
        each = site.state(f"{site.node.target}.{name}")
        site.solver.unify(each[0], dims[module.axis])
        if module.group is not None and len(each) > 1:
            _grouped(site, dims, each[1], module.group)
    return dims


def stack_quant(site: Site) -> Value:
    """Scales and zero points follow the matrices, their rows, and the groups of a row."""
    dims = site.dims("input")
    for name in ("scale", "zero_point"):
        matrices, rows, *groups = site.state(f"{site.node.target}.{name}")
        site.solver.unify(matrices, dims[0])
        site.solver.unify(rows, dims[1])
        if groups:
            module: Any = site.module
            _grouped(site, dims[1:], groups[0], module.group)
    return dims


def dynamic_quant(site: Site) -> Value:
    """A range always covers 0, so that what is held at zero does not change it."""
    return site.dims("input")


def float_quant(site: Site) -> Value:
    """A scale per channel follows the channels."""
    dims = site.dims("input")
    module: Any = site.module
    if module is not None and module.axis is not None:
        site.solver.unify(site.state(f"{site.node.target}.scale")[0], dims[module.axis])
    return dims


def binarize(site: Site) -> Value:
    """Scales of a weight follow its channels; what one channel sums stays as it is.

    The sign of a weight that is held at 0 is +1: it would still add to the sum.
    """
    dims = site.dims("input")
    module: Any = site.module
    axis = None if module is None else module.axis
    if site.node.all_input_nodes[0].op == "get_attr":
        for place, dim in enumerate(dims):
            if place != axis:
                site.solver.freeze(dim, "a binary weight that is held at 0 still counts")
    if axis is not None and module.scale is not None:
        site.solver.unify(site.state(f"{site.node.target}.scale")[0], dims[axis])
    return dims


def codebook(site: Site) -> Value:
    """A weight that is held at 0 is no entry of its codebook: nothing may go."""
    dims = site.dims("input")
    for dim in dims:
        site.solver.freeze(dim, "a weight of a codebook that is held at 0 still counts")
    for name in ("anchors", "codebook"):
        for dim in site.state(f"{site.node.target}.{name}"):
            site.solver.freeze(dim, "they are the values of a codebook")
    return dims


def exit_rule(site: Site) -> Value:
    """`[batch, classes]` twice `→ [batch, classes]`: all classes say how sure an answer is."""
    dims = site.broadcast([site.dims("input"), site.dims("other")])
    site.solver.freeze(dims[-1], "an exit asks how sure the answer is of all classes")
    return dims


def _grouped(site: Site, dims: list[Any], groups: Any, size: int) -> None:
    """The elements of a row are cut in runs: runs may go, parts of them may not."""
    if len(dims) != 2:
        for dim in dims[1:]:
            site.solver.freeze(dim, "groups of elements share a quantisation scale")
        return
    inner = site.solver.fixed((size, ()), "a group of elements shares a quantisation scale")
    total = site.solver.size(dims[1])
    if total[0] == size * site.solver.size(groups)[0]:
        site.solver.unify(dims[1], (*groups, *inner))
    else:
        site.solver.freeze(dims[1], "the last quantisation group is not full")


def mask(site: Site) -> Value:
    """A mask has an entry for each of a weight's, so it shrinks with the weight."""
    dims, own = site.dims("input"), site.weight("mask")
    for mine, theirs in zip(own or (), dims, strict=True):
        site.solver.unify(mine, theirs)
    return dims


def isin(site: Site) -> Value:
    """Compare with a set of values."""
    return site.dims("elements")


def cast(site: Site) -> Value:
    """Change the dtype."""
    return site.dims("input")


def real_view(site: Site) -> Value:
    """See a complex tensor as pairs of numbers, last."""
    return [*site.dims("input"), site.solver.fixed((2, ()), "real and imaginary part")]


def complex_view(site: Site) -> Value:
    """See pairs of numbers as complex ones."""
    dims = site.dims("input")
    site.solver.freeze(dims[-1], "real and imaginary part")
    return dims[:-1]


def triangle(site: Site) -> Value:
    """A triangle depends on positions in the last two dimensions."""
    dims = site.dims("input")
    for dim in dims[-2:]:
        site.solver.freeze(dim, "a triangle is taken over it")
    return dims


def _by_kind() -> dict[str, Rule]:
    kinds = ("elementwise", "activation", "dropout", "identity")
    return {op.name: elementwise for op in all_ops() if op.kind in kinds}


RULES: dict[str, Rule] = {
    **_by_kind(),
    "add": add,
    "prelu": prelu,
    "fake_quant": fake_quant,
    "stack_quant": stack_quant,
    "dynamic_quant": dynamic_quant,
    "float_quant": float_quant,
    "binarize": binarize,
    "codebook": codebook,
    "exit": exit_rule,
    "mask": mask,
    "isin": isin,
    "to": cast,
    "type_as": cast,
    "view_as_real": real_view,
    "view_as_complex": complex_view,
    "complex": elementwise,
    "tril": triangle,
    "triu": triangle,
}
