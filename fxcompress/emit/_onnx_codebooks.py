"""Indices into codebooks, kept as bytes in an ONNX file.

The exporter computes what small constants give, and would write the looked-up weights. It leaves a
DequantizeLinear alone: so indices pass one of scale 1 until the model is made. Then it goes,
because onnxruntime does not compute it when it loads a file: it would look up in every call.
"""

from __future__ import annotations

from typing import Any

__all__ = ["release_indices"]

_INTEGERS = (6, 7)
"""INT32 and INT64 of onnx.TensorProto."""


def release_indices(model: Any) -> None:
    """Remove every DequantizeLinear whose result is made an integer again, in place."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        (output,) = node.outputs
        uses = [use.node for use in output.uses()]
        if not uses or not all(
            use.op_type == "Cast" and use.attributes["to"].as_int() in _INTEGERS for use in uses
        ):
            continue
        onnx_ir.convenience.replace_all_uses_with(output, node.inputs[0])
        settings = [value for value in node.inputs[1:] if value is not None]
        model.graph.remove(node, safe=True)
        for value in settings:
            if value.name in model.graph.initializers and not value.uses():
                del model.graph.initializers[value.name]
