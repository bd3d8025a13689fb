"""Keep the gradient of the original: `detach` where it matters, and nowhere else."""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.ir._recorder._state import ModelState

__all__ = ["settle_gradients"]


def settle_gradients(graph: fx.Graph, state: ModelState, trainable: set[str]) -> None:
    """Remove each `detach` that stops nothing, and add one where a `no_grad` block stopped it.

    Args:
        graph: A recorded graph.
        state: The model's tensors by name.
        trainable: Names of the leaf modules that hold a parameter that requires a gradient.
    """
    carries: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        incoming = any(carries.get(n, False) for n in node.all_input_nodes)
        if node.op == "placeholder":
            carries[node] = _can_carry(node)
        elif node.op == "get_attr":
            tensor = state.tensors.get(str(node.target))
            carries[node] = tensor is not None and tensor.requires_grad
        elif node.op == "output":
            continue
        elif node.target is torch.detach:
            carries[node] = False
            if not incoming:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        elif node.meta.get("no_grad"):
            here = incoming or (node.op == "call_module" and node.target in trainable)
            carries[node] = here and _can_carry(node)
            if carries[node]:
                _stop(graph, node, carries)
        else:
            here = incoming or (node.op == "call_module" and node.target in trainable)
            carries[node] = here and _can_carry(node)


def _can_carry(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return True
    if not isinstance(value, torch.Tensor):
        return False
    return value.is_floating_point() or value.is_complex()


def _stop(graph: fx.Graph, node: fx.Node, carries: dict[fx.Node, bool]) -> None:
    users = [user for user in node.users if not user.meta.get("no_grad")]
    if not users or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    with graph.inserting_after(node):
        stopped = graph.call_function(torch.detach, (node,))
    stopped.meta = dict(node.meta)
    carries[stopped] = False
    for user in users:
        user.replace_input_with(node, stopped)
