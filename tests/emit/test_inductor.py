"""Programs compiled by inductor, its int8 kernels counted; ahead of time and in the process."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.emit import compile_inductor, emit, inductor
from fxcompress.emit._inductor_dynamic import Rounded, write_integer_products
from fxcompress.emit._plain import plain_program
from fxcompress.errors import EmitError
from fxcompress.ir import capture
from passes.quantize.dynamic import Dynamic
from tests.emit.models import seeded
from tests.emit.quantized import encoder, small_net, static_net
from tests.passes.support import apply

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


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_of_integers_are_what_was_rounded(per: str, symmetric: bool) -> None:
    options = {"activations": {"per": per, "symmetric": symmetric}}
    plain = plain_program(apply(Dynamic, encoder(), options).program)
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(5))
    wanted = plain.module(x)
    assert write_integer_products(plain.module) == 7
    shared = sum(isinstance(module, Rounded) for module in plain.module.modules())
    assert shared == 5, "layers of one activation share its integers"
    assert torch.allclose(plain.module(x), wanted, atol=1e-5)


@compiler
@vnni
def test_linear_layers_rounded_at_run_time_are_int8_kernels() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    sizes = {"input": {0: "batch", 1: "seq"}}
    program = capture(seeded(layers), (torch.zeros(2, 5, 16),), dynamic=sizes)
    program = apply(Dynamic, program).program
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(5))
    compiled = compile_inductor(program, (x,))
    assert compiled.kernels == {"linears": 2}
    assert not compiled.notes
    assert torch.allclose(compiled(x), program.module(x), atol=1e-5)


def test_a_convolution_rounded_at_run_time_is_said_to_be_float() -> None:
    assert not compile_inductor(static_net()).notes
    (note,) = compile_inductor(apply(Dynamic, small_net()).program).notes
    assert "rounded at run time are computed in float" in note


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    with pytest.raises(EmitError, match=r"needs a C\+\+ compiler"):
        emit(small_net(), tmp_path, ["inductor"])
    assert list(tmp_path.iterdir()) == []
