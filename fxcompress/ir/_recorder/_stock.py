"""Functional norms, linear maps and convolutions on a module's own parameters, as stock modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.ir._recorder._state import ModelState
from fxcompress.ir.ops import op_of

__all__ = ["fold_stock_modules"]

Arguments = Mapping[str, Any]


def fold_stock_modules(
    graph: fx.Graph,
    leaves: dict[str, nn.Module],
    model: nn.Module,
    state: ModelState,
    *,
    training: bool,
) -> None:
    """Replace functional calls on the own parameters of a module by that module's stock form.

    A call `F.layer_norm(x, …, self.weight, self.bias)` inside module `norm` becomes a call of a
    `LayerNorm` named `norm`. Only where the parameters reach the call unedited, are called
    `weight` and `bias` in the module whose forward makes the call, and are all it has.
    """
    candidates: dict[str, list[tuple[fx.Node, nn.Module]]] = {}
    refused: set[str] = set()
    for node in graph.nodes:
        make = _MAKERS.get(node.target) if node.op == "call_function" else None
        path = node.meta["scope"][-1][0] if make and node.meta.get("scope") else ""
        if make is None or not path or path in leaves:
            continue
        stock = _stock(node, make, path, model, state, training)
        if stock is None:
            refused.add(path)
        else:
            candidates.setdefault(path, []).append((node, stock))
    for path, calls in candidates.items():
        first = calls[0][1]
        if path in refused or any(repr(stock) != repr(first) for _, stock in calls):
            continue
        leaves[path] = first
        for node, _ in calls:
            _call_module(graph, node, path)


def _call_module(graph: fx.Graph, node: fx.Node, path: str) -> None:
    with graph.inserting_before(node):
        call = graph.call_module(path, (node.args[0],))
    call.meta = dict(node.meta)
    call.meta["scope"] = node.meta["scope"][:-1]
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _stock(
    node: fx.Node,
    make: Callable[[Arguments, fx.Node, nn.Module], nn.Module | None],
    path: str,
    model: nn.Module,
    state: ModelState,
    training: bool,
) -> nn.Module | None:
    op = op_of(node.target)
    owner = model.get_submodule(path)
    if op is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if any(list(child.parameters()) for child in owner.children()):
        return None
    bound = op.bind(node.args, node.kwargs, node.target)
    if bound.get("training", training) != training:
        return None
    with torch.device("meta"):
        stock = make(bound, node, owner)
    if stock is None or not _holds_exactly(stock, bound, path, owner, state):
        return None
    stock.train(training)
    return stock


def _holds_exactly(
    stock: nn.Module, bound: Arguments, path: str, owner: nn.Module, state: ModelState
) -> bool:
    own = {**owner._parameters, **owner._buffers}
    needed = {**stock._parameters, **stock._buffers}
    if {k for k, v in own.items() if v is not None} != {
        k for k, v in needed.items() if v is not None
    }:
        return False
    for name, placeholder in needed.items():
        if placeholder is None or name == "num_batches_tracked":
            continue
        node, tensor = bound.get(name), own[name]
        if not isinstance(node, fx.Node) or node.op != "get_attr" or tensor is None:
            return False
        full = f"{path}.{name}"
        if node.target != state.ties.get(full, full) or tensor.shape != placeholder.shape:
            return False
        if isinstance(placeholder, nn.Parameter) != isinstance(tensor, nn.Parameter):
            return False
    return True


def _value(bound: Arguments, name: str) -> Any:
    node = bound.get(name)
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _linear(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    weight = _value(bound, "weight")
    if weight is None or weight.dim() != 2:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bound.get("bias") is not None)


def _convolution(cls: type[nn.Module]) -> Callable[[Arguments, fx.Node, nn.Module], Any]:
    def make(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
        weight = _value(bound, "weight")
        groups = bound.get("groups", 1)
        settings = {
            name: bound[name]
            for name in ("stride", "padding", "dilation", "output_padding")
            if name in bound
        }
        if weight is None or not all(_plain(v) for v in (groups, *settings.values())):
            return None
        transposed = "Transpose" in cls.__name__
        grouped, whole = weight.shape[1] * groups, weight.shape[0]
        channels = (whole, grouped) if transposed else (grouped, whole)
        bias = bound.get("bias") is not None
        return cls(*channels, tuple(weight.shape[2:]), groups=groups, bias=bias, **settings)

    return make


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _layer_norm(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    shape = bound["normalized_shape"]
    if bound.get("weight") is None or not _plain(shape):
        return None
    eps, bias = bound.get("eps", 1e-5), bound.get("bias") is not None
    return nn.LayerNorm(list(shape), eps=eps, bias=bias)


def _rms_norm(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    shape = bound["normalized_shape"]
    if bound.get("weight") is None or not _plain(shape):
        return None
    return nn.RMSNorm(list(shape), eps=bound.get("eps"))


def _group_norm(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    weight = _value(bound, "weight")
    if weight is None or bound.get("bias") is None:
        return None
    return nn.GroupNorm(bound["num_groups"], weight.shape[0], eps=bound.get("eps", 1e-5))


_BATCH_NORMS: Final = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip


def _batch_norm(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    x, mean = _value(bound, "input"), _value(bound, "running_mean")
    if x is None or mean is None or x.dim() not in _BATCH_NORMS:
        return None
    return _BATCH_NORMS[x.dim()](
        mean.shape[0],
        eps=bound.get("eps", 1e-5),
        momentum=getattr(owner, "momentum", bound.get("momentum", 0.1)),
        affine=bound.get("weight") is not None,
    )


def _embedding(bound: Arguments, node: fx.Node, owner: nn.Module) -> nn.Module | None:
    weight = _value(bound, "weight")
    if weight is None or bound.get("max_norm") is not None:
        return None
    padding = bound.get("padding_idx")
    return nn.Embedding(
        weight.shape[0], weight.shape[1], padding_idx=None if padding in (None, -1) else padding
    )


_MAKERS: Final[dict[Any, Callable[[Arguments, fx.Node, nn.Module], nn.Module | None]]] = {
    F.linear: _linear,
    F.conv1d: _convolution(nn.Conv1d),
    F.conv2d: _convolution(nn.Conv2d),
    F.conv3d: _convolution(nn.Conv3d),
    F.conv_transpose1d: _convolution(nn.ConvTranspose1d),
    F.conv_transpose2d: _convolution(nn.ConvTranspose2d),
    F.conv_transpose3d: _convolution(nn.ConvTranspose3d),
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
}
