"""Lower fake-quantize nodes: stored integers, and quantize/dequantize pairs.

Two forms. Both store a fake-quantised weight as integers (`<fq path>.weight`, `.scale`).

`arithmetic`: activations stay fake-quantised and weights are multiplied out, in plain torch ops.

`decomposed`: `torch.ops.quantized_decomposed`, which PT2E backends and the ONNX translation know:

- activation: one quantize per produced tensor and **one dequantize per consumer**, as every
  runtime's pattern matcher wants it; unsigned, because onnxruntime fuses only u8 activations
  (u8 is s8 with the zero point moved by 128, exactly);
- weight: integers with only a dequantize (weight → quantize → dequantize would make onnxruntime
  and OpenVINO compute in float and store 4 bytes each);
- bias, where the runtime adds it in integers: int32 at s_x · s_w, with only a dequantize.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.emit._dynamic_recurrent import ScannedLSTM
from fxcompress.emit._integers import IntegerWeight, PackedWeight, Rounding
from fxcompress.nn import (
    FakeQuantize,
    OperandConv1d,
    OperandConv2d,
    OperandConv3d,
    OperandConvTranspose1d,
    OperandConvTranspose2d,
    OperandConvTranspose3d,
    OperandEmbedding,
    OperandGRU,
    OperandLinear,
    OperandLSTM,
    OperandRNN,
)

__all__ = ["Lowered", "activation_bits", "is_quantized", "lower", "register_decomposed"]

_CONVOLUTIONS: Final[dict[type[nn.Module], Callable[..., Tensor]]] = {
    OperandConv1d: F.conv1d,
    OperandConv2d: F.conv2d,
    OperandConv3d: F.conv3d,
}
_TRANSPOSED: Final[dict[type[nn.Module], Callable[..., Tensor]]] = {
    OperandConvTranspose1d: F.conv_transpose1d,
    OperandConvTranspose2d: F.conv_transpose2d,
    OperandConvTranspose3d: F.conv_transpose3d,
}
_LAYERS: Final = (*_CONVOLUTIONS, *_TRANSPOSED, OperandEmbedding, OperandLinear)
_RECURRENT: Final = (OperandGRU, OperandLSTM, OperandRNN)
_INT32: Final = (-(2**31), 2**31 - 1)


@dataclass
class Lowered:
    """What a lowering did: layers whose weight is stored as integers, and what it left out."""

    convolutions: int = 0
    linears: int = 0
    recurrent: int = 0
    embeddings: int = 0
    notes: list[str] = field(default_factory=list)


def is_quantized(module: fx.GraphModule) -> bool:
    """Whether the graph holds any fake-quantize node."""
    return any(_quantizer(node) is not None for node in module.graph.nodes)


def activation_bits(module: fx.GraphModule) -> int:
    """Return the fewest bits that an activation is rounded to; 16 where none is."""
    quantizers = [_quantizer(node) for node in module.graph.nodes if not _is_weight(node)]
    return min((each.bits for each in quantizers if each is not None), default=16)


def register_decomposed() -> Any:
    """Return `torch.ops.quantized_decomposed`, its operators registered by torch itself."""
    import torch.ao.quantization.fx._decomposed  # registers on import

    return torch.ops.quantized_decomposed


def lower(module: fx.GraphModule, form: str, *, integer_bias: bool = False) -> Lowered:
    """Lower every fake-quantize node of `module`, in place.

    Args:
        module: A private copy of a program's graph.
        form: `arithmetic`, `decomposed`, or `storage` (weights alone).
        integer_bias: Store the bias of integer layers as int32, and give linear layers inputs
            of two dimensions, as onnxruntime's kernels want them.
    """
    done = Lowered()
    _freeze(module)
    _count(module, done)
    weights = [n for n in module.graph.nodes if _quantizer(n) is not None and _is_weight(n)]
    if form in ("arithmetic", "storage"):
        widths: dict[int, int] = {}
        for node in weights:
            stored = _store(module, node, packed=_is_small(node))
            if isinstance(stored, PackedWeight):
                widths[stored.bits] = widths.get(stored.bits, 0) + 1
            node.args = ()
        done.notes += [
            f"{count} weights are stored as {bits}-bit integers, packed in bytes"
            for bits, count in sorted(widths.items())
        ]
        if form == "arithmetic":
            _write_rounding(module)
            _write_scans(module, done)
    else:
        _Decomposed(module, done, integer_bias).run(weights)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _drop_unread(module)
    module.graph.lint()
    module.recompile()
    return done


def _quantizer(node: fx.Node) -> FakeQuantize | None:
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    found = node.graph.owning_module.get_submodule(str(node.target))
    return found if isinstance(found, FakeQuantize) else None


def _freeze(module: fx.GraphModule) -> None:
    """Replace quantizers that are being trained by copies that hold what they have come to."""
    for node in module.graph.nodes:
        quantizer = _quantizer(node)
        if quantizer is not None and (quantizer.learned or quantizer.tracking):
            module.set_submodule(str(node.target), copy.deepcopy(quantizer).freeze())


def _is_weight(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _count(module: fx.GraphModule, done: Lowered) -> None:
    for node in module.graph.nodes:
        if node.op != "call_module" or len(node.args) < 2:
            continue
        layer, weight = module.get_submodule(str(node.target)), node.args[1]
        if isinstance(layer, _LAYERS) and isinstance(weight, fx.Node) and _quantizer(weight):
            done.linears += isinstance(layer, OperandLinear)
            done.embeddings += isinstance(layer, OperandEmbedding)
            done.convolutions += not isinstance(layer, (OperandEmbedding, OperandLinear))


def _is_small(node: fx.Node) -> bool:
    """Whether a weight takes less than a byte each, or has scales for groups."""
    quantizer = _quantizer(node)
    return quantizer is not None and (quantizer.bits < 8 or quantizer.group is not None)


def _store(module: fx.GraphModule, node: fx.Node, *, packed: bool = False) -> nn.Module:
    quantizer = _quantizer(node)
    assert quantizer is not None, "only fake-quantize nodes are stored"
    source = cast(fx.Node, node.args[0])
    form = PackedWeight if packed and quantizer.bits <= 8 else IntegerWeight
    stored = form(quantizer, _attribute(module, str(source.target)).detach())
    module.set_submodule(str(node.target), stored)
    return stored


def _write_rounding(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        quantizer = _quantizer(node)
        if quantizer is not None and quantizer.axis is None:
            # Called again where the scale passes through an op: by then it is replaced already.
            module.set_submodule(str(node.target), Rounding(quantizer))


def _write_scans(module: fx.GraphModule, done: Lowered) -> None:
    """Let LSTMs run their steps in a `scan`, so that any length can be exported."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if type(layer) is OperandLSTM:
                module.set_submodule(str(node.target), ScannedLSTM.of(layer))
                done.notes.append(
                    f"{node.target}: its steps are a loop in plain torch, slower than nn.LSTM"
                )


def _attribute(module: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def _drop_unread(module: fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads, such as the float form of a weight."""
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        path, _, attribute = name.rpartition(".")
        inside = any(path == c or path.startswith(f"{c}.") for c in called)
        owner = module.get_submodule(path)
        # An operand layer computes with what it is given; its own weight is the graph's business.
        if name not in read and (not inside or _is_operand(owner, attribute)):
            delattr(owner, attribute)


def _is_operand(owner: nn.Module, attribute: str) -> bool:
    """Whether a layer is given such a parameter by the graph."""
    if isinstance(owner, _RECURRENT):
        return attribute.startswith("weight_")
    return isinstance(owner, _LAYERS) and attribute == "weight"


class _Decomposed:
    """The `decomposed` form of one graph."""

    def __init__(self, module: fx.GraphModule, done: Lowered, integer_bias: bool) -> None:
        self.module, self.graph, self.done = module, module.graph, done
        self.integer_bias = integer_bias
        self.ops = register_decomposed()
        self.stored: dict[fx.Node, IntegerWeight] = {}
        # dequantize node -> (quantize node, scale), for layers that want the integers themselves
        self.quantized: dict[fx.Node, tuple[fx.Node, float]] = {}

    def run(self, weights: list[fx.Node]) -> None:
        for node in [n for n in self.graph.nodes if _quantizer(n) is not None]:
            if node not in weights:
                self._activation(node)
        for node in weights:
            self._weight(node)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and node.args[1:] and node.args[1] in self.stored:
                layer = self.module.get_submodule(str(node.target))
                if isinstance(layer, _LAYERS):
                    self._layer(node, layer)

    def _activation(self, node: fx.Node) -> None:
        quantizer = _quantizer(node)
        assert quantizer is not None
        source = cast(fx.Node, node.args[0])
        if quantizer.axis is not None or quantizer.bits > 8:
            self.done.notes.append(
                f"{node.target}: {quantizer.bits}-bit activations per "
                f"{'tensor' if quantizer.axis is None else 'channel'} stay in float arithmetic"
            )
            return
        shift = 128 if quantizer.signed else 0
        arguments = (
            float(quantizer.scale),
            int(quantizer.zero_point) + shift,
            quantizer.qmin + shift,
            quantizer.qmax + shift,
            torch.uint8,
        )
        with self.graph.inserting_before(node):
            quantize = self._call(self.ops.quantize_per_tensor.default, (source, *arguments))
        dtype = source.meta["val"].dtype if "val" in source.meta else torch.float32
        options = {} if dtype is torch.float32 else {"out_dtype": dtype}
        for user in list(node.users):
            with self.graph.inserting_before(user):
                dequantize = self._call(
                    self.ops.dequantize_per_tensor.default, (quantize, *arguments), options
                )
            user.replace_input_with(node, dequantize)
            dequantize.meta = dict(node.meta)
            self.quantized[dequantize] = (quantize, arguments[0])
        self.graph.erase_node(node)

    def _weight(self, node: fx.Node) -> None:
        stored = cast(IntegerWeight, _store(self.module, node))
        node.args = ()
        self.stored[node] = stored
        if stored.group is not None:
            return
        path = str(node.target)
        options = {} if stored.dtype is torch.float32 else {"out_dtype": stored.dtype}
        limits = (stored.qmin, stored.qmax, stored.weight.dtype)
        stored.scale = stored.scale.flatten().float()
        if stored.zero_point is not None:
            stored.zero_point = stored.zero_point.flatten().to(torch.int64)
        with self.graph.inserting_before(node):
            weight = self.graph.get_attr(f"{path}.weight")
            if stored.axis is None:
                zero_point = 0 if stored.zero_point is None else int(stored.zero_point)
                dequantize = self._call(
                    self.ops.dequantize_per_tensor.default,
                    (weight, float(stored.scale), zero_point, *limits),
                    options,
                )
            else:
                zero_points = stored.zero_point
                points = None if zero_points is None else self.graph.get_attr(f"{path}.zero_point")
                scales = self.graph.get_attr(f"{path}.scale")
                dequantize = self._call(
                    self.ops.dequantize_per_channel.default,
                    (weight, scales, points, stored.axis, *limits),
                    options,
                )
        dequantize.meta = dict(node.meta)
        node.replace_all_uses_with(dequantize)
        self.stored[dequantize] = self.stored.pop(node)
        self.graph.erase_node(node)

    def _layer(self, node: fx.Node, layer: nn.Module) -> None:
        """Write a layer as a function of its operands, its bias in integers where it can be."""
        source, weight = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
        if not self.integer_bias or source not in self.quantized:
            return
        padding_mode = getattr(layer, "padding_mode", "zeros")
        if padding_mode != "zeros" or isinstance(layer, tuple(_TRANSPOSED)):
            self.done.notes.append(f"{node.target}: stays in float, no integer kernel for it")
            return
        with self.graph.inserting_before(node):
            bias = self._bias(node, cast(Any, layer).bias, source, self.stored[weight])
            if isinstance(layer, OperandLinear):
                result = self._linear(node, source, weight, bias)
            else:
                conv = cast(nn.Conv2d, layer)
                geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
                function = _CONVOLUTIONS[type(layer)]
                result = self._call(function, (source, weight, bias, *geometry))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _bias(
        self, node: fx.Node, bias: Tensor | None, source: fx.Node, weight: IntegerWeight
    ) -> fx.Node | None:
        if bias is None:
            return None
        path = f"{node.target}_bias"
        _, scale_x = self.quantized[source]
        scale_w = weight.scale.detach().flatten().double()
        if weight.axis is None:
            scale_w = scale_w.expand(bias.shape[0])
        symmetric = weight.zero_point is None and weight.group is None and weight.axis in (None, 0)
        scale = scale_x * scale_w if symmetric else None
        levels = (bias.detach().double() / scale).round() if scale is not None else None
        holder = nn.Module()
        self.module.set_submodule(path, holder)
        if levels is None or scale is None or not bool((levels.abs() < -_INT32[0]).all()):
            self.done.notes.append(f"{node.target}: its bias does not fit 32-bit integers")
            holder.register_buffer("bias", bias.detach())
            return self.graph.get_attr(f"{path}.bias")
        holder.register_buffer("bias", levels.to(torch.int32))
        holder.register_buffer("scale", scale.float())
        operands = (self.graph.get_attr(f"{path}.bias"), self.graph.get_attr(f"{path}.scale"))
        options = {} if bias.dtype is torch.float32 else {"out_dtype": bias.dtype}
        return self._call(
            self.ops.dequantize_per_channel.default,
            (*operands, None, 0, *_INT32, torch.int32),
            options,
        )

    def _linear(
        self, node: fx.Node, source: fx.Node, weight: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """Multiply matrices: onnxruntime's integer Gemm takes two dimensions only.

        The integers are reshaped, not the floats, so that the dequantize stays next to the Gemm.
        """
        quantize, _ = self.quantized[source]
        rank = node.meta["val"].dim() if "val" in node.meta else 2
        if rank == 2:
            return self._call(F.linear, (source, weight, bias))
        sizes = [self._call(torch.ops.aten.sym_size.int, (quantize, i)) for i in range(rank - 1)]
        flat = self._call(torch.flatten, (quantize, 0, -2)) if rank > 2 else quantize
        floats = self._call(source.target, (flat, *source.args[1:]), dict(source.kwargs))
        result = self._call(F.linear, (floats, weight, bias))
        return self._call(torch.reshape, (result, [*sizes, -1]))

    def _call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        return self.graph.call_function(target, args, kwargs or {})
