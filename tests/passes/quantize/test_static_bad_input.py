"""What data and models may do to `quantize.static`: a clear error, or a named, counted note."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import DataError, NumericsError, UsageError
from passes.quantize.static import Static
from tests.passes.models import ResNet, image_batches
from tests.passes.quantize.quantised import Add, calibrated, folded, quantised, quantizers
from tests.passes.support import apply, captured, random_input, sqnr, text_of

STATIC = {"use": "quantize.static", "id": "int8", "calibration": 16}


def run(program, batches, **options):
    return fxc.compress(program, [STATIC | options], data={"calibration": batches})


@pytest.mark.parametrize(("bad", "what"), [(float("nan"), "a NaN"), (-float("inf"), "an infinity")])
def test_a_run_names_the_node_where_bad_numbers_come_up(bad, what):
    batches = image_batches()
    batches[1][0][2, 1, 3, 3] = bad
    with pytest.raises(NumericsError, match=f"{what} in the output of x during calib") as caught:
        run(captured(Add, 2, 3, 16, 16), batches)
    assert "batch 2 of the calibration data" in caught.value.reason


class Log(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(torch.log(self.a(x)))


def test_bad_numbers_that_the_model_makes_are_named_where_they_come_up():
    with pytest.raises(NumericsError, match="a NaN in the output of /log during calibration"):
        apply(Static, captured(Log, 2, 3, 16, 16), {"calibration": 16}, calibrated())


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_activation_is_a_note(value):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.value = value

        def forward(self, x):
            return self.b(self.a(x).clamp(self.value, self.value))

    result = quantised(Constant)
    assert result.decision.notes == (
        f"1 × activations are one number on all calibration data: clamp_fq ({value:.4g})",
    )
    assert result.decision.notes[0] in result.decision.summary()
    x = random_input(4, 3, 16, 16)
    assert sqnr(result.before, result.program, x) > 40


def test_constant_channels_of_the_data_are_no_trouble():
    batches = image_batches()
    for (images,) in batches:
        images[:, 1] = 0.0
        images[:, 2] = 7.0
    program = folded(ResNet, 2, 3, 16, 16)
    result = apply(Static, program, {"calibration": 16}, calibrated(batches))
    assert result.decision.notes == ()
    (x,) = batches[0]
    assert sqnr(result.before, result.program, x) > 30


def test_weights_and_channels_of_zeros_are_notes():
    def build():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))
        with torch.no_grad():
            model[0].weight[1:3].zero_()
            model[2].weight.zero_()
        return model

    result = quantised(build)
    assert result.decision.notes[:2] == (
        "1 × weights of nothing but zeros get scale 1: 2.weight",
        "1 × output channels of nothing but zeros get scale 1: 0.weight (2 of 4)",
    )
    assert torch.equal(result.decision.arrays["2_weight_fq"] > 0, torch.tensor([True, True]))
    x = random_input(4, 3, 16, 16)
    assert sqnr(result.before, result.program, x) > 30


def test_groups_of_a_transposed_convolution_share_one_scale_and_a_note_says_so():
    result = quantised(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), shape=(4, 5, 5)
    )
    (entry,) = result.decision.weights
    assert (entry.axis, entry.shape) == (None, ())
    (note,) = result.decision.notes
    assert note.startswith("1 × one scale per tensor: groups of a transposed convolution")
    asked = quantised(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)),
        {"weights": {"per": "tensor"}},
        shape=(4, 5, 5),
    )
    assert asked.decision.notes == ()


def test_what_is_quantised_already_is_refused():
    once = run(captured(Add, 2, 3, 16, 16), image_batches()).program
    for use in ("quantize.static", "quantize.qat"):
        with pytest.raises(UsageError) as caught:
            fxc.compress(once, [STATIC | {"use": use}], data={"calibration": image_batches()})
        assert "there is no layer to quantise: the model is quantised already" in str(caught.value)
        assert "a: it is quantised already" in caught.value.reason


def test_int16_is_close():
    options = {"weights": {"bits": 16}, "activations": {"bits": 16}}
    result = quantised(Add, options)
    fakes = quantizers(result)
    assert (fakes["relu_fq"].qmax, fakes["a_weight_fq"].qmax) == (65535, 32767)
    assert sqnr(result.before, result.program, random_input(4, 3, 16, 16)) > 80
    with pytest.raises(ValueError, match="onnxruntime's integer kernels take weights of 8 bits"):
        quantised(Add, options | {"target": "onnxruntime"})


def test_a_calibration_split_that_is_too_small_is_an_error():
    with pytest.raises(DataError, match="holds 8 samples, and 16 are asked for"):
        run(captured(Add, 2, 3, 16, 16), image_batches(count=2))


def test_a_run_s_record_tells_what_stays_in_float():
    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            y = self.b(nn.functional.gelu(self.a(x)))
            return (y @ y.transpose(1, 2)).softmax(-1)

    batches = [(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(i)),) for i in (0, 1)]
    result = run(captured(Gelu, 2, 5, 6), batches, calibration=8)
    line = "in float, 23.8% of MACs: matmul × 1 (23.8% of MACs), gelu × 1, softmax × 1"
    assert 5 * 5 * 6 / (5 * 5 * 6 + 2 * 5 * 6 * 8) == pytest.approx(0.238, abs=1e-3)
    assert line in result.plan.steps[0].summary
    assert line in result.report.passes[-1].notes
    assert "/gelu = gelu(a)" in text_of(result.program)
