"""What the ONNX writer makes of attention, of norms and of chains of small nodes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.emit import EmitOptions, OnnxOptions
from fxcompress.emit._job import Job
from fxcompress.emit._onnx_simplify import simplify
from fxcompress.emit.onnx import write
from fxcompress.ir import capture


class Masked(nn.Module):
    """Attention with a mask that is an input: `[batch, heads, seq, width]`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)


class Plain(nn.Module):
    """Attention without a mask, causal or not, with a scale of its own."""

    def __init__(self, *, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.causal, self.scale = causal, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, scale=self.scale
        )


class Grouped(nn.Module):
    """Two heads of queries share one of keys and values."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key[:, :2], value[:, :2], is_causal=True, enable_gqa=True
        )


class Norm(nn.Module):
    """Root mean square norm, as models of the Llama family write it, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def drawn(*shapes: Sequence[int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def written(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, opset: int = 20) -> Path:
    """Write `model` with a dynamic batch and sequence."""
    names = ("query", "key", "value", "mask")
    sizes = {name: {0: "batch", 2: "seq"} for name in names[: min(len(inputs), 3)]}
    if len(inputs) == 4:
        sizes["mask"] = {0: "batch", 2: "seq", 3: "seq"}
    dynamic = sizes if len(inputs) > 1 else {"x": {0: "batch"}}
    program = capture(model.eval(), inputs, dynamic=dynamic)
    options = EmitOptions(onnx=OnnxOptions(opset=opset))
    (name,) = write(Job(program, folder, options, inputs, quantized=False)).files
    return folder / name


def run(path: Path, inputs: Sequence[Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    inputs = (*drawn(*3 * [(2, 4, 5, 8)]), mask)
    return written(Masked(), inputs, tmp_path_factory.mktemp("masked"))


class TestAttention:
    def test_keys_are_transposed_once_and_no_map_is_searched_for_nan(self, masked: Path) -> None:
        found = kinds(masked)
        assert (found["Transpose"], found["MatMul"], found["Softmax"]) == (1, 2, 1)
        assert not {"Reshape", "Slice", "Concat", "IsNaN"} & set(found)

    def test_a_query_that_may_see_nothing_reads_zeros_as_in_torch(self, masked: Path) -> None:
        inputs = drawn(*3 * [(3, 4, 7, 8)])
        mask = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
        mask[1, :, 2] = mask[2, :, :, 3:] = False
        mask[0, :, 6] = False
        expected = Masked()(*inputs, mask)
        assert not expected[1, :, 2].any()
        torch.testing.assert_close(run(masked, (*inputs, mask)), expected)

    def test_a_mask_of_floats_is_added(self, tmp_path: Path) -> None:
        inputs = (*drawn(*3 * [(2, 4, 5, 8)]), drawn((2, 1, 5, 5))[0])
        path = written(Masked(), inputs, tmp_path)
        torch.testing.assert_close(run(path, inputs), Masked()(*inputs))

    @pytest.mark.parametrize(
        "model", [Plain(), Plain(scale=0.7), Plain(causal=True), Grouped()],
        ids=["plain", "scale", "causal", "grouped"],
    )  # fmt: skip
    def test_other_forms_and_other_sizes(self, model: nn.Module, tmp_path: Path) -> None:
        path = written(model, drawn(*3 * [(2, 4, 5, 8)]), tmp_path)
        inputs = drawn(*3 * [(3, 4, 6, 8)])
        torch.testing.assert_close(run(path, inputs), model(*inputs))

    def test_opset_23_has_an_operator_of_its_own(self, tmp_path: Path) -> None:
        path = written(Plain(), drawn(*3 * [(2, 4, 5, 8)]), tmp_path, opset=23)
        assert kinds(path) == Counter({"Attention": 1})


def test_onnxruntime_makes_one_kernel_of_a_root_mean_square_norm(tmp_path: Path) -> None:
    (x,) = drawn((4, 8))
    path = written(Norm(), (x,), tmp_path)
    assert "Reciprocal" not in kinds(path)
    torch.testing.assert_close(run(path, (x,)), Norm()(x))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert kinds(tmp_path / "optimised.onnx") == Counter(
        {"SimplifiedLayerNormalization": 1, "Add": 1}
    )


def parsed(text: str) -> onnx_ir.Model:
    return onnx_ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')


def order(model: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def read(model: onnx_ir.Model) -> list[str | None]:
    """Return what the first node reads."""
    return [value.name for value in model.graph[0].inputs if value is not None]


class TestSimplify:
    def test_a_reshape_of_a_reshape_is_one(self) -> None:
        model = parsed(
            "g (float[2,6] x) => (float[4,3] y) <int64[2] a = {3,4}, int64[2] b = {4,-1}>"
            "{ h = Reshape(x, a) y = Reshape(h, b) }"
        )
        simplify(model)
        assert order(model) == ["Reshape"]
        assert read(model) == ["x", "b"]

    def test_a_size_taken_from_the_input_keeps_both(self) -> None:
        model = parsed(
            "g (float[2,6] x) => (float[3,4] y) <int64[2] a = {3,4}, int64[2] b = {0,4}>"
            "{ h = Reshape(x, a) y = Reshape(h, b) }"
        )
        simplify(model)
        assert order(model) == ["Reshape", "Reshape"]

    @pytest.mark.parametrize("factors", ["x, r", "r, x"])
    def test_times_a_reciprocal_is_a_division(self, factors: str) -> None:
        model = parsed(
            f"g (float[2] x, float[2] d) => (float[2] y) {{ r = Reciprocal(d) y = Mul({factors}) }}"
        )
        simplify(model)
        assert order(model) == ["Div"]
        assert read(model) == ["x", "d"]

    def test_a_reciprocal_that_others_read_stays(self) -> None:
        model = parsed(
            "g (float[2] x, float[2] d) => (float[2] y, float[2] r)"
            "{ r = Reciprocal(d) y = Mul(x, r) }"
        )
        simplify(model)
        assert order(model) == ["Reciprocal", "Mul"]

    def test_a_reciprocal_squared_stays_right(self) -> None:
        model = parsed("g (float[2] d) => (float[2] y) { r = Reciprocal(d) y = Mul(r, r) }")
        simplify(model)
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
        (found,) = session.run(None, {"d": numpy.array([2, 4], numpy.float32)})
        assert found.tolist() == [0.25, 0.0625]
