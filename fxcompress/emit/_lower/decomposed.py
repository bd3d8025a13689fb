"""The `decomposed` form: `torch.ops.quantized_decomposed`, placed as matchers of runtimes want it.

- activation: one quantize per produced tensor and **one dequantize per consumer**;
- weight: integers with only a dequantize (weight → quantize → dequantize would make onnxruntime
  and OpenVINO compute in float and store 4 bytes each);
- bias, where the runtime adds it in integers: int32 at s_x · s_w, with only a dequantize.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.emit._integers import IntegerWeight
from fxcompress.emit._lower.graph import is_weight, quantizer_of, register_decomposed
from fxcompress.emit._lower.layer import LayerCall, layer_call
from fxcompress.emit._lower.stored import Lowered, store
from fxcompress.emit._lower.targets import Target
from fxcompress.errors import EmitError
from fxcompress.nn import FakeQuantize

__all__ = ["Decomposed"]

_INT32: Final = (-(2**31), 2**31 - 1)


class Decomposed:
    """The `decomposed` form of one graph."""

    def __init__(self, module: fx.GraphModule, done: Lowered, target: Target) -> None:
        self.module, self.graph, self.done = module, module.graph, done
        self.target = target
        self.ops = register_decomposed()
        self.stored: dict[fx.Node, IntegerWeight] = {}
        self.paths: dict[fx.Node, str] = {}
        # dequantize node -> (quantize node, scale), for layers that want the integers themselves
        self.quantized: dict[fx.Node, tuple[fx.Node, float]] = {}

    def run(self, weights: list[fx.Node]) -> None:
        """Lower activations, then the quantizers `weights`, then the layers that read them."""
        if self.target.symmetric:
            self._check_symmetric()
        for node in [n for n in self.graph.nodes if quantizer_of(n) is not None]:
            if node not in weights:
                self._activation(node)
        for node in weights:
            self._weight(node)
        if self.target.integer_bias:
            for weight in list(self.stored):
                for reader in list(weight.users):
                    self._layer(reader, weight)

    def _shift(self, quantizer: FakeQuantize) -> int:
        """Return what moves a quantizer's integers into the type of the target."""
        if self.target.activations is torch.int8:
            return 0 if quantizer.signed else -128
        return 128 if quantizer.signed else 0

    def _check_symmetric(self) -> None:
        found = [(str(n.target), quantizer_of(n)) for n in self.graph.nodes if not is_weight(n)]
        lopsided = [
            path
            for path, quantizer in found
            if quantizer is not None
            and (
                quantizer.axis is not None
                or int(quantizer.zero_point) + self._shift(quantizer) != 0
                or (quantizer.bits, quantizer.narrow) != (8, False)
            )
        ]
        if lopsided:
            names = list(dict.fromkeys(lopsided))
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise EmitError(
                f"{self.target.name} cannot take {len(names)} of the quantizers of activations",
                reason=f"it wants 8-bit integers around 0, and these are not: {shown}",
                hint="calibrate with `activations: {symmetric: true, signed: true}`",
                where=names[0],
            )

    def _activation(self, node: fx.Node) -> None:
        quantizer = quantizer_of(node)
        assert quantizer is not None
        source = cast(fx.Node, node.args[0])
        if quantizer.axis is not None or quantizer.bits > 8:
            self.done.notes.append(
                f"{node.target}: {quantizer.bits}-bit activations per "
                f"{'tensor' if quantizer.axis is None else 'channel'} stay in float arithmetic"
            )
            return
        shift = self._shift(quantizer)
        arguments = (
            float(quantizer.scale),
            int(quantizer.zero_point) + shift,
            quantizer.qmin + shift,
            quantizer.qmax + shift,
            self.target.activations,
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
        stored = cast(IntegerWeight, store(self.module, node))
        node.args = ()
        if stored.weight.element_size() > 1:
            self._wide(node, stored)
            return
        self.stored[node] = stored
        self.paths[node] = str(node.target)
        if stored.group is not None:
            return
        path = str(node.target)
        options = {} if stored.dtype is torch.float32 else {"out_dtype": stored.dtype}
        limits = (stored.qmin, stored.qmax, stored.weight.dtype)
        stored.scale = stored.scale.flatten().float()
        if stored.zero_point is not None:
            stored.zero_point = stored.zero_point.flatten().to(torch.int64)
        elif self.target.zero_points:
            stored.zero_point = torch.zeros_like(stored.scale, dtype=torch.int64)
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
        self.paths[dequantize] = self.paths.pop(node)
        self.graph.erase_node(node)

    def _wide(self, node: fx.Node, stored: IntegerWeight) -> None:
        """Leave a weight of more than 8 bits to arithmetic: runtimes have no operator for it."""
        if self.target.symmetric:
            raise EmitError(
                f"{self.target.name} cannot take weights of more than 8 bits",
                reason=f"the integers of {node.target} are {stored.weight.dtype}",
                hint="quantise weights to 8 bits, or leave them in float",
                where=str(node.target),
            )
        self.done.notes.append(f"{node.target}: stored in 16 bits and multiplied out in float")

    def _layer(self, node: fx.Node, weight: fx.Node) -> None:
        """Write a layer as a function of its operands, its bias in integers where it can be."""
        layer = layer_call(self.module, node, self.paths[weight])
        if layer is None or layer.weight is not weight or layer.source not in self.quantized:
            return
        if layer.function is None:
            self.done.notes.append(f"{layer.name}: stays in float, no integer kernel for it")
            return
        with self.graph.inserting_before(node):
            bias = self._bias(layer)
            if layer.function is F.linear:
                result = self._linear(node, layer.source, weight, bias)
            else:
                operands = (layer.source, weight, bias, *layer.geometry)
                result = self._call(layer.function, operands)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _bias(self, layer: LayerCall) -> fx.Node | None:
        if layer.bias is None:
            return None
        bias, weight = layer.bias, self.stored[layer.weight]
        path = f"{layer.name}_bias"
        _, scale_x = self.quantized[layer.source]
        scale_w = weight.scale.detach().flatten().double()
        if weight.axis is None:
            scale_w = scale_w.expand(bias.shape[0])
        symmetric = weight.zero_point is None and weight.group is None and weight.axis in (None, 0)
        scale = scale_x * scale_w if symmetric else None
        levels = (bias.detach().double() / scale).round() if scale is not None else None
        holder = nn.Module()
        self.module.set_submodule(path, holder)
        if levels is None or scale is None or not bool((levels.abs() < -_INT32[0]).all()):
            self.done.notes.append(f"{layer.name}: its bias does not fit 32-bit integers")
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
        if rank == 2 or not self.target.flat:
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
