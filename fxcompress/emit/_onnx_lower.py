"""What a reader of ONNX files computes with: the lowering for each."""

from __future__ import annotations

from typing import Literal

from torch import fx

from fxcompress.emit._dynamic import store_recurrent, write_dynamic
from fxcompress.emit._lower import ONNXRUNTIME, OPENVINO, TENSORRT, Lowered, lower
from fxcompress.emit._lower_experts import lower_experts
from fxcompress.emit._lower_nbits import lower_nbits
from fxcompress.emit._openvino_forms import write_openvino_forms
from fxcompress.errors import EmitError
from fxcompress.nn import DynamicQuantize

__all__ = ["OnnxTarget", "lower_for"]

OnnxTarget = Literal["onnxruntime", "openvino", "tensorrt"]


def lower_for(module: fx.GraphModule, target: OnnxTarget, activations: str) -> Lowered:
    """Lower every quantizer of `module`, in place.

    Args:
        module: A private copy of a program's graph.
        target: Who reads the file.
        activations: `float32` or `int8`, for layers whose weights alone are quantised
            (onnxruntime).

    Raises:
        EmitError: The target cannot compute with a quantizer of the graph.
    """
    if target == "tensorrt":
        _refuse_dynamic(module)
        lower_experts(module, "float32")
        return lower(module, "decomposed", TENSORRT)
    if target == "openvino":
        dropped, stored = drop_dynamic(module), store_recurrent(module)
        write_openvino_forms(module)
        # It reads these as weights of 4 bits; multiplied out, they would take a byte each.
        nbits = lower_nbits(module, "float32", embeddings=False)
        nbits.experts = lower_experts(module, "float32")
        lowered = lower(module, "decomposed", OPENVINO)
        lowered.linears += nbits.linears
        if dropped:
            lowered.notes.append(
                f"{dropped} activations are rounded at run time by OpenVINO itself, in its own way"
            )
        lowered.notes += stored
        return lowered
    rounded: Literal["int8", "float32"] = "int8" if activations == "int8" else "float32"
    nbits = lower_nbits(module, rounded)
    nbits.experts = lower_experts(module, rounded)
    dynamic = write_dynamic(module)
    lowered = lower(module, "decomposed", ONNXRUNTIME)
    for kind in ("convolutions", "linears", "recurrent"):
        setattr(lowered, kind, getattr(lowered, kind) + getattr(dynamic, kind))
    lowered.notes[:0] = dynamic.notes
    lowered.notes += nbits.notes(activations)
    return lowered


def drop_dynamic(module: fx.GraphModule) -> int:
    """Let layers read what was rounded at run time as it is; return how many roundings there were.

    For a runtime that rounds the inputs of layers with integer weights itself.
    """
    found = _dynamic(module)
    for node in found:
        source = node.args[0]
        assert isinstance(source, fx.Node), "a quantizer rounds what a node gives"
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    return len(found)


def _refuse_dynamic(module: fx.GraphModule) -> None:
    found = _dynamic(module)
    if found:
        raise EmitError(
            f"TensorRT cannot take {len(found)} activations that are quantised at run time",
            reason="its Q/DQ layers have constant scales",
            hint="use quantize.static with `activations: {symmetric: true, signed: true}`",
            where=str(found[0].target),
        )


def _dynamic(module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_module"
        and isinstance(module.get_submodule(str(node.target)), DynamicQuantize)
    ]
