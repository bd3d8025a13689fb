"""Layers that are quantised at run time, in the form that inductor has an int8 kernel for.

Inductor fuses `_int_mm` of signed integers and a constant weight, followed by the two scales, to a
kernel of oneDNN; ranges per token or per tensor are plain torch around it, which it fuses as any
pointwise code. No kernel takes a zero point for each token, so the integers are those of the zero
point subtracted afterwards, a product of two vectors:

    y = s_x s_w (Σ q w - z Σ w) + b
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx, nn

from fxcompress.emit._lower import is_weight, layer_call, quantizer_of, tensor_at
from fxcompress.nn import DynamicQuantize, FakeQuantize
from fxcompress.nn.dynamic_quantize import dynamic_parameters

__all__ = ["write_integer_products"]


class Rounded(nn.Module):
    """Signed integers `[tokens, in]` of an activation, its scale and its zero point.

    Scale and zero point are `[tokens, 1]`, or `[]` per tensor.
    """

    def __init__(self, module: DynamicQuantize) -> None:
        super().__init__()
        self.bits, self.per, self.symmetric = module.bits, module.per, module.symmetric

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the range and round."""
        x = x.reshape(-1, x.shape[-1])
        scale, point, (low, high) = dynamic_parameters(
            x, bits=self.bits, per=self.per, symmetric=self.symmetric
        )
        # Unsigned integers as signed ones, exactly.
        shift = 0 if self.symmetric else 2 ** (self.bits - 1)
        integers = (torch.round(x / scale) + point).clamp(low, high) - shift
        return integers.to(torch.int8), scale, point - shift


class IntegerProduct(nn.Module):
    """A linear layer on integers: `[tokens, in]` to floats, in the shape of `like`."""

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, symmetric: bool
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("scale", scale)
        if not symmetric:
            self.register_buffer("sums", scale * weight.sum(1, dtype=torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, integers: Tensor, scale: Tensor, point: Tensor, like: Tensor) -> Tensor:
        """Multiply, and take back what zero points add."""
        result = torch._int_mm(integers, self.weight).to(torch.float32) * scale * self.scale
        if not self.symmetric:
            result = result - scale * point * self.sums
        if self.bias is not None:
            result = result + self.bias
        return result.reshape([*like.shape[:-1], self.weight.shape[1]])


def write_integer_products(module: fx.GraphModule) -> int:
    """Replace linear layers whose input is rounded at run time, in place; return how many."""
    rounded: dict[fx.Node, tuple[fx.Node, ...]] = {}
    done = 0
    for weight in list(module.graph.nodes):
        quantizer = quantizer_of(weight)
        if quantizer is None or not is_weight(weight) or not _fits(module, weight, quantizer):
            continue
        for reader in list(weight.users):
            done += _replace(module, reader, weight, quantizer, rounded)
        if not weight.users:
            module.graph.erase_node(weight)
    module.graph.eliminate_dead_code()
    module.recompile()
    return done


def _fits(module: fx.GraphModule, weight: fx.Node, quantizer: FakeQuantize) -> bool:
    """Whether a weight is 8-bit integers around 0 with a scale for each row."""
    around = quantizer.group is None and not bool(quantizer.zero_point.any())
    tensor = _weight(module, weight)
    single = tensor.dim() == 2 and tensor.dtype is torch.float32
    return around and single and quantizer.bits <= 8 and quantizer.axis in (None, 0)


def _weight(module: fx.GraphModule, weight: fx.Node) -> Tensor:
    return tensor_at(module, str(cast(fx.Node, weight.args[0]).target)).detach()


def _replace(
    module: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    quantizer: FakeQuantize,
    rounded: dict[fx.Node, tuple[fx.Node, ...]],
) -> bool:
    layer = layer_call(module, node, str(weight.target))
    if layer is None or layer.weight is not weight or layer.function is not nn.functional.linear:
        return False
    source = layer.source
    dynamic = module.get_submodule(str(source.target)) if source.op == "call_module" else None
    if not isinstance(dynamic, DynamicQuantize):
        return False
    if source not in rounded:
        rounded[source] = _round(module, source, dynamic)
    integers = quantizer.quantize(_weight(module, weight)).to(torch.int8)
    scale = quantizer.scale.detach().float().flatten().expand(integers.shape[0]).clone()
    made = IntegerProduct(integers, scale, layer.bias, symmetric=dynamic.symmetric)
    path = f"{layer.name}_integer"
    module.add_submodule(path, made)
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, (*rounded[source], source.args[0]))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)
    return True


def _round(
    module: fx.GraphModule, source: fx.Node, dynamic: DynamicQuantize
) -> tuple[fx.Node, ...]:
    path = f"{source.target}_integers"
    module.add_submodule(path, Rounded(dynamic))
    with module.graph.inserting_before(source):
        call = module.graph.call_module(path, (source.args[0],))
        return tuple(module.graph.call_function(operator.getitem, (call, i)) for i in range(3))
