"""`quantize.dynamic` in runtimes: reloaded, compared, integer kernels counted, sizes."""

import pytest
import torch
from torch import nn

from fxcompress.emit import emit
from fxcompress.emit._dynamic import sum_rows
from fxcompress.emit.kernels import integer_kernels, runtime_kernels
from fxcompress.ir import capture
from passes.quantize.dynamic import Dynamic
from tests.passes.models import Transformer, token_batches
from tests.passes.quantize.test_dynamic import Recurrent
from tests.passes.support import apply, captured, random_input, seeded

onnxruntime = pytest.importorskip("onnxruntime")


def transformer(width=64):
    model = seeded(lambda: Transformer(width=width, depth=1, heads=4))
    return capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})


def recurrent(kind, layers=1, both=False):
    model = seeded(lambda: Recurrent(kind, layers, both))
    return capture(model, (random_input(2, 5, 6),), dynamic={"x": {0: "batch", 1: "time"}})


def written(program, folder, formats, options=None):
    made = apply(Dynamic, program, options).program
    return {each.format: each for each in emit(made, folder, formats)}


@pytest.mark.parametrize(
    ("activations", "kernels"),
    [
        ({"per": "token"}, {"MatMulIntegerToFloat": 5}),
        ({"per": "token", "symmetric": True}, {"MatMulIntegerToFloat": 5}),
        ({"per": "tensor"}, {"DynamicQuantizeMatMul": 5}),
        ({"per": "tensor", "symmetric": True, "bits": 6}, None),
    ],
)
def test_a_transformer_block_in_onnxruntime(tmp_path, activations, kernels):
    found = written(transformer(), tmp_path, ["onnx"], {"activations": activations})["onnx"]
    assert "5 of 5 linear layers run as integer kernels in onnxruntime" in found.notes
    # The same integers on both sides, but for a rare tie: floats are added in another order.
    assert found.comparison.relative < 0.02
    assert found.comparison.cosine > 0.9999
    if kernels:
        assert dict(integer_kernels(found.path)) == kernels


def test_files_are_near_a_quarter(tmp_path):
    program = captured(
        lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), 2, 256
    )
    (plain,) = emit(program, tmp_path / "float", ["onnx"])
    made = written(program, tmp_path / "int8", ["onnx", "pt2", "python"])
    assert made["onnx"].bytes < 0.3 * plain.bytes
    for name in ("pt2", "python"):
        assert made[name].comparison.relative < 1e-5


def test_a_tensor_that_several_layers_read_is_rounded_once(tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    options = {"activations": {"per": "tensor"}}
    found = written(captured(Three, 2, 4, 32), tmp_path, ["onnx"], options)["onnx"]
    kernels = runtime_kernels(found.path)
    assert (kernels["DynamicQuantizeLinear"], kernels["MatMulIntegerToFloat"]) == (1, 3)


def test_zero_points_of_tokens_are_part_of_the_product(tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    found = written(captured(Three, 2, 4, 32), tmp_path, ["onnx"])["onnx"]
    kernels = runtime_kernels(found.path)
    assert kernels["MatMulIntegerToFloat"] == 3
    assert kernels["Concat"] <= 2, "elements of tokens, which the three layers share, and a shape"
    # Of q · k + v and of one range; the rest would be a correction of each layer.
    assert (kernels["Sub"], kernels["Mul"], kernels["Add"]) == (1, 3 + 1, 3 + 1)
    assert (kernels["ReduceMax"], kernels["ReduceMin"], kernels["QuantizeLinear"]) == (1, 1, 2)


@pytest.mark.parametrize("shape", [(3, 5), (4, 600), (2, 1)])
def test_rows_of_bytes_hold_the_sums_of_a_weight(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    weight[0] = -127
    rows = sum_rows(weight)
    assert rows.dtype == torch.int8
    assert torch.equal(rows.sum(0, dtype=torch.int64), weight.sum(1, dtype=torch.int64))
    assert rows.shape[0] % 16 == 0
    assert rows.shape[0] < shape[1] + 16
    assert sum_rows(torch.zeros(3, 4, dtype=torch.int8)).shape == (0, 3)


def test_a_token_of_nothing_but_zeros(tmp_path):
    program = captured(lambda: nn.Linear(8, 4), 2, 3, 8)
    found = written(program, tmp_path, ["onnx"])["onnx"]
    session = onnxruntime.InferenceSession(str(found.path))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    (name,) = (each.name for each in session.get_inputs())
    (y,) = session.run(None, {name: x.numpy()})
    bias = next(each for key, each in program.state().items() if key.endswith("bias"))
    assert torch.equal(torch.from_numpy(y[0, 1]), bias)


def test_convolutions_are_integer_kernels(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))

    found = written(captured(build, 2, 3, 12, 12), tmp_path, ["onnx"])["onnx"]
    assert dict(integer_kernels(found.path)) == {"ConvInteger": 2}
    assert found.comparison.relative < 0.02


def test_what_has_no_kernel_stays_in_float_and_is_noted(tmp_path):
    def build():
        return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), nn.ReLU())

    found = written(captured(build, 2, 4, 12), tmp_path, ["onnx"])["onnx"]
    assert any("computed in float, there is no integer kernel for it" in n for n in found.notes)


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_an_lstm_is_the_kernel_of_onnxruntime(tmp_path, layers, both):
    found = written(recurrent("LSTM", layers, both), tmp_path, ["onnx"])["onnx"]
    assert integer_kernels(found.path)["DynamicQuantizeLSTM"] == layers
    assert found.comparison.relative < 0.02
    assert (
        f"{layers} of {layers} recurrent layers run as integer kernels in onnxruntime"
        in found.notes
    )


@pytest.mark.slow
def test_an_lstm_in_executorch_takes_any_batch(tmp_path):
    pytest.importorskip("executorch")
    program = captured(lambda: Recurrent("LSTM", 2, True), 2, 5, 6)
    found = written(program, tmp_path, ["executorch"])["executorch"]
    assert any("multiplied out and computed in float" in note for note in found.notes)
    assert found.comparison.relative < 0.02


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_in_openvino_store_integers(tmp_path, kind):
    pytest.importorskip("openvino")
    found = written(recurrent(kind, 2, True), tmp_path, ["openvino"])["openvino"]
    assert any("computed in float, with weights stored as integers" in n for n in found.notes)
    assert found.comparison.relative < 0.02


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_recurrent_layers_keep_integer_weights_and_say_that_they_compute_in_float(
    tmp_path, kind
):
    found = written(recurrent(kind, 2, True), tmp_path, ["onnx"])["onnx"]
    assert any(f"no integer kernel for {kind}" in note for note in found.notes)
    assert found.comparison.relative < 1e-4
    assert runtime_kernels(found.path)[kind] == 2


def test_an_lstm_in_plain_torch_takes_any_length(tmp_path):
    found = written(recurrent("LSTM", 1, True), tmp_path, ["pt2", "python"])
    assert found["python"].comparison.relative < 1e-5
    assert found["pt2"].comparison.relative < 1e-5
    module = torch.export.load(found["pt2"].path).module()
    assert module(random_input(3, 11, 6)).shape == (3, 11, 3)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_recurrent_layers_in_python(tmp_path, kind):
    found = written(recurrent(kind, 2, True), tmp_path, ["python"])["python"]
    assert found.comparison.relative < 1e-5


def test_four_bits_of_weights(tmp_path):
    found = written(transformer(), tmp_path, ["onnx", "pt2"], {"weights": {"bits": 4}})
    assert found["onnx"].comparison.cosine > 0.999
    assert found["pt2"].comparison.relative < 1e-5
