"""Experts as integers in files: reloaded in a fresh process, compared, and as small as they say."""

import pytest
import torch
from torch import nn

from fxcompress.emit import EmitOptions, OnnxOptions, emit
from fxcompress.errors import EmitError
from fxcompress.ir import capture
from fxcompress.nn import Experts
from passes.quantize.weight_only import WeightOnly
from tests.passes.support import apply

EXPERTS, WIDTH, HIDDEN = 4, 16, 32


class Routed(nn.Module):
    """A mixture without a residual, so that nothing hides what experts make."""

    def __init__(self, *, gated):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(EXPERTS, WIDTH, HIDDEN, gated=gated, biases=("down",))

    def forward(self, x):
        weights, indices = self.router(x).softmax(-1).topk(2, -1)
        return self.experts(x, weights, indices)


def quantised(options, *, gated=True):
    torch.manual_seed(0)
    sizes = {"x": {0: "batch", 1: "seq"}}
    program = capture(Routed(gated=gated), (torch.randn(2, 5, WIDTH),), dynamic=sizes)
    return apply(WeightOnly, program, {"targets": ["experts"], **options}).program


MIXED = {
    "group": None,
    "overrides": [
        {"targets": ["experts.1"], "bits": 2}, {"targets": ["experts.2"], "bits": 8},
        {"targets": ["experts.3"], "bits": "float"},
    ],
}  # fmt: skip


def test_experts_of_several_widths_are_written(tmp_path):
    emit(quantised(MIXED, gated=False), tmp_path, ["python", "onnx"])
    matrix = WIDTH * HIDDEN
    wanted = 2 * matrix * (4 + 2 + 8 + 32) // 8
    scales = EXPERTS * (HIDDEN + WIDTH) * 5
    stored = (tmp_path / "weights.safetensors").stat().st_size
    assert wanted < stored < wanted + scales + 4000
    source = (tmp_path / "model.py").read_text()
    assert "self.experts_up_fq_2bit = PackedWeight(" in source
    import onnx

    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    # Experts of 4 and 2 bits by a kernel, that of 8 bits behind a dequantize.
    assert kinds.count("MatMulNBits") == 2 * 2
    assert kinds.count("DequantizeLinear") == 2
    # 2 bits stand in fields of 4 there.
    bytes_ = sum(len(each.raw_data) for each in graph.initializer)
    assert bytes_ < wanted + 2 * matrix * 2 // 8 + scales + 2000


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["pt2", "openvino", "inductor"])
def test_they_are_written_for_other_runtimes(format_, tmp_path):
    (made,) = emit(quantised(MIXED), tmp_path, [format_])
    assert made.comparison.finite


@pytest.mark.slow
def test_executorch_says_that_it_cannot(tmp_path):
    with pytest.raises(EmitError, match="ExecuTorch cannot take the program") as caught:
        emit(quantised(MIXED), tmp_path, ["executorch"])
    assert "onnx" in str(caught.value.hint)


@pytest.mark.slow
def test_activations_may_be_rounded_on_the_way(tmp_path):
    options = EmitOptions(onnx=OnnxOptions(activations="int8"))
    program = quantised({"bits": 8, "group": 16})
    (made,) = emit(program, tmp_path, ["onnx"], options=options)
    assert any("12 matrices of experts are MatMulNBits, activations" in n for n in made.notes)
