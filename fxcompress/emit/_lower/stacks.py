"""Stacks of quantised matrices, written as weights with two dimensions.

Matrices of one width, one below another, are one matrix with a scale for each row: the weight of a
linear layer, which every lowering knows. A stack whose matrices differ is put together again.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn

from fxcompress.emit._lower.graph import tensor_at
from fxcompress.nn import StackQuantize

__all__ = ["stack_quantizer", "write_stacks"]

_FLOAT: Final = 0


def stack_quantizer(node: Any) -> StackQuantize | None:
    """Return the module of a node that quantises a stack that is a parameter."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None, "a graph of a module"
    found = owner.get_submodule(str(node.target))
    source = node.args[0] if node.args else None
    held = isinstance(source, fx.Node) and source.op == "get_attr"
    return found if isinstance(found, StackQuantize) and held else None


def write_stacks(module: fx.GraphModule) -> None:
    """Replace every StackQuantize by quantizers of matrices, in place."""
    changed = False
    for node in list(module.graph.nodes):
        quantizer = stack_quantizer(node)
        if quantizer is not None:
            _write(module, node, quantizer)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()


def _write(module: fx.GraphModule, node: fx.Node, quantizer: StackQuantize) -> None:
    graph = module.graph
    source = cast(fx.Node, node.args[0])
    stack = tensor_at(module, str(source.target)).detach()
    path = str(node.target)
    with graph.inserting_before(node):
        made = []
        order: list[int] = []
        for width, matrices in quantizer.parts.items():
            values = stack if len(matrices) == len(stack) else stack[matrices]
            order += matrices
            if width == _FLOAT:
                made.append(_hold(module, f"{path}_float", values))
                continue
            name = f"{path}_{width}bit"
            rows = _hold(module, f"{name}_rows", values.flatten(0, 1))
            module.set_submodule(name, quantizer.quantizer(matrices))
            rounded = graph.call_module(name, (rows,))
            rounded.meta = dict(rows.meta)
            shaped = graph.call_method("reshape", (rounded, tuple(values.shape)))
            shaped.meta = _like(source, values)
            made.append(shaped)
        whole = made[0]
        if len(made) > 1:
            whole = graph.call_function(torch.cat, (made,))
            whole.meta = _like(source, stack)
        if order != sorted(order):
            places = _hold(module, f"{path}_order", torch.tensor(order).argsort())
            whole = graph.call_function(torch.index_select, (whole, 0, places))
            whole.meta = _like(source, stack)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _hold(module: fx.GraphModule, path: str, value: Tensor) -> fx.Node:
    """Store a tensor and return a node that reads it."""
    holder = nn.Module()
    holder.register_buffer("weight", value)
    module.set_submodule(path, holder)
    found = module.graph.get_attr(f"{path}.weight")
    found.meta["val"] = torch.empty_like(value, device="meta")
    return found


def _like(source: fx.Node, value: Tensor) -> dict[str, Any]:
    """Return the metadata of a node that gives such a value where `source` stood."""
    return {**source.meta, "val": torch.empty_like(value, device="meta")}
