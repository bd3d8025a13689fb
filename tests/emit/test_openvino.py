"""The OpenVINO IR, loaded and run by OpenVINO, its integer kernels counted."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from fxcompress.emit import Artifact, EmitOptions, OpenvinoOptions, emit
from fxcompress.emit.kernels import openvino_kernels
from passes.quantize.weight_only import WeightOnly
from tests.emit.quantized import dynamic_encoder, encoder, small_net, static_encoder, static_net
from tests.passes.support import apply

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    (artifact,) = emit(static_net(), tmp_path_factory.mktemp("net"), ["openvino"])
    return artifact


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    (artifact,) = emit(small_net(), tmp_path_factory.mktemp("whole"), ["openvino"])
    return artifact


def test_every_layer_of_a_static_net_computes_in_u8(net: Artifact) -> None:
    found = openvino_kernels(net.path)
    assert found.convolutions == Counter({"u8": 3})
    assert found.linears == Counter({"u8": 2})
    assert "3 of 3 convolutions run in integers in OpenVINO" in net.notes
    assert "2 of 2 linear layers run in integers in OpenVINO" in net.notes
    assert net.comparison.cosine > 0.999


def test_the_float_model_has_no_integer_kernel(whole: Artifact) -> None:
    assert not openvino_kernels(whole.path).convolutions
    assert whole.comparison.relative < 1e-4
    assert [path.suffix for path in whole.paths] == [".xml", ".bin"]


def test_the_same_program_gives_the_same_bytes(net: Artifact, tmp_path: Path) -> None:
    (again,) = emit(static_net(), tmp_path, ["openvino"])
    assert again.sha256 == net.sha256


def test_integers_take_a_byte_each(net: Artifact, whole: Artifact) -> None:
    integers, floats = (each.paths[1].stat().st_size for each in (net, whole))
    assert integers < 0.5 * floats


def test_half_halves_the_weights(whole: Artifact, tmp_path: Path) -> None:
    options = EmitOptions(openvino=OpenvinoOptions(half=True))
    (half,) = emit(small_net(), tmp_path, ["openvino"], options=options)
    assert half.paths[1].stat().st_size < 0.6 * whole.paths[1].stat().st_size
    assert 0 < half.comparison.relative < 0.05


def test_a_static_transformer_computes_in_integers_at_any_length(tmp_path: Path) -> None:
    program = static_encoder()
    (artifact,) = emit(program, tmp_path, ["openvino"])
    assert openvino_kernels(artifact.path).linears["u8"] == 7
    compiled = openvino.Core().compile_model(str(artifact.path), "CPU")
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(5))
    found = torch.from_numpy(compiled([x.numpy()])[0])
    wanted = program.module(x)
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999


def test_run_time_quantization_leaves_the_rounding_to_openvino(tmp_path: Path) -> None:
    (artifact,) = emit(dynamic_encoder(), tmp_path, ["openvino"])
    assert sum(openvino_kernels(artifact.path).linears.values()) == 7
    assert artifact.comparison.cosine > 0.999
    assert any("rounded at run time by OpenVINO itself" in note for note in artifact.notes)


def test_weights_of_four_bits_take_four_bits(tmp_path: Path) -> None:
    program = encoder()
    options = {"bits": 4, "group": 16, "embeddings": True}
    made = apply(WeightOnly, program, options).program
    (found,) = emit(made, tmp_path / "int4", ["openvino"])
    assert openvino_kernels(found.path).linears == Counter({"u4": 7})
    assert "7 of 7 linear layers run in integers in OpenVINO" in found.notes
    assert found.comparison.cosine > 0.999
    (eight,) = emit(
        apply(WeightOnly, program, {**options, "bits": 8}).program, tmp_path, ["openvino"]
    )
    numbers = sum(n.numel() for key, n in program.state().items() if n.dim() == 2)
    assert eight.paths[1].stat().st_size - found.paths[1].stat().st_size > 0.45 * numbers
