"""Write layers that are quantised at run time with the operators of `_dynamic_ops`.

A DynamicQuantize becomes one quantize whose integers, scale and zero point all its layers read; a
layer and its fake-quantised weight become one leaf that holds integers.
"""

from __future__ import annotations

import operator
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn

from fxcompress.emit._dynamic_ops import dynamic_ops
from fxcompress.emit._dynamic_recurrent import RECURRENT, IntegerRecurrent
from fxcompress.emit._lower import Lowered
from fxcompress.nn import (
    DynamicQuantize,
    FakeQuantize,
    OperandConv1d,
    OperandConv2d,
    OperandConv3d,
    OperandLinear,
)

__all__ = ["store_recurrent", "sum_rows", "write_dynamic"]

_CONVOLUTIONS = (OperandConv1d, OperandConv2d, OperandConv3d)


# Rows that hold column sums are counted in these, so that layers of one activation share them.
_ROWS: Final = 16


class IntegerLinear(nn.Module):
    """A linear layer on integers: `[..., in]` to floats `[..., out]`.

    `weight` is `[in, out]`, as the kernel reads it. Per token the kernel of onnxruntime takes no
    scale, and its zero point is 128 for all. The rest, -(z_x - 128) times the column sums of the
    weight, is computed by the same product: z_x becomes further elements of each token, and the
    sums become rows of 8-bit integers below the weight. Three passes over the output less: of
    MiniLM's up-projection at 128 tokens, 0.61 ms instead of 0.80.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    one: Tensor
    middle: Tensor
    width: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, module: DynamicQuantize
    ) -> None:
        super().__init__()
        self.per_token = module.per == "token"
        shifted = self.per_token and not module.symmetric
        sums = sum_rows(weight) if shifted else weight.new_empty((0, weight.shape[0]))
        self.rows = sums.shape[0]
        self.register_buffer("weight", torch.cat([weight.t(), -sums]).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        if self.per_token:
            self.register_buffer("one", torch.tensor(1.0))
            self.register_buffer("middle", torch.tensor(128, dtype=torch.uint8))
            self.register_buffer("width", torch.tensor([self.rows]))

    def forward(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return floats for the integers that an activation was rounded to."""
        if not self.per_token:
            operands = (q, scale, zero_point, self.weight, self.scale, self.bias)
            return cast(Tensor, dynamic_ops().dynamic_linear(*operands))
        if self.rows:
            points = torch.onnx.ops.symbolic(
                "Expand",
                [zero_point, self.width],
                dtype=torch.uint8,
                shape=[*zero_point.shape[:-1], self.rows],
            )
            q = torch.cat([q, points], dim=-1)
        result: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulIntegerToFloat",
            [q, self.weight, self.one, self.scale, self.middle],
            dtype=torch.float32,
            shape=[*q.shape[:-1], self.weight.shape[1]],
            version=1,
        )
        result = result * scale
        return result if self.bias is None else result + self.bias


def sum_rows(weight: Tensor) -> Tensor:
    """Return 8-bit rows `[rows, out]` whose sums are those of `weight`, `[out, in]`.

    Each row holds at most 127 in either direction, so that their number grows with the largest sum.
    """
    left = weight.sum(1, dtype=torch.int64)
    count = -(-int(left.abs().max()) // 127)
    rows = []
    for _ in range(-(-count // _ROWS) * _ROWS):
        rows.append(left.clamp(-127, 127))
        left = left - rows[-1]
    empty = weight.new_empty((0, weight.shape[0]))
    return torch.stack(rows).to(torch.int8) if rows else empty


class IntegerConv(nn.Module):
    """A convolution on integers; `weight` is unsigned around 128, as the kernel wants it."""

    def __init__(self, weight: Tensor, scale: Tensor, layer: nn.Conv2d) -> None:
        super().__init__()
        shape = (-1, *[1] * (weight.dim() - 2))
        self.register_buffer("weight", (weight.int() + 128).to(torch.uint8))
        self.register_buffer("scale", scale.reshape(shape))
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().reshape(shape))
        self.geometry = [list(layer.stride), list(layer.padding), list(layer.dilation)]
        self.groups = layer.groups

    def forward(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return floats for the integers that an activation was rounded to."""
        operands = (q, scale, zero_point, self.weight, self.scale, self.bias)
        return cast(Tensor, dynamic_ops().dynamic_conv(*operands, *self.geometry, self.groups))


def write_dynamic(module: fx.GraphModule) -> Lowered:
    """Replace what an integer kernel of onnxruntime computes, in place; count and note it.

    What is left stays fake-quantised, in float arithmetic.
    """
    done = Lowered()
    quantized: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, RECURRENT):
                _write_recurrent(module, node, layer, done)
        weight = _weight(module, node)
        source = _source(module, node) if weight is not None else None
        if weight is None or source is None:
            continue
        made = _integer_layer(module, node, weight, _dynamic(module, source), done)
        if made is not None:
            if source not in quantized:
                quantized[source] = _write_quantize(module, source)
            _replace(module, node, made, quantized[source])
    _write_left(module, quantized)
    module.graph.eliminate_dead_code()
    return done


def _write_left(module: fx.GraphModule, quantized: dict[fx.Node, tuple[fx.Node, ...]]) -> None:
    """Give what is computed in float the floats that the integers stand for."""
    for node in list(module.graph.nodes):
        if node.op != "call_module" or not node.users:
            continue
        if not isinstance(module.get_submodule(str(node.target)), DynamicQuantize):
            continue
        q, scale, zero_point = quantized.get(node) or _write_quantize(module, node)
        with module.graph.inserting_after(zero_point):
            call = module.graph.call_function(_dequantize, (q, scale, zero_point))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (q.float() - zero_point.float()) * scale


def _weight(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the quantizer of a layer's weight."""
    place = 2 if node.target is torch.addmm else 1
    operand = node.args[place] if len(node.args) > place else None
    if not isinstance(operand, fx.Node) or operand.op != "call_module":
        return None
    if not isinstance(module.get_submodule(str(operand.target)), FakeQuantize):
        return None
    source = operand.args[0]
    return operand if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _source(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the run-time quantizer of what a layer multiplies."""
    operand = node.args[1 if node.target is torch.addmm else 0]
    if not isinstance(operand, fx.Node) or operand.op != "call_module":
        return None
    found = module.get_submodule(str(operand.target))
    return operand if isinstance(found, DynamicQuantize) else None


def _dynamic(module: fx.GraphModule, node: fx.Node) -> DynamicQuantize:
    return cast(DynamicQuantize, module.get_submodule(str(node.target)))


def _integer_layer(
    module: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    activation: DynamicQuantize,
    done: Lowered,
) -> nn.Module | None:
    """Return a layer on integers, or None where no kernel computes it, with a note."""
    name = str(node.target) if node.op == "call_module" else node.name
    quantizer = cast(FakeQuantize, module.get_submodule(str(weight.target)))
    dtype = weight.meta["val"].dtype if "val" in weight.meta else torch.float32
    if quantizer.bits > 8 or quantizer.group is not None or bool(quantizer.zero_point.any()):
        _left(done, name, "its weight is not 8-bit integers around 0")
        return None
    if dtype is not torch.float32:
        _left(done, name, f"its kernel has no {str(dtype).removeprefix('torch.')}")
        return None
    value = _attribute(module, str(cast(fx.Node, weight.args[0]).target))
    integers = quantizer.quantize(value).to(torch.int8)
    if quantizer.bits < 8:
        done.notes.append(f"{name}: its {quantizer.bits}-bit weights are stored as 8-bit integers")
    if node.target is torch.addmm:
        if set(node.kwargs.values()) - {1} or quantizer.axis not in (None, 1):
            _left(done, name, "it scales its operands")
            return None
        bias = node.args[0]
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            _left(done, name, "its bias is computed in the graph")
            return None
        integers, tensor = integers.t(), _attribute(module, str(bias.target))
        done.linears += 1
        return IntegerLinear(integers, _scales(quantizer, integers), tensor, activation)
    layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(layer, OperandLinear) and quantizer.axis in (None, 0):
        done.linears += 1
        return IntegerLinear(integers, _scales(quantizer, integers), layer.bias, activation)
    if isinstance(layer, _CONVOLUTIONS) and quantizer.axis in (None, 0):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if plain and activation.per == "tensor":
            done.convolutions += 1
            return IntegerConv(integers, _scales(quantizer, integers), cast(nn.Conv2d, layer))
    _left(done, name, "there is no integer kernel for it")
    return None


def _left(done: Lowered, name: str, reason: str) -> None:
    done.notes.append(f"{name}: computed in float, {reason}")


def _scales(quantizer: FakeQuantize, rows: Tensor) -> Tensor:
    """Return a scale for each row."""
    return quantizer.scale.detach().float().flatten().expand(rows.shape[0]).clone()


def _write_quantize(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    quantizer = _dynamic(module, node)
    settings = (quantizer.bits, quantizer.per == "token", quantizer.symmetric)
    with module.graph.inserting_after(node):
        call = module.graph.call_function(
            dynamic_ops().dynamic_quantize.default, (node.args[0], *settings)
        )
    parts: list[fx.Node] = []
    for i in (2, 1, 0):
        with module.graph.inserting_after(call):
            parts.append(module.graph.call_function(operator.getitem, (call, i)))
    return tuple(parts[::-1])


def _replace(
    module: fx.GraphModule, node: fx.Node, made: nn.Module, operands: tuple[fx.Node, ...]
) -> None:
    path = str(node.target) if node.op == "call_module" else f"{node.name}_integer"
    module.set_submodule(path, made)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, operands)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _write_recurrent(module: fx.GraphModule, node: fx.Node, layer: Any, done: Lowered) -> None:
    """Let the kernel of onnxruntime compute a recurrent layer, if it can."""
    stored = _stored(module, node)
    if stored is None:
        _left(done, str(node.target), "its matrices are not all fake-quantised")
        return
    if layer.bits != 8:
        _left(done, str(node.target), "its kernel rounds activations to 8 bits only")
        return
    _hold(module, node, IntegerRecurrent(layer, stored))
    kind = type(layer).__name__.removeprefix("Operand")
    if kind == "LSTM":
        done.recurrent += layer.num_layers
    else:
        done.notes.append(
            f"{node.target}: onnxruntime has no integer kernel for {kind}: it computes in float "
            "with weights stored as integers, its input rounded"
        )


def store_recurrent(module: fx.GraphModule) -> tuple[str, ...]:
    """Write recurrent layers as operators of ONNX that read stored integers, in float arithmetic.

    Returns:
        A note for each.
    """
    notes = []
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        stored = _stored(module, node) if isinstance(layer, RECURRENT) else None
        if stored is not None:
            _hold(module, node, IntegerRecurrent(layer, stored, rounded=False))
            notes.append(f"{node.target}: computed in float, with weights stored as integers")
    return tuple(notes)


def _stored(module: fx.GraphModule, node: fx.Node) -> list[tuple[Tensor, Tensor]] | None:
    """Return integers and scales of each matrix of a layer; None if one is not quantised."""
    stored = []
    for operand in node.args[2:]:
        assert isinstance(operand, fx.Node)
        quantizer = module.get_submodule(str(operand.target)) if operand.op == "call_module" else 0
        source = operand.args[0] if operand.args else None
        if not isinstance(quantizer, FakeQuantize) or not isinstance(source, fx.Node):
            return None
        value = _attribute(module, str(source.target))
        integers = quantizer.quantize(value).to(torch.int8)
        stored.append((integers, _scales(quantizer, integers)))
    return stored


def _hold(module: fx.GraphModule, node: fx.Node, made: nn.Module) -> None:
    """Put a layer that holds its matrices in the place of one that is given them."""
    matrices = cast("list[fx.Node]", list(node.args[2:]))
    node.args = node.args[:2]
    for operand in matrices:
        for dead in (operand, cast(fx.Node, operand.args[0])):
            if not dead.users:
                module.graph.erase_node(dead)
    module.set_submodule(str(node.target), made)


def _attribute(module: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name)).detach()
