"""How OpenVINO wants integer weights that float activations are multiplied with.

The ONNX reader leaves a weight as `(float(q) - float(z)) · s`, its zero points and scales reshaped
from vectors, transposed on the way to a product. It is written here as OpenVINO's own compression
writes it: integers, zero points of the same type and scales are constants in the shape in which
they are used, and a product reads its operand transposed.

- Scales are stored in half precision, and the arithmetic up to the weight is declared in it, where
  no scale is beyond the normal numbers of half precision: each is then rounded by at most 2⁻¹¹ of
  itself, at most an eighth of the step of 8 bits. The kernels compute in single.
- Zero points that are all 0 are not stored; 4 bits around 8 are stored as signed ones around 0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from fxcompress.emit._openvino_constants import always

__all__ = ["write_weights"]

# Smallest normal and largest number of half precision.
_HALF: Final = (2.0**-14, 65504.0)
_INTEGERS: Final = ("u4", "i4", "u8", "i8")
_MIDDLE: Final = 8


def write_weights(model: Any) -> int:
    """Rewrite the integer weights of products and tables of an `openvino.Model`, in place.

    Returns:
        How many weights have scales in half precision.
    """
    halved = 0
    for node in list(model.get_ordered_ops()):
        found = _Weight.at(node)
        if found is not None and all(_reads(port) for port in found.users):
            halved += found.rewrite()
    model.validate_nodes_and_infer_types()
    return halved


class _Weight:
    """A weight as the reader leaves it.

    Args:
        integers: The constant.
        scale, zero_point: What they are reshaped to, to be broadcast to the integers; None for 0.
        end: The node after a reshape and a transposition, if there are any.
        shape: What the groups are joined to; None without groups.
        transposed: Whether `end` is transposed.
    """

    def __init__(
        self, integers: Any, scale: Any, zero_point: Any, end: Any, shape: Any, transposed: bool
    ) -> None:
        self.integers, self.scale, self.zero_point = integers, scale, zero_point
        self.end, self.shape, self.transposed = end, shape, transposed

    @classmethod
    def at(cls, node: Any) -> _Weight | None:
        """Return the weight whose multiplication with its scale is `node`."""
        if node.get_type_name() != "Multiply":
            return None
        source, points = _operand(node, 0), None
        if source.get_type_name() == "Subtract":
            source, points = _operand(source, 0), source.input_value(1)
        integers = _operand(source, 0) if source.get_type_name() == "Convert" else None
        if (
            integers is None
            or integers.get_type_name() != "Constant"
            or _type(integers) not in _INTEGERS
        ):
            return None
        scale = always(node.input_value(1))
        zero_point = None if points is None else always(points)
        if scale is None or (points is not None and zero_point is None):
            return None
        end, shape, transposed = node, None, False
        after = _only_user(end)
        if after is not None and after.get_type_name() == "Reshape":
            end, shape = after, after.get_output_shape(0)
            after = _only_user(end)
        if after is not None and after.get_type_name() == "Transpose" and _is_matrix(after):
            end, transposed = after, True
        return cls(integers, scale, zero_point, end, shape, transposed)

    @property
    def users(self) -> list[Any]:
        """The inputs that read it."""
        return list(self.end.output(0).get_target_inputs())

    def rewrite(self) -> bool:
        """Let its readers read another form of it; return whether that is in half precision."""
        import openvino
        from openvino import opset13 as ops

        half = bool((self.scale >= _HALF[0]).all() and (self.scale <= _HALF[1]).all())
        dtype = openvino.Type.f16 if half else openvino.Type.f32
        integers, points = self._stored()
        made = ops.convert(integers, dtype)
        if points is not None:
            made = ops.subtract(made, ops.convert(points, dtype))
        scale = ops.constant(self.scale, dtype)
        scale.set_friendly_name(f"{self.integers.get_friendly_name()}.scale")
        made = ops.multiply(made, scale)
        if self.shape is not None:
            made = ops.reshape(made, ops.constant(np.array(self.shape, np.int64)), False)
        if half:
            made = ops.convert(made, openvino.Type.f32)
        for port in self.users:
            self._give(port, made)
        return half

    def _stored(self) -> tuple[Any, Any]:
        """Return the constants of the integers and of the zero points, if there are any."""
        import openvino
        from openvino import opset13 as ops

        kind, points = _type(self.integers), self.zero_point
        if points is None or not points.any():
            return self.integers, None
        name = self.integers.get_friendly_name()
        if kind == "u4" and (points == _MIDDLE).all():
            # The top bit of each of the two in a byte.
            packed = np.frombuffer(self.integers.get_data().tobytes(), np.uint8) ^ 0x88
            # A tensor made from the array would not keep the array alive.
            tensor = openvino.Tensor(openvino.Type.i4, self.integers.get_output_shape(0))
            tensor.data.view(np.uint8).reshape(-1)[:] = packed
            signed = ops.constant(tensor)
            signed.set_friendly_name(name)
            return signed, None
        made = ops.constant(points, self.integers.get_output_element_type(0))
        made.set_friendly_name(f"{name}.zero_point")
        return self.integers, made

    def _give(self, port: Any, made: Any) -> None:
        from openvino import opset13 as ops

        if not self.transposed:
            port.replace_source_output(made.output(0))
            return
        product = port.get_node()
        written = ops.matmul(product.input_value(0), made, False, True)
        written.set_friendly_name(product.get_friendly_name())
        written.output(0).set_names(product.output(0).get_names())
        for reader in list(product.output(0).get_target_inputs()):
            reader.replace_source_output(written.output(0))


def _reads(port: Any) -> bool:
    """Whether an input is a float product's second operand, or a table's."""
    node = port.get_node()
    kind = node.get_type_name()
    if kind == "Gather":
        return bool(port.get_index() == 0)
    if kind != "MatMul" or port.get_index() != 1 or node.get_attributes()["transpose_a"]:
        return False
    return not _is_rounded(_operand(node, 0))


def _is_rounded(node: Any) -> bool:
    """Whether an activation is integers times a scale: then the product is of integers."""
    while node.get_type_name() in ("Multiply", "Subtract", "Reshape", "Transpose"):
        node = _operand(node, 0)
    kind = node.get_type_name()
    return kind == "FakeQuantize" or (kind == "Convert" and _type(_operand(node, 0)) in _INTEGERS)


def _operand(node: Any, place: int) -> Any:
    return node.input_value(place).get_node()


def _type(node: Any) -> str:
    return str(node.get_output_element_type(0).get_type_name())


def _only_user(node: Any) -> Any:
    ports = list(node.output(0).get_target_inputs())
    return ports[0].get_node() if len(ports) == 1 else None


def _is_matrix(transpose: Any) -> bool:
    """Whether a transposition is of a matrix, for products that can read it transposed."""
    ports = transpose.output(0).get_target_inputs()
    return len(transpose.get_output_shape(0)) == 2 and all(
        port.get_node().get_type_name() == "MatMul"
        and port.get_index() == 1
        and not port.get_node().get_attributes()["transpose_b"]
        for port in ports
    )
