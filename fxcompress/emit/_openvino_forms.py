"""What OpenVINO wants of the graph before quantizers are lowered.

- A quantizer is called again where its scale passes through a reshape or a pool, which onnxruntime
  needs. OpenVINO moves scales through by itself, and computes each further call in float.
- A product takes the subtraction of a zero point into its own kernel if that operand is the first.
  Of EfficientNet-B0's scale · x the other order takes two kernels, and 1.09 times as long.
"""

from __future__ import annotations

from typing import Final

from torch import fx

from fxcompress.emit._lower import is_weight, quantizer_of
from fxcompress.ir.ops import op_name

__all__ = ["write_openvino_forms"]

# Ops through which OpenVINO's transformations move a scale, each value one of the operand's.
_MOVES: Final = frozenset(
    {
        "clone", "contiguous", "dropout", "dropout2d", "flatten", "identity", "max_pool1d",
        "max_pool2d", "permute", "reshape", "squeeze", "t", "transpose", "unsqueeze", "view",
    }
)  # fmt: skip


def write_openvino_forms(module: fx.GraphModule) -> None:
    """Drop repeated rounding and order the operands of products, in place."""
    for node in list(module.graph.nodes):
        if quantizer_of(node) is not None and not is_weight(node) and _is_repeated(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in module.graph.nodes:
        if op_name(node) == "mul" and len(node.args) == 2:
            first, second = node.args
            if _has_zero_point(second) and not _has_zero_point(first):
                node.args = (second, first)
    module.recompile()


def _is_repeated(node: fx.Node) -> bool:
    """Whether the values are those of the same quantizer already, moved."""
    source = node.args[0]
    while isinstance(source, fx.Node) and op_name(source) in _MOVES:
        source = source.args[0]
    return (
        isinstance(source, fx.Node)
        and source.op == "call_module"
        and (source.target == node.target)
    )


def _has_zero_point(node: object) -> bool:
    quantizer = quantizer_of(node) if isinstance(node, fx.Node) else None
    return quantizer is not None and bool(quantizer.zero_point.any())
