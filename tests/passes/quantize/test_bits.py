"""Every width that can be asked for, from a spec: how many numbers weights and inputs then have."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit import EmitOptions, OnnxOptions, emit
from fxcompress.errors import EmitError, FxCompressError
from fxcompress.ir.ops import module_of, op_name

STATIC = {"use": "quantize.static", "calibration": 16}
WEIGHTS = {"use": "quantize.weight_only", "group": None}
BINARY = {"keep_first": False, "keep_last": False, "train": False}
# Step, the most numbers of a channel of a weight, and of an activation (None: any).
WIDTHS = {
    **{
        f"static {bits}": (
            {**STATIC, "weights": {"bits": bits}, "activations": {"bits": bits}},
            2**bits - 1,
            2**bits,
        )
        for bits in (2, 3, 4, 6, 8, 16)
    },
    **{
        f"weight_only {bits}": ({**WEIGHTS, "bits": bits}, 2**bits, None)
        for bits in (2, 3, 4, 6, 8)
    },
    "float8_e4m3": ({**STATIC, "dtype": "float8_e4m3"}, 253, 253),
    "float8_e5m2": ({**STATIC, "dtype": "float8_e5m2"}, 247, 247),
    "1": ({"use": "quantize.binary", **BINARY}, 2, 2),
    "1, weights": ({"use": "quantize.binary", "activations": "none", **BINARY}, 2, None),
    "1.58": ({"use": "quantize.ternary", **BINARY}, 3, None),
    "cast": ({"use": "tidy.cast", "dtype": "float8_e4m3"}, 253, None),
}


def program():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(40), nn.Linear(40, 3000), nn.Linear(3000, 2))
    return fxc.capture(model.eval(), (torch.randn(2, 40),), dynamic={"input": {0: "batch"}})


@pytest.mark.parametrize("name", WIDTHS)
def test_weights_and_inputs_have_no_more_numbers_than_their_bits(name):
    step, of_weight, of_input = WIDTHS[name]
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    made = fxc.compress(program(), [step], data={"calibration": [(x,)]}).program
    quantizers = [node for node in made.nodes if op_name(node) in QUANTIZERS]
    weights = [node for node in quantizers if node.all_input_nodes[0].op == "get_attr"]
    assert len(weights) == 2
    state = made.state()
    for node in weights:
        weight = module_of(node)(state[str(node.all_input_nodes[0].target)])
        assert max(len(row.unique()) for row in weight) <= of_weight
    activations = [node for node in quantizers if node not in weights]
    assert bool(activations) == (of_input is not None)
    for node in activations:
        assert len(module_of(node)(torch.randn(20_000)).unique()) <= of_input


QUANTIZERS = {"binarize", "fake_quant", "float_quant"}


@pytest.mark.parametrize("bits", [1, 1.58])
@pytest.mark.parametrize("use", ["quantize.static", "quantize.weight_only"])
def test_one_bit_and_three_levels_are_passes_of_their_own(use, bits):
    options = {"weights": {"bits": bits}} if use == "quantize.static" else {"bits": bits}
    with pytest.raises(FxCompressError, match=r"quantize\.binary.*quantize\.ternary"):
        fxc.compress(program(), [{"use": use, **options}])


@pytest.mark.slow
def test_16_bits_run_in_onnxruntime_and_not_in_tensorrt(tmp_path):
    pytest.importorskip("onnxruntime")
    step = {**STATIC, "weights": {"bits": 16}, "activations": {"bits": 16}}
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    made = fxc.compress(program(), [step], data={"calibration": [(x,)]}).program
    (artifact,) = emit(made, tmp_path, ["onnx"])
    assert artifact.comparison.relative < 1e-3
    assert sum("stored in 16 bits" in note for note in artifact.notes) == 2
    signed = {**STATIC, "weights": {"bits": 16}, "activations": {"signed": True, "symmetric": True}}
    made = fxc.compress(program(), [signed], data={"calibration": [(x,)]}).program
    options = EmitOptions(onnx=OnnxOptions(target="tensorrt"))
    with pytest.raises(EmitError, match="TensorRT cannot take weights of more than 8 bits"):
        emit(made, tmp_path / "tensorrt", ["onnx"], options=options)
