"""ONNX for TensorRT: the rules of its explicit quantization, checked over the file's graph."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from fxcompress.emit import EmitOptions, OnnxOptions, emit
from fxcompress.errors import EmitError
from fxcompress.ir import Program
from tests.emit.quantized import dynamic_encoder, small_net, static_net

onnx = pytest.importorskip("onnx")

SYMMETRIC = {"activations": {"symmetric": True, "signed": True}}
TENSORRT = EmitOptions(onnx=OnnxOptions(target="tensorrt"))


def violations(graph: Any) -> list[str]:
    """Return what TensorRT would not take as a constant s8 Q/DQ pair around 0."""
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    tensors |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    tensors |= {
        node.output[0]: numpy.array(node.attribute[0].f, dtype=numpy.float32)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value_float"
    }
    made = {name: node for node in graph.node for name in node.output}
    found = [
        f"{node.op_type} of {node.domain}"
        for node in graph.node
        if node.domain not in ("", "pkg.onnxscript.torch_lib")
    ]
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        x, scale, zero_point = [*node.input, ""][:3]
        if scale not in tensors or not (tensors[scale] > 0).all():
            found.append(f"{node.name}: its scale is not constant and positive")
        if zero_point not in tensors or tensors[zero_point].dtype != numpy.int8:
            found.append(f"{node.name}: its integers are not signed bytes")
        elif tensors[zero_point].any():
            found.append(f"{node.name}: its zero point is not 0")
        if node.op_type == "DequantizeLinear" and x in tensors:
            axes = [each.i for each in node.attribute if each.name == "axis"]
            if tensors[x].ndim < 2 or axes != [0]:
                found.append(f"{node.name}: a constant that is no weight per output channel")
        elif node.op_type == "DequantizeLinear" and made[x].op_type != "QuantizeLinear":
            found.append(f"{node.name}: it reads {made[x].op_type}, not QuantizeLinear")
    return found


def graph_of(program: Program, folder: Path, options: EmitOptions) -> Any:
    (artifact,) = emit(program, folder, ["onnx"], options=options)
    assert artifact.comparison.cosine > 0.99, "onnxruntime runs the file too"
    return onnx.load(str(artifact.path)).graph


def test_every_pair_is_signed_around_zero(tmp_path: Path) -> None:
    graph = graph_of(static_net(SYMMETRIC), tmp_path, TENSORRT)
    assert violations(graph) == []
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") >= 6
    assert kinds.count("DequantizeLinear") >= kinds.count("QuantizeLinear") + 5
    types = {each.name: each.data_type for each in graph.initializer}
    assert types["fc.bias"] == onnx.TensorProto.FLOAT
    assert types["fc_weight_fq.weight"] == onnx.TensorProto.INT8
    assert onnx.TensorProto.INT32 not in types.values()


def test_the_file_for_onnxruntime_is_another(tmp_path: Path) -> None:
    found = violations(graph_of(static_net(SYMMETRIC), tmp_path, EmitOptions()))
    assert any("not signed bytes" in each for each in found)
    assert any("no weight per output channel" in each for each in found), "integer biases"


def test_lopsided_quantizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmitError, match=r"TensorRT cannot take \d+ of the quantizers") as caught:
        emit(static_net(), tmp_path, ["onnx"], options=TENSORRT)
    assert "these are not: x_fq" in caught.value.reason
    assert "{symmetric: true, signed: true}" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_run_time_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="quantised at run time"):
        emit(dynamic_encoder(), tmp_path, ["onnx"], options=TENSORRT)


def test_a_float_program_has_no_pairs(tmp_path: Path) -> None:
    kinds = {node.op_type for node in graph_of(small_net(), tmp_path, TENSORRT).node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
