"""What is written for OpenVINO alone: one rounding per tensor, products whose zero point fuses."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.emit import emit
from fxcompress.emit._lower import ONNXRUNTIME, OPENVINO, is_weight, lower, quantizer_of
from fxcompress.emit._openvino_forms import write_openvino_forms
from fxcompress.emit._plain import plain_program
from fxcompress.ir import Program, capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from tests.emit.models import seeded
from tests.emit.quantized import drawn, static_encoder
from tests.passes.support import apply


class Gated(nn.Module):
    """A squeeze-and-excitation block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.stem(x))
        scale = self.gate(torch.nn.functional.adaptive_avg_pool2d(x, 1)).sigmoid()
        x = self.project(scale * x)
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def gated() -> Program:
    program = capture(seeded(Gated()), (torch.zeros(2, 3, 12, 12),), name="Gated")
    context = Context(data={"calibration": drawn(4, 3, 12, 12)})
    options = {"calibration": 16, "target": "openvino"}
    return apply(Static, program, options, context).program


def rounded(program: Program) -> Counter[str]:
    """Return how often each quantizer of an activation is called."""
    nodes = (n for n in program.module.graph.nodes if quantizer_of(n) and not is_weight(n))
    return Counter(str(n.target) for n in nodes)


def test_one_rounding_is_left_of_a_scale_that_passes_through(gated: Program) -> None:
    assert max(rounded(gated).values()) > 1, "the flatten's scale passes through"
    plain = plain_program(gated)
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    wanted = plain.module(x)
    write_openvino_forms(plain.module)
    calls = [n for n in plain.module.graph.nodes if quantizer_of(n) and not is_weight(n)]
    assert Counter(str(n.target) for n in calls) == dict.fromkeys(rounded(gated), 1)
    assert torch.equal(plain.module(x), wanted)


def test_the_operand_with_a_zero_point_comes_first(gated: Program) -> None:
    plain = plain_program(gated)
    (product,) = (n for n in plain.module.graph.nodes if op_name(n) == "mul")
    written = product.args
    write_openvino_forms(plain.module)
    assert product.args == written[::-1]
    points = [int(quantizer_of(each).zero_point) for each in product.args]
    assert points[0] > 0
    assert points[1] == 0


def test_gates_are_one_kernel_each(gated: Program, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    (artifact,) = emit(gated, tmp_path, ["openvino"])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(artifact.path), "CPU", settings)
    kinds = Counter(
        node.get_rt_info()["layerType"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
    )
    assert kinds["Convolution"] == 3
    assert kinds["Eltwise"] == 1, "the product, its zero point and what rounds it"
    assert kinds["FakeQuantize"] == 1, "of the input"


def test_linear_layers_keep_their_dimensions() -> None:
    """A reshape between a linear layer and a GELU would be in the way of one kernel."""
    flattened = {}
    for target in (OPENVINO, ONNXRUNTIME):
        plain = plain_program(static_encoder())
        lower(plain.module, "decomposed", target)
        calls = plain.module.graph.find_nodes(op="call_function", target=torch.flatten)
        flattened[target.name] = len(calls)
        assert len(plain.module.graph.find_nodes(op="call_function", target=F.linear)) == 7
    assert flattened == {"OpenVINO": 0, "onnxruntime": 7}
