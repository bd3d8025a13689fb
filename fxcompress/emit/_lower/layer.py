"""A layer with a stored weight, called as a module or as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.emit._lower.graph import CONVOLUTIONS, LAYERS, TRANSPOSED, tensor_at
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import OperandLinear

__all__ = ["LayerCall", "layer_call"]

_FUNCTIONS: Final[dict[str, Callable[..., Tensor]]] = {
    "linear": F.linear,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
}
_GEOMETRY: Final = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class LayerCall:
    """What a layer computes.

    Attributes:
        source: The activation.
        weight: The weight.
        bias: Its values.
        function: Of the activation, the weight, a bias and `geometry`; None where the layer is no
            kernel that runtimes have.
        geometry: Stride, padding, dilation and groups of a convolution.
        name: Where things that belong to the layer go.
    """

    source: fx.Node
    weight: fx.Node
    bias: Tensor | None
    function: Callable[..., Tensor] | None
    geometry: tuple[Any, ...]
    name: str


def layer_call(module: fx.GraphModule, node: fx.Node, quantizer: str) -> LayerCall | None:
    """Return what a convolution or linear layer computes; None for other nodes.

    Args:
        module: The graph's.
        node: A node that reads a weight.
        quantizer: The path of the weight's quantizer, which names layers that have no path.
    """
    if node.op == "call_module":
        layer: Any = module.get_submodule(str(node.target))
        if not isinstance(layer, LAYERS) or len(node.args) < 2:
            return None
        source, weight = node.args[:2]
        assert isinstance(source, fx.Node), "an operand layer reads nodes"
        assert isinstance(weight, fx.Node), "an operand layer reads nodes"
        function, geometry = _of_module(cast(nn.Module, layer))
        bias = getattr(layer, "bias", None)
        return LayerCall(source, weight, bias, function, geometry, str(node.target))
    op = op_name(node)
    if op not in _FUNCTIONS:
        return None
    bound = bind(node)
    source, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return None
    geometry = tuple(bound.get(name, default) for name, default in _GEOMETRY.items())
    values = tensor_at(module, str(bias.target)) if isinstance(bias, fx.Node) else None
    name = quantizer.removesuffix("_fq")
    return LayerCall(
        source, weight, values, _FUNCTIONS[op], () if op == "linear" else geometry, name
    )


def _of_module(layer: nn.Module) -> tuple[Callable[..., Tensor] | None, tuple[Any, ...]]:
    if isinstance(layer, OperandLinear):
        return F.linear, ()
    if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(layer, tuple(TRANSPOSED)):
        return None, ()
    function = CONVOLUTIONS.get(type(layer))
    return function, tuple(getattr(layer, name) for name in _GEOMETRY) if function else ()
