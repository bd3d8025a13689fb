"""Keys under which the type of a node's value may be looked up instead of computed again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.ir.modules import describe, is_stock
from fxcompress.ir.ops import module_of

__all__ = ["type_key"]


def type_key(node: fx.Node, values: Mapping[fx.Node, Any]) -> Hashable | None:
    """Return a key that two nodes share only if their results have one type; None if unknown.

    It holds the op, its constants, and sizes, strides, dtypes and devices of operands and state.
    Repeated layers, which make up most of a large model, then cost one evaluation each.
    """
    if node.op == "call_module":
        module = module_of(node)
        if not is_stock(module):
            return None
        config = describe(module)
        target: Hashable = (config.cls, repr(dict(config.kwargs)), module.training, _state(module))
    elif node.op in ("call_function", "call_method"):
        target = node.target
    else:
        return None
    operands = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    leaves, tree = pytree.tree_flatten(operands)
    return node.op, target, str(tree), tuple(_leaf(leaf) for leaf in leaves)


def _state(module: nn.Module) -> Hashable:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return tuple((name, _leaf(tensor)) for name, tensor in tensors)


def _leaf(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(_size, (*value.shape, *value.stride())))
        return value.dtype, value.device, value.dim(), sizes
    return type(value), _size(value) if isinstance(value, torch.SymInt) else str(value)


def _size(size: int | torch.SymInt) -> Hashable:
    return size if isinstance(size, int) else size.node.expr
