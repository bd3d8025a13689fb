"""The module tree of a Program: stock leaves, free parameters and buffers, under original names."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import fx, nn

from fxcompress.ir._copying import assemble
from fxcompress.ir._recorder._state import ModelState

__all__ = ["build_module"]


def build_module(
    model: nn.Module,
    graph: fx.Graph,
    leaves: Mapping[str, nn.Module],
    state: ModelState,
    constants: Mapping[str, torch.Tensor],
    name: str,
) -> fx.GraphModule:
    """Return the graph module of a graph.

    Args:
        model: The original; its tensors are shared.
        graph: What the module computes.
        leaves: Qualified name -> leaf module. Their configuration is copied, their tensors are
            those of the model.
        state: The model's tensors by name.
        constants: Tensors that belong to no module of the model.
        name: Class name of the result.
    """
    root = nn.Module()
    root.training = model.training
    # In graph order: a set's order differs between processes, and files must not.
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module")
    for path in sorted(used, key=lambda p: p.count(".")):
        leaf = _with_real_tensors(path, leaves[path], state)
        parent, child = _owner(root, path, model)
        existing = parent._modules.get(child)
        if existing is not None:
            leaf._modules.update(existing._modules)
        parent._modules[child] = leaf
    for target in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"):
        _install(root, target, model, state, constants)
    _install_ties(root, model, state)
    _mirror_training(root, model)
    return assemble(root, graph, name)


def _owner(root: nn.Module, path: str, model: nn.Module) -> tuple[nn.Module, str]:
    *parents, child = path.split(".")
    owner = root
    for part in parents:
        found = owner._modules.get(part)
        if found is None:
            found = nn.Module()
            found.training = model.training
            owner._modules[part] = found
        owner = found
    return owner, child


def _with_real_tensors(path: str, leaf: nn.Module, state: ModelState) -> nn.Module:
    """Return a copy of a leaf that holds the model's own tensors, and calls nothing in place."""
    new = copy.copy(leaf)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = dict(getattr(leaf, kind))
    new.__dict__["_non_persistent_buffers_set"] = set(leaf._non_persistent_buffers_set)
    for kind in ("_parameters", "_buffers"):
        own = new.__dict__[kind]
        for name, value in own.items():
            real = _real(f"{path}.{name}", state) if value is not None else None
            own[name] = value if real is None else real
    for name, child in leaf._modules.items():
        if child is not None:
            new._modules[name] = _with_real_tensors(f"{path}.{name}", child, state)
    if getattr(new, "inplace", False) is True:
        new.__dict__["inplace"] = False
    if isinstance(new, nn.RNNBase):
        new._flat_weights = [getattr(new, n) for n in new._flat_weights_names]
    return new


def _real(name: str, state: ModelState) -> torch.Tensor | None:
    return state.tensors.get(state.ties.get(name, name))


def _install(
    root: nn.Module,
    target: str,
    model: nn.Module,
    state: ModelState,
    constants: Mapping[str, torch.Tensor],
) -> None:
    owner, name = _owner(root, target, model)
    tensor = _real(target, state)
    if tensor is None:
        owner.register_buffer(name, constants[target], persistent=False)
    elif isinstance(tensor, nn.Parameter):
        owner._parameters[name] = tensor
    else:
        persistent = target not in state.transient and target not in state.plain
        owner._buffers[name] = tensor
        if not persistent:
            owner._non_persistent_buffers_set.add(name)


def _install_ties(root: nn.Module, model: nn.Module, state: ModelState) -> None:
    """Give a tied tensor all its names, so that the state dict keeps the original's keys."""
    held = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    held |= {name for name, _ in root.named_buffers(remove_duplicate=False)}
    present = {state.ties.get(name, name) for name in held}
    for alias, first in state.ties.items():
        if first in present:
            for name in (first, alias):
                if name not in held:
                    _install(root, name, model, state, {})
                    held.add(name)


def _mirror_training(root: nn.Module, model: nn.Module) -> None:
    flags = {path: module.training for path, module in model.named_modules()}
    for path, module in root.named_modules():
        module.training = flags.get(path, model.training)
