"""Every format, written and proved in a fresh process, on small models of each kind."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.emit import Artifact, EmitOptions, Pt2Options, emit
from fxcompress.errors import EmitError
from fxcompress.ir import Program, capture
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.emit.models import ConvNet, conv_net, language_model, seeded
from tests.passes.support import apply

ALL = ("program", "pt2", "onnx", "python")


def by_format(artifacts: Sequence[Artifact]) -> dict[str, Artifact]:
    return {artifact.format: artifact for artifact in artifacts}


def quantized_conv_net() -> Program:
    program = apply(FoldBatchNorm, conv_net()).program
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 16, 16, generator=generator),) for _ in range(4)]
    context = Context(data={"calibration": batches})
    return apply(Static, program, {"calibration": 16}, context).program


def learned_stack() -> Program:
    """A plain stack, its layers numbered, with quantizers whose steps are trained."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    program = capture(seeded(layers), (x,), verify=False)
    context = Context(data={"calibration": [(x,)]})
    program = apply(Static, program, {"calibration": 4}, context).program
    for module in program.module.modules():
        if isinstance(module, FakeQuantize):
            module.learn()
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    root = tmp_path_factory.mktemp("emit")
    return lambda name: root / name


@pytest.fixture(scope="module")
def conv(folder: Callable[[str], Path]) -> dict[str, Artifact]:
    return by_format(emit(conv_net(), folder("conv"), ALL))


@pytest.fixture(scope="module")
def int8(folder: Callable[[str], Path]) -> dict[str, Artifact]:
    return by_format(emit(quantized_conv_net(), folder("int8"), ALL))


@pytest.fixture(scope="module")
def text(folder: Callable[[str], Path]) -> dict[str, Artifact]:
    return by_format(emit(language_model(), folder("text"), ALL))


def test_every_format_computes_what_the_program_computes(conv: dict[str, Artifact]) -> None:
    assert set(conv) == set(ALL)
    for name in ("program", "pt2", "python"):
        assert conv[name].comparison.max_abs == 0, name
    assert conv["onnx"].comparison.relative < 1e-5
    assert set(conv["onnx"].comparison.outputs) == {"['logits']", "['pooled']"}


def test_an_artifact_tells_the_truth_about_its_files(conv: dict[str, Artifact]) -> None:
    for artifact in conv.values():
        assert artifact.bytes == sum(path.stat().st_size for path in artifact.paths)
        for path in artifact.paths:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert artifact.sha256[path.name] == digest
    assert [path.name for path in conv["python"].paths] == ["model.py", "weights.safetensors"]
    assert not list(conv["onnx"].path.parent.glob(".emit-*")), "the staging folder is gone"


def test_masks_keywords_ties_and_two_dynamic_sizes(text: dict[str, Artifact]) -> None:
    for name in ("program", "pt2", "python"):
        assert text[name].comparison.max_abs == 0, name
    assert text["onnx"].comparison.relative < 1e-5
    assert "outputs output_0, output_1_last, output_1_mean" in text["onnx"].notes[0]
    assert "`module(ids, attention_mask=attention_mask)`" in text["pt2"].notes[0]


def test_a_tied_weight_is_stored_once(text: dict[str, Artifact]) -> None:
    header = read_header(text["python"].paths[1])
    assert "tokens.weight" in header
    assert "head.weight" not in header
    model = load_source(text["python"].path)
    assert model.head.weight is model.tokens.weight
    assert set(model.state_dict()) == set(language_model().module.state_dict())


def test_onnx_sizes_are_named(text: dict[str, Artifact]) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(text["onnx"].path)).graph
    sizes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert sizes == {"ids": ["batch", "seq"], "attention_mask": ["batch", "seq"]}


def test_every_integer_layer_runs_as_an_integer_kernel(int8: dict[str, Artifact]) -> None:
    notes = int8["onnx"].notes
    assert "10 of 10 convolutions run as integer kernels in onnxruntime" in notes
    assert "1 of 1 linear layers run as integer kernels in onnxruntime" in notes
    assert any("4 QLinearAdd" in note for note in notes)


def test_integers_are_stored_as_integers(
    conv: dict[str, Artifact], int8: dict[str, Artifact]
) -> None:
    header = read_header(int8["python"].paths[1])
    assert header["stages.0.conv1.weight"]["dtype"] == "I8"
    assert header["fc.weight"]["dtype"] == "I8"
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(int8["onnx"].path))
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["stages.0.conv1_weight_fq.weight"] == onnx.TensorProto.INT8
    assert types["fc_bias.bias"] == onnx.TensorProto.INT32
    quantized = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert not {n.input[0] for n in quantized} & set(types), "no weight is quantised at run time"
    exported = torch.export.load(int8["pt2"].path)
    assert exported.state_dict["stages.0.conv1_weight_fq.weight"].dtype is torch.int8


def test_int8_computes_what_fake_quantization_computes(int8: dict[str, Artifact]) -> None:
    for name in ("program", "pt2", "python"):
        assert int8[name].comparison.max_abs < 1e-4, name
    assert int8["onnx"].comparison.cosine > 0.999


def test_the_decomposed_form_keeps_pairs_for_other_backends(tmp_path: Path) -> None:
    options = EmitOptions(pt2=Pt2Options(quantized="decomposed"))
    (artifact,) = emit(quantized_conv_net(), tmp_path, ["pt2"], options=options)
    targets = [str(n.target) for n in torch.export.load(artifact.path).graph.nodes]
    quantize = targets.count("quantized_decomposed.quantize_per_tensor.default")
    dequantize = targets.count("quantized_decomposed.dequantize_per_tensor.default")
    assert quantize > 10
    assert dequantize > quantize, "one dequantize per consumer"
    assert "import torch.ao.quantization.fx._decomposed first" in artifact.notes[1]


@pytest.mark.parametrize("make", [conv_net, quantized_conv_net])
def test_the_same_program_gives_the_same_bytes(
    make: Callable[[], Program],
    tmp_path: Path,
    conv: dict[str, Artifact],
    int8: dict[str, Artifact],
) -> None:
    first = conv if make is conv_net else int8
    again = by_format(emit(make(), tmp_path, ("program", "onnx", "python")))
    for name, artifact in again.items():
        assert artifact.sha256 == first[name].sha256, name


def test_nothing_of_this_machine_is_in_the_files(conv: dict[str, Artifact]) -> None:
    here = str(Path(__file__).parent).encode()
    for artifact in conv.values():
        for path in artifact.paths:
            assert here not in path.read_bytes(), path.name


def test_bfloat16(tmp_path: Path) -> None:
    model = seeded(ConvNet()).to(torch.bfloat16)
    program = capture(model, (torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16),), verify=False)
    found = by_format(emit(program, tmp_path, ("program", "pt2", "python")))
    assert found["python"].comparison.max_abs == 0
    assert read_header(found["python"].paths[1])["fc.weight"]["dtype"] == "BF16"
    with pytest.raises(EmitError, match="onnxruntime runs no bfloat16 model") as caught:
        emit(program, tmp_path, ["onnx"])
    assert "cast to float16" in caught.value.hint


def test_a_real_batch_is_used_as_given(tmp_path: Path) -> None:
    batch = torch.full((3, 3, 16, 16), 0.5)
    (artifact,) = emit(conv_net(), tmp_path, ["program"], example_inputs=(batch,))
    assert artifact.comparison.max_abs == 0


def read_header(path: Path) -> dict[str, dict[str, object]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, object]] = json.loads(file.read(size))
    return header


def load_source(path: Path) -> torch.nn.Module:
    scope: dict[str, object] = {"__name__": "emitted", "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    load = scope["load"]
    assert callable(load)
    model: torch.nn.Module = load()
    return model


def test_learned_steps_are_emitted_as_what_they_learned(tmp_path: Path) -> None:
    program = learned_stack()
    artifacts = by_format(emit(program, tmp_path, ALL))
    assert artifacts["program"].comparison.max_abs == 0.0
    assert "1 QGemm, 1 QLinearConv" in " ".join(artifacts["onnx"].notes)
    steps = [name for name, _ in program.module.named_parameters() if name.endswith("_fq.scale")]
    assert len(steps) == 4, "emitting changes nothing in the program"
