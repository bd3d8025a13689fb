"""Fewer nodes for the same numbers, in forms that runtimes know."""

from __future__ import annotations

from typing import Any

__all__ = ["simplify"]


def simplify(model: Any) -> None:
    """Rewrite an `onnx_ir.Model` in place.

    - `x · (1 / d)` becomes `x / d`: what torch writes as `x * rsqrt(v)` is then the form of a root
      mean square norm that onnxruntime makes one kernel of.
    - a reshape of a reshape becomes one.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Mul":
            _divide(node)
        elif node.op_type == "Reshape":
            _skip_reshape(node)


def _divide(product: Any) -> None:
    for place, factor in enumerate(product.inputs):
        made = factor.producer()
        if made is None or made.op_type != "Reciprocal" or made.graph is not product.graph:
            continue
        if any(use.node.op_type != "Mul" for use in factor.uses()) or factor.is_graph_output():
            continue
        product.op_type = "Div"
        product.replace_input_with(0, product.inputs[1 - place])
        product.replace_input_with(1, made.inputs[0])
        _remove_unread(made)
        return


def _skip_reshape(node: Any) -> None:
    inner = node.inputs[0].producer()
    if inner is None or inner.op_type != "Reshape" or inner.graph is not node.graph:
        return
    if not _names_all_sizes(node):
        return
    node.replace_input_with(0, inner.inputs[0])
    _remove_unread(inner)


def _names_all_sizes(reshape: Any) -> bool:
    """Say whether no size is taken from the input, as 0 does where zeros are not allowed."""
    zeros = reshape.attributes.get("allowzero")
    if zeros is not None and zeros.as_int():
        return True
    sizes = reshape.inputs[1].const_value
    return sizes is not None and 0 not in sizes.numpy()


def _remove_unread(node: Any) -> None:
    (output,) = node.outputs
    if not output.uses() and not output.is_graph_output():
        node.graph.remove(node, safe=True)
