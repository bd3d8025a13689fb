"""Copy a graph module without copying a single tensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

__all__ = ["assemble", "copy_module", "copy_tree", "tensors_of"]


def copy_tree(module: nn.Module, tensors: dict[int, Any] | None = None) -> nn.Module:
    """Return `module` with its own Python state and submodules, and the same tensors.

    Args:
        module: The module to copy.
        tensors: `id(tensor)` -> what stands in its place in the copy; the tensor itself where
            it names none.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(module):
        memo[id(tensor)] = tensor
    memo.update(tensors or {})
    return copy.deepcopy(module, memo)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Return every tensor that `module` can reach: parameters, buffers and plain attributes."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    stack: list[Any] = [m.__dict__ for m in module.modules()]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            stack.extend(value)
    return list(found.values())


def assemble(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a graph module whose children, parameters and buffers are those of `root`.

    `fx.GraphModule(root, graph)` would register every buffer as a persistent one.
    """
    result = fx.GraphModule(nn.Module(), fx.Graph(), class_name=name)
    result._modules.update(root._modules)
    result._parameters.update(root._parameters)
    result._buffers.update(root._buffers)
    result._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
    result.graph = graph
    result.training = root.training
    return result


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph module with its own graph and module tree, and the same tensors.

    Training flags, persistence of buffers and the calling convention are kept.
    """
    root = nn.Module()
    copies: dict[int, nn.Module] = {id(module): root}
    root._modules.update(
        (name, None if child is None else _shallow(child, copies))
        for name, child in module._modules.items()
    )
    root._parameters.update(module._parameters)
    root._buffers.update(module._buffers)
    root._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    root.training = module.training
    return assemble(root, _copy_graph(module.graph), module.__class__.__name__)


def _copy_graph(source: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = dict(node.meta)
    graph._codegen = copy.deepcopy(source._codegen)
    return graph


def _shallow(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    new = copy.copy(module)
    copies[id(module)] = new
    new.__dict__["_parameters"] = dict(module._parameters)
    new.__dict__["_buffers"] = dict(module._buffers)
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    new.__dict__["_modules"] = {
        name: None if child is None else _shallow(child, copies)
        for name, child in module._modules.items()
    }
    return new
