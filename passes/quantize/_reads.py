"""What the nodes of a graph read and compute, as placement asks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxcompress.ir.ops import bind, op_name

__all__ = ["combined", "depend_on_inputs", "is_float", "is_only_operand", "pads_with_values"]


def combined(node: fx.Node) -> list[Any]:
    """Return the tensors that an op combines (or should have been tensors)."""
    bound = bind(node)
    if "tensors" in bound and isinstance(bound["tensors"], (tuple, list)):
        return list(bound["tensors"])
    if "input" in bound and "other" in bound:
        return [bound["input"], bound["other"]]
    if op_name(node) == "cat" and isinstance(node.args[0], (tuple, list)):
        return list(node.args[0])
    return [node.args[0]] if node.args else list(node.kwargs.values())[:1]


def is_only_operand(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a node reads nothing but `operand`."""
    return list(node.all_input_nodes) == [operand]


def is_float(node: fx.Node) -> bool:
    """Whether a node gives one tensor of floating point."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def depend_on_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that compute with what the model is given."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def pads_with_values(node: fx.Node) -> bool:
    """Whether a pad writes only zeros or values of what it pads."""
    bound = bind(node)
    return bound.get("mode", "constant") != "constant" or not bound.get("value")
