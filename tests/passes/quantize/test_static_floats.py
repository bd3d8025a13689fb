"""`quantize.static` with 8-bit floats: what reads them, their numbers, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fxcompress.emit import EmitOptions, OnnxOptions, emit
from fxcompress.emit._lower import lower
from fxcompress.emit._plain import plain_program
from fxcompress.errors import EmitError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import FloatQuantize
from passes.quantize._options import StaticOptions
from passes.quantize.qat import QatOptions
from tests.passes.quantize.quantised import Add, folded, quantised, sequence
from tests.passes.support import sqnr

FORMATS = ["float8_e4m3", "float8_e5m2"]
DTYPES = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def rounded(x, dtype, bound):
    """Round to the nearest numbers of a format, `bound` at the end of its range."""
    largest = torch.finfo(DTYPES[dtype]).max
    scale = bound / largest
    return (x / scale).clamp(-largest, largest).to(DTYPES[dtype]).float() * scale


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_layer_multiplies_rounded_numbers(dtype):
    build = sequence(nn.Linear(24, 7))
    options = {"dtype": dtype, "activations": {"observer": "minmax"}}
    result = quantised(build, options, shape=(24,))
    ids = {name: node for node, name in node_ids(result.program).items()}
    activation = module_of(next(n for n in ids.values() if op_name(n) == "float_quant"))
    layer = result.program.state()
    weight, bias = layer["0.weight"], layer["0.bias"]
    x = 3 * torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    bound = activation.scale * activation.largest
    expected = F.linear(
        rounded(x, dtype, bound),
        rounded(weight, dtype, weight.abs().amax(1, keepdim=True)),
        bias,
    )
    torch.testing.assert_close(result.program.module(x), expected)


def test_nothing_but_what_multiplies_reads_them():
    program = quantised(Add, {"dtype": "float8_e4m3"}).program
    readers = {
        op_name(user)
        for node in program.nodes
        if op_name(node) == "float_quant"
        for user in node.users
    }
    assert readers == {"conv2d", "linear"}
    assert not any(op_name(node) == "fake_quant" for node in program.nodes)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
def test_more_bits_of_precision_are_nearer(observer):
    built = {
        dtype: quantised(Add, {"dtype": dtype, "activations": {"observer": observer}})
        for dtype in FORMATS
    }
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = folded(Add, 2, 3, 16, 16).module
    e4m3, e5m2 = (sqnr(wanted, made.program.module, x) for made in built.values())
    assert e4m3 > 20
    assert e5m2 < e4m3 - 1


def test_the_search_clips_an_outlier_that_costs_small_numbers_their_precision():
    build = sequence(nn.Linear(24, 7))
    for search in ("minmax", "mse"):
        made = quantised(build, {"dtype": "float8_e4m3", "weights": {"observer": search}},
                         shape=(24,)).program  # fmt: skip
        weight = made.state()["0.weight"]
        quantizer = next(
            module
            for module in made.module.modules()
            if isinstance(module, FloatQuantize) and module.axis == 0
        )
        error = (quantizer(weight) - weight).square().sum(1)
        if search == "minmax":
            covered = error
    assert (error <= covered).all()
    assert error.sum() < covered.sum()


@pytest.mark.parametrize("form", ["arithmetic", "storage", "decomposed"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_lowered_arithmetic_gives_the_same_bits(dtype, form):
    program = quantised(Add, {"dtype": dtype}).program
    plain = plain_program(program)
    lowered = lower(plain.module, form)
    assert any("activations are rounded to 8-bit floats" in note for note in lowered.notes)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain.module(x), program.module(x))


REFUSED = [
    ({"target": "onnxruntime"}, "onnxruntime's kernels take int, not float8_e4m3"),
    ({"target": "tensorrt-qdq", "dtype": "float8_e5m2"}, "float8_e4m3, not float8_e5m2"),
    ({"weights": {"bits": 4}}, "drop `bits`"),
    ({"overrides": [{"targets": ["a"], "activations": {"bits": 16}}]}, "drop `bits`"),
    ({"activations": {"signed": False}}, "signed and symmetric"),
    ({"activations": {"observer": "entropy"}}, "`entropy` counts integers"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_go_with_floats_is_refused_in_the_spec(options, message):
    with pytest.raises(ValidationError, match=message):
        StaticOptions.model_validate_json(json.dumps({"dtype": "float8_e4m3", **options}))


def test_scales_of_floats_are_not_trained():
    with pytest.raises(ValidationError, match=r"use quantize\.static, then train\.fit"):
        QatOptions(dtype="float8_e4m3")


def test_executorch_says_what_it_takes(tmp_path):
    pytest.importorskip("executorch")
    program = quantised(Add, {"dtype": "float8_e4m3"}).program
    with pytest.raises(EmitError, match="cannot take 5 quantizers of float8_e4m3") as caught:
        emit(program, tmp_path, ["executorch"])
    assert "8-bit integers" in caught.value.reason


@pytest.mark.slow
def test_tensorrt_gets_pairs_of_8_bit_floats(tmp_path):
    onnx = pytest.importorskip("onnx")
    program = quantised(Add, {"dtype": "float8_e4m3", "target": "tensorrt-qdq"}).program
    emit(program, tmp_path, ["onnx"], options=EmitOptions(onnx=OnnxOptions(target="tensorrt")))
    (path,) = tmp_path.glob("*.onnx")
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    kinds = {each.name: each.data_type for each in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            x, weight = (made[name] for name in node.input[:2])
            assert (x.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            assert made[x.input[0]].op_type == "QuantizeLinear"
            assert kinds[weight.input[0]] == onnx.TensorProto.FLOAT8E4M3FN
