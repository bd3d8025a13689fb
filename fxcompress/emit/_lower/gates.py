"""SiLU in integers: x · σ(x) as an integer table look-up and an integer product.

onnxruntime has integer kernels for σ and for products, none for SiLU, and one float function between
two convolutions costs more than what they gain: an EfficientNet-B0 with 49 of them is 1.6 × slower.
σ(x) lies between 0 and 1, so that its scale is 1/256 whatever the data; that rounding adds at most
|x|/512 to the result.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from fxcompress.ir.ops import op_name

__all__ = ["write_gates"]

_SIGMOID: Final = (1 / 256, 0, 0, 255, torch.uint8)


def write_gates(graph: fx.Graph, ops: Any) -> int:
    """Write each SiLU between integers as integer σ and product; return how many there are.

    Args:
        graph: Lowered: quantize/dequantize pairs stand where fake-quantize nodes stood.
        ops: `torch.ops.quantized_decomposed`.
    """
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    count = 0
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if op_name(node) != "silu" or not isinstance(source, fx.Node):
            continue
        read = source.target is dequantize and "out_dtype" not in source.kwargs
        if not read or not node.users or any(user.target is not quantize for user in node.users):
            continue
        with graph.inserting_before(node):
            gate = graph.call_function(torch.sigmoid, (source,))
            rounded = graph.call_function(quantize, (gate, *_SIGMOID))
            factor = graph.call_function(dequantize, (rounded, *_SIGMOID))
            # One dequantize per consumer.
            again = graph.call_function(dequantize, source.args, dict(source.kwargs))
            product = graph.call_function(torch.mul, (again, factor))
        for made in (gate, factor, again, product):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        count += 1
    return count
