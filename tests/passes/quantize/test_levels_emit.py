"""What weights of one bit and of three levels are emitted as: packed files that reload equal."""

import pytest
import torch
from safetensors.torch import load_file

from fxcompress.emit import emit
from fxcompress.nn.packing import unpack
from passes.quantize.binary import Binary
from passes.quantize.ternary import Ternary
from tests.passes.quantize.test_binary import Chain
from tests.passes.support import apply, captured

WEIGHTS = {"conv2": 8 * 8 * 9, "conv3": 6 * 8 * 9}


def emitted(program, folder, formats):
    return {each.format: each for each in emit(program, folder, formats)}


def test_a_binary_network_in_every_format(tmp_path):
    """Its weights are still the latent ones; one channel is nothing but zeros."""
    program = captured(lambda: Chain(), 2, 3, 8, 8)
    with torch.no_grad():
        program.module.conv2.weight[1] = 0
    binary = apply(Binary, program).program
    made = emitted(binary, tmp_path, ("python", "pt2", "onnx"))
    for name in ("python", "pt2"):
        assert made[name].comparison.max_abs == 0.0, name
        assert "2 binary weights are stored in 1 bit each, packed in bytes" in made[name].notes
    # A sum of another order may put a value on the other side of 0, and its sign with it.
    assert made["onnx"].comparison.cosine > 0.9
    assert "2 binary weights are stored as 8-bit integers ±1" in made["onnx"].notes
    for each in made.values():
        assert "2 activations are signs, ±1 in float" in each.notes
        assert "binary layers are computed in float: no runtime has kernels for bits" in each.notes
    source = (tmp_path / "model.py").read_text()
    assert "class Signs(nn.Module)" in source
    stored = load_file(tmp_path / "weights.safetensors")
    for name, count in WEIGHTS.items():
        bits = stored[f"{name}_weight_sign.weight"]
        assert bits.numel() == count // 8
        weight = binary.state()[f"{name}.weight"]
        assert torch.equal(unpack(bits, 1, count), (weight >= 0).flatten().to(torch.uint8))


@pytest.mark.parametrize(("pass_", "bits"), [(Binary, 1), (Ternary, 2)], ids=["binary", "ternary"])
def test_fixed_weights_are_packed_in_a_program_too(pass_, bits, tmp_path):
    program = captured(Chain, 2, 3, 8, 8)
    fixed = apply(pass_, program, {"train": False}).program
    made = emitted(fixed, tmp_path, ("program", "python"))
    assert all(each.comparison.max_abs == 0.0 for each in made.values())
    stored = load_file(tmp_path / "weights.safetensors")
    sizes = [tensor.numel() for tensor in stored.values() if tensor.dtype == torch.uint8]
    assert sorted(sizes) == sorted(count * bits // 8 for count in WEIGHTS.values())
    # The same tensors, and the same graph as with the latent weights.
    latent = apply(pass_, program).program.save(tmp_path / "latent.fxp").stat().st_size
    saved = latent - made["program"].bytes
    assert saved > 0.8 * sum(WEIGHTS.values()) * (32 - bits) / 8


def test_ternary_weights_in_onnx_are_integers_multiplied_out(tmp_path):
    ternary = apply(Ternary, captured(Chain, 2, 3, 8, 8)).program
    made = emitted(ternary, tmp_path, ("onnx",))["onnx"]
    assert made.comparison.relative < 1e-5
    assert "0 of 2 convolutions run as integer kernels in onnxruntime" in made.notes
