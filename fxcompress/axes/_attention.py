"""Recognise attention written out: a product, a softmax over its last dimension, a product."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxcompress.axes._site import Value
from fxcompress.axes._solver import Dim, Solver
from fxcompress.ir import Program, bind, op_name, op_spec

__all__ = ["products_around", "tag_attention"]

_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
_STEPS = 16


def tag_attention(program: Program, values: Mapping[fx.Node, Value], solver: Solver) -> None:
    """Tag heads and head widths around every softmax between two products of activations."""
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr", "output") or op_name(node) != "softmax":
            continue
        for product in products_around(node) or ():
            _tag(product, values, solver)


def products_around(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the product that a softmax is taken of and the one that reads it, if it is attention.

    Element-wise ops and reshapes may stand between them.
    """
    scores, mixed = _before(softmax), _after(softmax)
    return None if scores is None or mixed is None else (scores, mixed)


def _tag(product: fx.Node, values: Mapping[fx.Node, Value], solver: Solver) -> None:
    result = _dims(product, values)
    operands = [_dims(source, values) for source in product.all_input_nodes[-2:]]
    if len(operands) != 2 or not all(len(each) >= 3 for each in (result, *operands)):
        return
    shared = {leaf for dim in result for leaf in solver.leaves(dim)}
    for operand in operands:
        for dim in operand:
            for leaf in solver.leaves(dim):
                if leaf.frozen is None and leaf not in shared:
                    solver.tag((leaf,), "head_width")
    both = [{leaf for dim in operand for leaf in solver.leaves(dim)} for operand in operands]
    outer = result[:-2] if op_name(product) != "einsum" else result
    leaves = (leaf for dim in outer for leaf in solver.leaves(dim))
    heads = [e for e in leaves if e.frozen is None and e in both[0] and e in both[1]]
    solver.tag_heads([(leaf,) for leaf in heads])
    for leaf in solver.leaves(result[-1]):
        if leaf.frozen is None:
            solver.tag((leaf,), "head_width")


def _dims(node: fx.Node, values: Mapping[fx.Node, Value]) -> list[Dim]:
    found = values.get(node)
    return found if isinstance(found, list) else []


def _before(node: fx.Node) -> fx.Node | None:
    """Return the product that a softmax is taken of, through element-wise ops and reshapes."""
    current = bind(node).get("input")
    for _ in range(_STEPS):
        if not isinstance(current, fx.Node) or current.op in ("placeholder", "get_attr"):
            return None
        if op_name(current) in _PRODUCTS:
            return current
        if not _passes(current):
            return None
        sources = [n for n in current.all_input_nodes if n.op != "get_attr"]
        products = [n for n in sources if n.op != "placeholder"]
        current = products[0] if products else None
    return None


def _after(node: fx.Node) -> fx.Node | None:
    """Return the product that reads the shares."""
    current = node
    for _ in range(_STEPS):
        if not current.users:
            return None
        user = next(iter(current.users))
        if user.op == "output":
            return None
        if op_name(user) in _PRODUCTS:
            return user
        if not _passes(user):
            return None
        current = user
    return None


def _passes(node: fx.Node) -> bool:
    name = op_name(node)
    spec = op_spec(name)
    return spec is not None and (spec.elementwise or spec.shape_only or name in ("max", "min"))
