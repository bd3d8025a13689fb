"""`tidy.cast`: layers that stay because of where their numbers lie, and 8-bit floats."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fxcompress.analysis import cost
from fxcompress.emit import emit
from fxcompress.errors import DataError, NumericsError
from fxcompress.ir import Program, capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.quantize.weight_only import WeightOnly
from passes.tidy.cast import Cast
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, captured, random_input, relative_error, seeded, sqnr


class Chain(nn.Module):
    def __init__(self, gain=1.0):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.gain = gain

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def fresh(a=1.0, b=1.0):
    """A chain of its own whose layers `a` and `b` are scaled."""

    def build():
        model = Chain()
        with torch.no_grad():
            model.a.weight.mul_(a), model.a.bias.mul_(a)
            model.b.weight.mul_(b), model.b.bias.zero_()
        return model

    return captured(build, 2, 8)


def transformer():
    return capture(seeded(Transformer), token_batches(1)[0],
                   dynamic={"ids": {0: "batch", 1: "seq"}})  # fmt: skip


@pytest.mark.parametrize(("margin", "stays"), [(1, False), (2, True), (100, True)])
def test_a_layer_near_the_end_of_float16_stays_by_its_margin(margin, stays):
    program = fresh(a=2e4)
    x = random_input(32, 8)
    with torch.no_grad():
        largest = float(program.module.a(x).abs().amax())
    assert 65504 / 2 < largest < 65504
    options = {"dtype": "float16", "calibration": 32, "margin": margin, "targets": ["a"]}
    result = apply(Cast, program, options, Context(data={"calibration": [(x,)]}))
    assert ("a" in result.reasons()) == stays
    if stays:
        wanted = f"its output reaches {largest:.4g}, and float16 ends at 65504, less than {margin}"
        assert result.reasons()["a"] == f"{wanted} times that"
        assert result.program.state()["a.weight"].dtype == torch.float32


def test_weights_and_outputs_that_vanish_in_float16_stay():
    result = apply(Cast, fresh(b=1e-5), {"dtype": "float16"})
    assert result.reasons().keys() == {"b"}
    assert result.reasons()["b"].startswith("100.0% of b.weight are below 6.1e-05, where float16")
    assert apply(Cast, fresh(b=1e-5), {"dtype": "float16", "underflow": 1.0}).reasons() == {}
    assert apply(Cast, fresh(b=1e-5), {"dtype": "bfloat16"}).reasons() == {}
    x = random_input(32, 8) * 1e-5
    program = fresh()
    with torch.no_grad():
        program.module.a.bias.zero_()
    quiet = apply(Cast, program, {"dtype": "float16", "calibration": 32},
                  Context(data={"calibration": [(x,)]}))  # fmt: skip
    assert "of its outputs are below 6.1e-05" in quiet.reasons()["a"]


def test_what_calibration_will_tell_is_said_to_be_pending():
    options = {"dtype": "float16", "calibration": 8}
    decision = Cast().decide(fresh(), Cast.Options.model_validate(options), Context(planning=True))
    assert decision.pending == ("which activations overflow float16: known after calibration",)
    with pytest.raises(DataError):
        apply(Cast, fresh(), options)


@pytest.mark.parametrize(("dtype", "least"), [("float8_e4m3", 28), ("float8_e5m2", 22)])
def test_weights_as_8_bit_floats(dtype, least):
    program = captured(ResNet, 2, 3, 16, 16)
    result = check_pass(Cast, program, {"dtype": dtype})
    assert result.reasons() == {}
    assert len(result.decision.weights) == 11
    x = random_input(8, 3, 16, 16)
    assert sqnr(program, result.program, x) > least
    state = result.program.state()
    for entry in result.decision.weights:
        module = result.program.module.get_submodule(entry.path)
        weight = state[entry.tensor]
        assert torch.equal(module(weight), weight)
        rows = weight.abs().flatten(1).amax(1)
        torch.testing.assert_close(rows, module.largest * module.scale)
    saved = cost(program).bytes - cost(result.program).bytes
    scales = sum(4 * entry.shape[0] for entry in result.decision.weights)
    assert saved == 3 * sum(state[e.tensor].numel() for e in result.decision.weights) - scales


def test_a_transformer_and_its_embedding_in_8_bits():
    program = transformer()
    result = apply(Cast, program, {"dtype": "float8_e4m3", "exclude": ["head"]})
    assert "embed" in {layer for each in result.decision.weights for layer in each.layers}
    assert result.program.state()["head.weight"].equal(program.state()["head.weight"])
    ids = token_batches(1, batch=3, seq=9, seed=4)[0][0]
    assert relative_error(program, result.program, ids) < 0.1


def test_an_outlier_that_drowns_its_channel_keeps_the_layer_in_float32():
    program = fresh()
    with torch.no_grad():
        program.module.b.weight[:, 0] = 1e5
    result = apply(Cast, program, {"dtype": "float8_e4m3"})
    assert result.reasons().keys() == {"b"}
    assert "of b.weight / scale are below 0.016" in result.reasons()["b"]
    # Five decades are not enough; nine are.
    assert apply(Cast, program, {"dtype": "float8_e5m2"}).reasons() == {}


def test_zeros_nan_and_what_is_quantised_already():
    program = fresh()
    with torch.no_grad():
        program.module.b.weight.zero_()
    zeros = apply(Cast, program, {"dtype": "float8_e4m3"}).program
    assert not zeros.state()["b.weight"].any()
    assert zeros(random_input(2, 8)).isfinite().all()
    with torch.no_grad():
        program.module.b.weight[1, 1] = float("nan")
    for dtype in ("float8_e4m3", "float16", "bfloat16"):
        with pytest.raises(NumericsError, match=r"b\.weight"):
            apply(Cast, program, {"dtype": dtype})
    int4 = apply(WeightOnly, fresh(), {"group": None, "targets": ["b"]}).program
    for dtype in ("float8_e4m3", "float16"):
        assert apply(Cast, int4, {"dtype": dtype}).reasons()["b"].startswith("it is quantised")
    twice = apply(Cast, apply(Cast, fresh(), {"dtype": "float8_e5m2"}).program,
                  {"dtype": "float8_e5m2"})  # fmt: skip
    assert set(twice.reasons().values()) == {"it is quantised already"}
    assert not twice.edits


def test_a_shared_weight_is_stored_once_or_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    program = capture(seeded(Tied), token_batches(1)[0])
    (entry,) = apply(Cast, program, {"dtype": "float8_e4m3"}).decision.weights
    assert set(entry.layers) == {"embed", "head"}
    one = apply(Cast, program, {"dtype": "float8_e4m3", "targets": ["head"]})
    assert "also read by embed in float" in one.reasons()["head"]


def test_files_hold_a_byte_a_weight_and_reload_equal(tmp_path):
    result = apply(Cast, fresh(), {"dtype": "float8_e4m3"})
    made = {e.format: e for e in emit(result.program, tmp_path, ("program", "python", "pt2"))}
    assert all(each.comparison.max_abs == 0.0 for each in made.values())
    note = "3 weights are stored as 8-bit floats and computed with in float"
    assert note in made["python"].notes
    assert note in made["pt2"].notes
    back = Program.load(tmp_path / "model.fxp")
    assert back.fingerprint() == result.program.fingerprint()
    stored = load_file(tmp_path / "weights.safetensors")
    for entry in result.decision.weights:
        assert stored[f"{entry.path}.weight"].dtype == torch.float8_e4m3fn
        assert entry.tensor not in stored


def test_onnxruntime_reads_8_bit_floats(tmp_path):
    result = apply(Cast, fresh(), {"dtype": "float8_e5m2"})
    (made,) = emit(result.program, tmp_path, ("onnx",))
    assert made.comparison.relative < 1e-5
