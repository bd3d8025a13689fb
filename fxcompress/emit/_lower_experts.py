"""Experts with quantised matrices for ONNX: every matrix a product of its own.

A token still costs its own experts only, and a runtime sees weights with two dimensions, which it
has kernels for: `com.microsoft.MatMulNBits` up to 4 bits (see `_lower_nbits`), else a
DequantizeLinear before the product. A stack put together from matrices of several widths would be
made in float on every call instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.emit._integers import IntegerWeight
from fxcompress.emit._lower.graph import register_decomposed, tensor_at
from fxcompress.emit._lower.stacks import stack_quantizer
from fxcompress.emit._lower_nbits import linear_of_few_bits
from fxcompress.ir.ops import bind
from fxcompress.nn import Experts, FakeQuantize, OperandExperts

__all__ = ["lower_experts"]

_MATRICES = ("gate", "up", "down")


class _Product(nn.Module):
    """`x Wᵀ + b` with a weight in float."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `[..., in]`."""
        return F.linear(x, self.weight, self.bias)


class _IntegerProduct(nn.Module):
    """`x Wᵀ + b` with a weight that is stored as integers, and dequantised before the product."""

    bias: Tensor | None

    def __init__(self, quantizer: FakeQuantize, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.stored = IntegerWeight(quantizer, weight)
        self.register_buffer("bias", bias)
        self.ops = register_decomposed()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `[..., in]`."""
        stored = self.stored
        if stored.group is not None:
            return F.linear(x, stored(), self.bias)
        points = stored.zero_point
        weight = self.ops.dequantize_per_channel.default(
            stored.weight,
            stored.scale.flatten(),
            None if points is None else points.flatten().long(),
            0,
            stored.qmin,
            stored.qmax,
            stored.weight.dtype,
        )
        return F.linear(x, weight.to(stored.dtype), self.bias)


class _WrittenExperts(Experts):
    """Experts whose matrices are modules; it is exported, and never run."""

    def __init__(self, leaf: Experts, products: list[dict[str, nn.Module]]) -> None:
        nn.Module.__init__(self)
        self.activation, self.limit, self.dropout = leaf.activation, leaf.limit, leaf.dropout
        self.products = nn.ModuleList(nn.ModuleDict(each) for each in products)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts."""
        return self._mixed(x, weights, indices, ())

    def _count(self, stacks: Any) -> int:
        return len(self.products)

    def _each(self, stacks: Any) -> Iterator[tuple[Any, ...]]:
        for each in self.products:
            own = cast(nn.ModuleDict, each)
            yield tuple(own[name] if name in own else None for name in _MATRICES)

    def _one(self, x: Tensor, gate: Any, up: Any, down: Any, *biases: Any) -> Tensor:
        made: Tensor = down(self._activated(None if gate is None else gate(x), up(x)))
        return made


def lower_experts(module: fx.GraphModule, activations: Literal["float32", "int8"]) -> int:
    """Replace calls of experts that read quantised matrices, in place.

    Args:
        module: A private copy of a program's graph.
        activations: What a product with a matrix of few bits may compute with.

    Returns:
        How many matrices are multiplied by kernels for few bits.
    """
    done: dict[str, str] = {}
    few = 0
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        leaf = module.get_submodule(str(node.target))
        if not isinstance(leaf, OperandExperts):
            continue
        bound = bind(node)
        path = done.get(str(node.target))
        if path is None:
            path = done[str(node.target)] = f"{node.target}_written"
            products = _products(module, leaf, bound, activations)
            few += sum(type(p) not in _PLAIN for each in products for p in each.values())
            module.set_submodule(path, _WrittenExperts(leaf, products))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(
                path, tuple(bound[name] for name in ("input", "weights", "indices"))
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    if done:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
    return few


_PLAIN = (_Product, _IntegerProduct)


def _products(
    module: fx.GraphModule,
    leaf: OperandExperts,
    bound: Mapping[str, Any],
    activations: Literal["float32", "int8"],
) -> list[dict[str, nn.Module]]:
    """Return the products of each expert."""
    found: list[dict[str, nn.Module]] = [{} for _ in range(leaf.experts)]
    for name in _MATRICES if leaf.gated else _MATRICES[1:]:
        quantizer = stack_quantizer(bound[name])
        source = bound[name] if quantizer is None else bound[name].args[0]
        stack = tensor_at(module, str(source.target)).detach()
        biases: Tensor | None = getattr(leaf, f"{name}_bias")
        for expert, made in enumerate(found):
            weight = stack[expert]
            bias = None if biases is None else biases[expert].detach().clone()
            if quantizer is None or not quantizer.widths[expert]:
                made[name] = _Product(weight, bias)
                continue
            own = quantizer.quantizer([expert])
            small = linear_of_few_bits(own, weight, bias, activations)
            made[name] = small or _IntegerProduct(own, weight, bias)
    return found
