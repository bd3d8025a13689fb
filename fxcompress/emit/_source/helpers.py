"""Modules of fxcompress that the emitted source carries a short copy of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.emit._integers import IntegerWeight, PackedWeight
from fxcompress.emit._levels import (
    BinaryWeight,
    CodebookWeight,
    Float8Rounding,
    Float8Weight,
    Signs,
)
from fxcompress.nn import (
    DynamicQuantize,
    Experts,
    FakeQuantize,
    OperandConv1d,
    OperandConv2d,
    OperandConv3d,
    OperandConvTranspose1d,
    OperandConvTranspose2d,
    OperandConvTranspose3d,
    OperandEmbedding,
    OperandExperts,
    OperandGRU,
    OperandLinear,
    OperandLSTM,
    OperandRNN,
)
from fxcompress.nn.exits import Exit, Undecided
from fxcompress.nn.routing import TopTokens
from fxcompress.nn.stochastic import StochasticDepth

__all__ = ["HELPERS", "Helper", "IntegerLayer", "merge_weights"]


class IntegerLayer(nn.Module):
    """A layer and its integer weight, as one leaf of the emitted source.

    Attributes:
        layer: The layer, for its settings.
        weight: 8-bit integers.
        weight_scale: One scale per output channel, shaped to broadcast.
    """

    def __init__(self, layer: nn.Module, stored: IntegerWeight) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.register_buffer("weight", stored.weight)
        self.register_buffer("weight_scale", stored.scale)
        self.register_parameter("bias", cast(Any, layer).bias)


class IntegerConv1d(IntegerLayer):
    """Of an `OperandConv1d`."""


class IntegerConv2d(IntegerLayer):
    """Of an `OperandConv2d`."""


class IntegerConv3d(IntegerLayer):
    """Of an `OperandConv3d`."""


class IntegerLinear(IntegerLayer):
    """Of an `OperandLinear`."""


class GivenExperts(nn.Module):
    """Experts that are given their matrices, for the emitted source.

    Attributes:
        experts: How many there are.
        width: Features of a token.
        hidden: Features between an expert's matrices.
    """

    def __init__(self, leaf: OperandExperts, up: torch.Size) -> None:
        super().__init__()
        self.experts, self.hidden, self.width = up
        self.activation, self.limit, self.dropout = leaf.activation, leaf.limit, leaf.dropout
        self.biases = leaf.biases
        for name in self.biases:
            self.register_parameter(f"{name}_bias", getattr(leaf, f"{name}_bias"))


@dataclass(frozen=True)
class Helper:
    """A class of the template: its name, and the arguments that make one like a given module."""

    name: str
    arguments: Callable[[Any], Mapping[str, Any]]


def _conv(module: IntegerLayer) -> dict[str, Any]:
    conv: Any = module.layer
    arguments = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
    }
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True}
    settings = {name: getattr(conv, name) for name in defaults}
    settings["bias"] = conv.bias is not None
    for name, value in settings.items():
        same = isinstance(value, tuple) and len(set(value)) == 1
        plain = value[0] if same else value
        if plain != defaults[name]:
            arguments[name] = plain
    kernel = conv.kernel_size
    arguments["kernel_size"] = kernel[0] if len(set(kernel)) == 1 else tuple(kernel)
    return arguments


def _linear(module: IntegerLayer) -> dict[str, Any]:
    linear: Any = module.layer
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    return sizes if linear.bias is not None else {**sizes, "bias": False}


def _fake_quantize(module: FakeQuantize) -> dict[str, Any]:
    if module.axis is None:
        return {"qmin": module.qmin, "qmax": module.qmax}
    return {"qmin": module.qmin, "qmax": module.qmax, "shape": tuple(module.scale.shape)}


def _integer_weight(module: IntegerWeight) -> dict[str, Any]:
    weight, scale = module.weight, module.scale
    arguments: dict[str, Any] = {"shape": tuple(weight.shape), "scale_shape": tuple(scale.shape)}
    if module.zero_point is not None:
        arguments["zero_point"] = True
    missing = -(weight.numel() // weight.shape[0]) % module.group if module.group else 0
    if missing:
        arguments["padding"] = missing
    if weight.dtype is not torch.int8:
        arguments["dtype"] = weight.dtype
    return arguments


def _packed_weight(module: PackedWeight) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "shape": module.shape,
        "scale_shape": tuple(module.scale.shape),
        "bits": module.bits,
    }
    if module.grouped != module.shape:
        arguments["grouped"] = True
    if module.padding:
        arguments["padding"] = module.padding
    if module.zero_point is None:
        arguments["zero"] = module.zero
    if module.dtype is not torch.float32:
        arguments["dtype"] = module.dtype
    return arguments


def _codebook_weight(module: CodebookWeight) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "shape": module.shape,
        "table_shape": tuple(module.codebook.shape),
        "bits": module.bits,
    }
    if module.axis:
        arguments["axis"] = module.axis
    if module.rows != 1:
        arguments["rows"] = module.rows
    return arguments if module.dtype is torch.float32 else {**arguments, "dtype": module.dtype}


def _float8_weight(module: Float8Weight) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "shape": tuple(module.weight.shape),
        "scale_shape": tuple(module.scale.shape),
        "stored": module.weight.dtype,
    }
    return arguments if module.dtype is torch.float32 else {**arguments, "dtype": module.dtype}


def _float8_rounding(module: Float8Rounding) -> dict[str, Any]:
    arguments: dict[str, Any] = {"stored": module.stored}
    shape = tuple(module.scale.shape)
    return {**arguments, "scale_shape": shape} if shape else arguments


def _no_arguments(module: nn.Module) -> dict[str, Any]:
    return {}


def _dynamic(module: DynamicQuantize) -> dict[str, Any]:
    settings = {"bits": 8, "per": "token", "symmetric": False}
    return {k: getattr(module, k) for k, v in settings.items() if getattr(module, k) != v}


def _recurrent(module: Any) -> dict[str, Any]:
    kind = type(module).__name__.removeprefix("Operand")
    settings = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False,
                "bits": 8}  # fmt: skip
    return {
        "kind": f"{kind}_{module.nonlinearity}" if kind == "RNN" else kind,
        "hidden_size": module.hidden_size,
        **{k: getattr(module, k) for k, v in settings.items() if getattr(module, k) != v},
    }


def _stochastic(module: StochasticDepth) -> dict[str, Any]:
    names = ("p", "mode", "scale", "noise")
    return {name: getattr(module, name) for name in names}


def _top_tokens(module: TopTokens) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("capacity", "causal")}


def _exit(module: Exit | Undecided) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("threshold", "criterion")}


def _experts(module: Experts) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "experts": module.experts,
        "width": module.width,
        "hidden": module.hidden,
        "activation": module.activation,
    }
    if not module.gated:
        arguments["gated"] = False
    held = {name: getattr(module, name) for name in ("biases", "limit", "dropout")}
    return {**arguments, **{name: value for name, value in held.items() if value}}


def _given_experts(module: GivenExperts) -> dict[str, Any]:
    sizes = {name: getattr(module, name) for name in ("experts", "width", "hidden", "activation")}
    held = {name: getattr(module, name) for name in ("biases", "limit", "dropout")}
    more = {name: value for name, value in held.items() if value}
    return {**sizes, "given": True, **more}


HELPERS: Final[Mapping[type[nn.Module], Helper]] = {
    IntegerConv1d: Helper("Int8Conv1d", _conv),
    IntegerConv2d: Helper("Int8Conv2d", _conv),
    IntegerConv3d: Helper("Int8Conv3d", _conv),
    IntegerLinear: Helper("Int8Linear", _linear),
    FakeQuantize: Helper("FakeQuantize", _fake_quantize),
    IntegerWeight: Helper("IntegerWeight", _integer_weight),
    PackedWeight: Helper("PackedWeight", _packed_weight),
    BinaryWeight: Helper("PackedWeight", _packed_weight),
    CodebookWeight: Helper("CodebookWeight", _codebook_weight),
    Float8Weight: Helper("Float8Weight", _float8_weight),
    Float8Rounding: Helper("Float8Rounding", _float8_rounding),
    Signs: Helper("Signs", _no_arguments),
    DynamicQuantize: Helper("DynamicQuantize", _dynamic),
    Experts: Helper("Experts", _experts),
    GivenExperts: Helper("Experts", _given_experts),
    OperandGRU: Helper("RoundedRecurrent", _recurrent),
    OperandLSTM: Helper("RoundedRecurrent", _recurrent),
    OperandRNN: Helper("RoundedRecurrent", _recurrent),
    StochasticDepth: Helper("StochasticDepth", _stochastic),
    Exit: Helper("Exit", _exit),
    Undecided: Helper("Undecided", _exit),
    TopTokens: Helper("TopTokens", _top_tokens),
}

_MERGED: Final[Mapping[type[nn.Module], type[IntegerLayer]]] = {
    OperandConv1d: IntegerConv1d,
    OperandConv2d: IntegerConv2d,
    OperandConv3d: IntegerConv3d,
    OperandLinear: IntegerLinear,
}
_FUNCTIONS: Final[Mapping[type[nn.Module], Callable[..., Tensor]]] = {
    OperandConv1d: F.conv1d,
    OperandConv2d: F.conv2d,
    OperandConv3d: F.conv3d,
    OperandConvTranspose1d: F.conv_transpose1d,
    OperandConvTranspose2d: F.conv_transpose2d,
    OperandConvTranspose3d: F.conv_transpose3d,
    OperandEmbedding: F.embedding,
    OperandLinear: F.linear,
}


def merge_weights(module: fx.GraphModule) -> None:
    """Make a layer and its stored weight one leaf; write other operand layers as calls.

    `module` is a private graph after the `storage` lowering.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_module" or len(node.args) < 2:
            continue
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, OperandExperts):
            up: Any = node.args[3]
            module.set_submodule(str(node.target), GivenExperts(layer, up.meta["val"].shape))
        elif isinstance(layer, tuple(_FUNCTIONS)):
            stored = _stored(module, node.args[1])
            if stored is not None and _fits(layer, stored) and _is_private(module, node):
                _merge(module, node, layer, stored)
            else:
                _write_call(module, node, layer)
    for node in module.graph.nodes:
        if node.op == "call_module":
            _broadcast_scale(module.get_submodule(str(node.target)), node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _broadcast_scale(quantizer: nn.Module, node: fx.Node) -> None:
    """Give scales per channel the shape that broadcasts against the activation."""
    if not isinstance(quantizer, FakeQuantize) or quantizer.axis is None:
        return
    if quantizer.scale.dim() == 1:
        shape = [1] * node.meta["val"].dim()
        shape[quantizer.axis] = -1
        quantizer.scale = quantizer.scale.reshape(shape)
        quantizer.zero_point = quantizer.zero_point.reshape(shape)


def _stored(module: fx.GraphModule, weight: Any) -> IntegerWeight | None:
    if not isinstance(weight, fx.Node) or weight.op != "call_module":
        return None
    found = module.get_submodule(str(weight.target))
    return found if isinstance(found, IntegerWeight) else None


def _fits(layer: nn.Module, stored: IntegerWeight) -> bool:
    plain = stored.zero_point is None and stored.group is None and stored.axis == 0
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    half = stored.dtype is not torch.float32
    return type(layer) in _MERGED and plain and zeros and not half and _is_int8(stored)


def _is_int8(stored: IntegerWeight) -> bool:
    return stored.weight.dtype is torch.int8


def _is_private(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the weight is read by calls of this one layer only."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return all(
        user.op == "call_module" and user.target == node.target and user.args[1] is weight
        for user in weight.users
    )


def _merge(module: fx.GraphModule, node: fx.Node, layer: nn.Module, stored: IntegerWeight) -> None:
    merged = _MERGED[type(layer)](layer, stored)
    module.set_submodule(str(node.target), merged)
    for user in list(cast(fx.Node, node.args[1]).users):
        user.args = (user.args[0],)


def _write_call(module: fx.GraphModule, node: fx.Node, layer: Any) -> None:
    graph = module.graph
    source, weight = node.args
    with graph.inserting_before(node):
        operands = [weight]
        if not isinstance(layer, OperandEmbedding):
            biased = layer.bias is not None
            operands.append(graph.get_attr(f"{node.target}.bias") if biased else None)
        if isinstance(layer, (OperandEmbedding, OperandLinear)):
            # Where padding stands in an embedding matters to its gradient alone.
            geometry: dict[str, Any] = {}
        else:
            names = ["stride", "padding", "dilation", "groups"]
            if layer.transposed:
                names.insert(2, "output_padding")
            geometry = {name: getattr(layer, name) for name in names}
            if layer.padding_mode != "zeros":
                widths = tuple(layer._reversed_padding_repeated_twice)
                source = graph.call_function(F.pad, (source, widths), {"mode": layer.padding_mode})
                source.meta = dict(node.meta)
                geometry["padding"] = 0
        call = graph.call_function(_FUNCTIONS[type(layer)], (source, *operands), geometry)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
