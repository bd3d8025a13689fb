"""Integer weights as OpenVINO's own compression writes them, in models built by hand."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fxcompress.emit._openvino_constants import fold_constants
from fxcompress.emit._openvino_weights import write_weights

openvino = pytest.importorskip("openvino")
ops = openvino.opset13

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((3, 64)).astype(np.float32)


def read(kind: str, scale: float = 0.01, middle: int | None = None, rounded: bool = False) -> Any:
    """Return a model with a weight `[8, 64]` as the reader of ONNX leaves it: rows in groups."""
    groups = (8, 2, 32)
    bits = int(kind[1:])
    values = GENERATOR.integers(0, 2**bits, groups).astype(np.uint8)
    points = GENERATOR.integers(1, 2**bits, (8, 2)).astype(np.uint8)
    if middle is not None:
        points[:] = middle
    scales = (scale * GENERATOR.uniform(0.5, 1, (8, 2))).astype(np.float32)
    dtype = getattr(openvino.Type, kind)
    shape = ops.constant(np.array([8, 2, 1], np.int64))
    difference = ops.subtract(
        ops.convert(ops.constant(values, dtype), "f32"),
        ops.reshape(ops.convert(ops.constant(points, dtype), "f32"), shape, False),
    )
    product = ops.multiply(difference, ops.reshape(ops.constant(scales), shape, False))
    weight = ops.reshape(product, ops.constant(np.array([0, -1], np.int64)), True)
    weight = ops.transpose(weight, ops.constant(np.array([1, 0], np.int64)))
    x = ops.parameter([-1, 64], np.float32, name="x")
    ends = [ops.constant(np.float32(each)) for each in (-4, 4, -4, 4)]
    source = ops.fake_quantize(x, *ends, 256) if rounded else x
    return openvino.Model([ops.matmul(source, weight, False, False)], [x], "layer")


def kinds(model: Any) -> Counter[str]:
    return Counter(
        node.get_output_element_type(0).get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_output_size() and node.shape != [2]
    )


def integers(model: Any) -> list[Any]:
    """Return the bytes of the constants of four bits."""
    return [
        np.frombuffer(node.get_data().tobytes(), np.uint8)
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant"
        and node.get_output_element_type(0).get_type_name() in ("u4", "i4")
    ]


def run(model: Any) -> Any:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return openvino.Core().compile_model(model, "CPU", settings)([X])[0]


@pytest.mark.parametrize("kind", ["u4", "u8"])
def test_scales_are_halves_and_zero_points_integers(kind: str) -> None:
    model = read(kind)
    wanted = run(model.clone())
    assert write_weights(model) == 1
    assert kinds(model) == Counter({kind: 2, "f16": 1})
    (product,) = (node for node in model.get_ops() if node.get_type_name() == "MatMul")
    assert product.get_attributes() == {"transpose_a": False, "transpose_b": True}
    # Each scale is off by 2^-11 of itself at most.
    error = np.abs(run(model) - wanted).max()
    assert 0 < error < 2**-11 * np.abs(wanted).max() * 4


def test_scales_below_the_normal_halves_stay_single() -> None:
    model = read("u8", scale=1e-5)
    wanted = run(model.clone())
    assert write_weights(model) == 0
    assert kinds(model) == Counter({"u8": 2, "f32": 1})
    assert np.abs(run(model) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_four_bits_around_the_middle_are_signed() -> None:
    model = read("u4", middle=8)
    wanted = run(model.clone())
    write_weights(model)
    assert kinds(model) == Counter({"i4": 1, "f16": 1})
    assert np.abs(run(model) - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_signed_integers_outlive_what_they_were_made_from() -> None:
    model = read("u4", middle=8)
    (before,) = (constant for constant in integers(model) if constant.size == 256)
    write_weights(model)
    # What was freed is written over.
    junk = [np.full(size, 85, np.uint8) for size in (256, 512) for _ in range(2000)]
    (after,) = integers(model)
    assert junk
    assert np.array_equal(before ^ 0x88, after)


def test_a_product_of_integers_is_left_alone() -> None:
    model = read("u8", rounded=True)
    before = Counter(node.get_type_name() for node in model.get_ops())
    assert write_weights(model) == 0
    assert Counter(node.get_type_name() for node in model.get_ops()) == before


def test_sizes_are_folded_and_weights_are_not() -> None:
    x = ops.parameter([-1, 4], np.float32, name="x")
    places = ops.broadcast(
        ops.constant(np.int64(1)), ops.shape_of(ops.constant(np.array([5], np.int64)))
    )
    chosen = ops.gather(ops.shape_of(x), places, ops.constant(np.int64(0)))
    stored = ops.multiply(
        ops.convert(ops.constant(np.ones((4, 4), np.int8)), "f32"), ops.constant(np.float32(0.5))
    )
    model = openvino.Model([chosen, ops.matmul(x, stored, False, False)], [x], "sizes")
    fold_constants(model)
    found = Counter(node.get_type_name() for node in model.get_ops())
    assert found["Broadcast"] == 0
    assert found["ShapeOf"] == 1, "of the input"
    assert found["Multiply"] == 1
    assert "i8" in kinds(model)
