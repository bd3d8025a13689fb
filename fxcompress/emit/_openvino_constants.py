"""What in an OpenVINO model is the same for all inputs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["always", "fold_constants"]

# Sizes and places; a small weight would be multiplied out.
_SMALL: Final = 64
_TYPES: Final = ("i32", "i64", "boolean")


def fold_constants(model: Any) -> None:
    """Write small tensors that depend on no input as constants, in place.

    The reader of ONNX spells the defaults of an operator as operators on constants.
    """
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_output_size() != 1 or not node.get_input_size():
            continue
        output = node.output(0)
        # What its operands were computed from has been folded already.
        if not _is_small(output) or not all(map(_is_constant, node.input_values())):
            continue
        tensor = _tensor(output)
        if tensor is not None:
            made = ops.constant(tensor)
            made.set_friendly_name(node.get_friendly_name())
            for port in list(output.get_target_inputs()):
                port.replace_source_output(made.output(0))
    model.validate_nodes_and_infer_types()


def _is_constant(output: Any) -> bool:
    return bool(output.get_node().get_type_name() == "Constant")


def _is_small(output: Any) -> bool:
    shape = output.get_partial_shape()
    if not shape.is_static or output.get_element_type().get_type_name() not in _TYPES:
        return False
    return int(np.prod(shape.to_shape())) <= _SMALL


def always(output: Any) -> Any:
    """Return the array that an output always has, or None where it depends on inputs."""
    found = _tensor(output)
    return None if found is None else np.array(found.data)


def _tensor(output: Any) -> Any:
    import openvino

    node = output.get_node()
    if _is_constant(output):
        return node.get_tensor_view()
    operands = []
    for each in node.input_values():
        operands.append(_tensor(each))
        if operands[-1] is None:
            return None
    if not operands:
        return None
    made = openvino.Tensor(output.get_element_type(), output.get_shape())
    return made if node.evaluate([made], operands) else None
