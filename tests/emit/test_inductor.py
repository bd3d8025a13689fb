"""Programs compiled by inductor, its int8 kernels counted; ahead of time and in the process."""

import shutil
from pathlib import Path

import pytest
import torch

from fxcompress.emit import compile_inductor, emit, inductor
from fxcompress.errors import EmitError
from tests.emit.quantized import dynamic_encoder, small_net, static_net

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
vnni = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="int8 kernels need AVX2"
)


@compiler
@vnni
def test_freezing_survives_a_reset() -> None:
    program = static_net()
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    wanted = program.module(x)
    compiled = compile_inductor(program, (x,))
    assert compiled.kernels == {"convolutions": 3, "linears": 2}
    torch._dynamo.reset()
    found = compiled(x)
    assert compiled.kernels == {"convolutions": 6, "linears": 4}, "compiled again, frozen again"
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999


@pytest.mark.slow
@compiler
@vnni
def test_a_package_loads_in_a_fresh_process(tmp_path: Path) -> None:
    (artifact,) = emit(static_net(), tmp_path, ["inductor"])
    assert artifact.path.name == "model.inductor.pt2"
    assert "3 of 3 convolutions are int8 kernels of oneDNN" in artifact.notes
    assert "2 of 2 linear layers are int8 kernels of oneDNN" in artifact.notes
    assert artifact.comparison.cosine > 0.999


@pytest.mark.slow
@compiler
def test_a_float_program_has_no_int8_kernel() -> None:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    compiled = compile_inductor(small_net(), (x,))
    assert not compiled.kernels
    assert torch.allclose(compiled(x), small_net().module(x), atol=1e-4)


def test_what_is_rounded_at_run_time_is_said_to_be_float() -> None:
    assert not compile_inductor(static_net()).notes
    (note,) = compile_inductor(dynamic_encoder()).notes
    assert note.startswith("5 activations that are rounded at run time are computed in float")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    with pytest.raises(EmitError, match=r"needs a C\+\+ compiler"):
        emit(small_net(), tmp_path, ["inductor"])
    assert list(tmp_path.iterdir()) == []
