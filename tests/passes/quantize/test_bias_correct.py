"""`quantize.bias_correct`: means of layers and outputs are those of the float model."""

from functools import partial

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes._observe import observe
from passes.quantize._bias_correct.decide import without_quantizers
from passes.quantize._bias_correct.difference import Difference
from passes.quantize.bias_correct import BiasCorrect, BiasCorrectOptions
from passes.quantize.dynamic import Dynamic
from passes.quantize.static import Static
from passes.quantize.weight_only import WeightOnly
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import folded
from tests.passes.quantize.scaled import Mobile
from tests.passes.support import apply, captured, random_input, relative_error, seeded, sqnr

COARSE = {"calibration": 32, "weights": {"bits": 4, "per": "tensor"}}


def images(original=None):
    return Context(data={"calibration": image_batches(16)}, original=original)


def mean_error(program, made, x):
    with torch.no_grad():
        return float((made(x) - program(x)).mean(0).abs().mean())


def coarse(build, seed=0):
    program = folded(build, 2, 3, 16, 16, seed=seed)
    return program, apply(Static, program, COARSE, images()).program


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("build", [ResNet, Mobile])
def test_the_mean_error_of_outputs_falls_to_a_fifth(build, seed):
    program, quantised = coarse(build, seed)
    made = apply(BiasCorrect, quantised, {"calibration": 64}, images()).program
    x = random_input(64, 3, 16, 16)
    assert mean_error(program, made, x) < mean_error(program, quantised, x) / 5
    assert sqnr(program, made, x) > sqnr(program, quantised, x) + 3


def layer_means(program):
    """Return the mean of each layer's output per channel, by its path."""
    seen = {}

    def see(node, y):
        rows = y.movedim(1, -1).flatten(0, -2)
        seen.setdefault(str(node.target), []).append(rows)

    layers = [node for node in program.nodes if op_name(node) in ("conv2d", "linear")]
    observe(program, image_batches(16), {node: partial(see, node) for node in layers})
    return {name: torch.cat(rows).mean(0) for name, rows in seen.items()}


def test_each_layer_has_the_mean_of_the_float_model():
    program, quantised = coarse(ResNet)
    made = apply(BiasCorrect, quantised, {"calibration": 64}, images())
    means = [layer_means(each) for each in (program, quantised, made.program)]
    for name, mean in means[0].items():
        scale = float(mean.abs().max())
        assert float((means[2][name] - mean).abs().max()) < 1e-4 * scale
        assert float((means[1][name] - mean).abs().max()) > 1e-4 * scale
    assert {each.layer for each in made.decision.layers} == set(means[0])


def test_apart_each_layer_is_corrected_by_its_own_rounding():
    _, quantised = coarse(ResNet)
    options = {"calibration": 64, "sequential": False}
    made = apply(BiasCorrect, quantised, options, images())
    node = next(each for each in quantised.nodes if str(each.target) == "stem.0")
    fake, weight = module_of(node.args[1]), quantised.state()["stem.0.weight"].detach()
    inputs = []
    module_of(node).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in image_batches(16):
        quantised(*batch)
    module_of(node)._forward_pre_hooks.clear()
    x = torch.cat(inputs).detach()
    rounding = nn.functional.conv2d(x, weight - fake(weight), padding=1).mean((0, 2, 3))
    shift = made.decision.arrays["stem.0.bias.shift"]
    assert torch.allclose(shift, rounding, rtol=1e-3, atol=1e-6)
    entry = next(each for each in made.decision.layers if each.layer == "stem.0")
    assert entry.shift == pytest.approx(float(rounding.abs().mean()), rel=1e-3)


def test_apart_helps_too():
    program, quantised = coarse(ResNet)
    made = apply(BiasCorrect, quantised, {"calibration": 64, "sequential": False}, images())
    x = random_input(64, 3, 16, 16)
    assert mean_error(program, made.program, x) < mean_error(program, quantised, x) / 5


def test_a_layer_without_a_bias_gets_one():
    _, quantised = coarse(Mobile)
    assert "blocks.0.2.bias" not in quantised.state()
    result = check_pass(
        BiasCorrect, quantised, {"calibration": 64}, data=images().data, idempotent=False
    )
    assert "blocks.0.2.bias" in result.program.state()
    new = {each.tensor for each in result.decision.shifted if each.new}
    assert new == {f"blocks.{i}.2.bias" for i in range(3)}
    assert "11 biases corrected, 3 of them new" in result.decision.summary()


def test_biases_stay_within_int32():
    # One weight is large and all others round to 0: most of the output's mean is lost.
    model = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 2)).eval()
    model[0].weight.data.fill_(1e-3)
    model[0].bias.data.zero_()
    x = torch.rand(32, 64) + 1
    program = capture(model, (x,))
    data = Context(data={"calibration": [(x,)]})
    quantised = apply(Static, program, {"calibration": 32}, data).program
    node = next(each for each in quantised.nodes if str(each.target) == "0")
    activation, weight = (module_of(each) for each in node.args)
    activation.scale.fill_(1e-12)
    made = apply(BiasCorrect, quantised, {"calibration": 32}, data)
    limit = float(activation.scale) * weight.scale * 2.0**30
    assert bool((made.program.state()["0.bias"].abs() <= limit * (1 + 1e-6)).all())
    assert made.decision.layers[0].limited == 2


def test_dynamic_quantization_is_corrected_too():
    program = capture(seeded(lambda: Transformer(width=16, depth=2)), token_batches(1)[0])
    data = Context(data={"calibration": token_batches(8)})
    quantised = apply(Dynamic, program, {"weights": {"bits": 3, "per": "tensor"}}).program
    made = apply(BiasCorrect, quantised, {"calibration": 32}, data).program
    ids = torch.cat([batch[0] for batch in token_batches(8)])
    errors = [
        torch.stack([each(part) - program(part) for part in ids.split(4)]).mean((0, 1)).abs().mean()
        for each in (quantised, made)
    ]
    assert errors[1] < errors[0] / 5


class Mean(nn.Module):
    """The mean of two layers over the places that are no padding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, attention_mask):
        made = self.second(torch.relu(self.first(x))) * attention_mask.unsqueeze(-1)
        return made.sum(1) / attention_mask.sum(1, keepdim=True)


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_is_left_out_of_the_means(sequential):
    # What lies in padding has another mean than real places.
    x, mask = random_input(32, 6, 8), torch.ones(32, 6)
    mask[:, 3:] = 0
    batch = {"x": x + 20 * (1 - mask).unsqueeze(-1), "attention_mask": mask}
    program = capture(seeded(Mean), kwargs=batch)
    weights = {"bits": 3, "group": None}
    quantised = apply(WeightOnly, program, weights).program
    options = {"calibration": 32, "reference": "original", "sequential": sequential}
    data = Context(data={"calibration": [batch]}, original=program)
    made = apply(BiasCorrect, quantised, options, data).program
    with torch.no_grad():
        wanted = program(**batch).mean(0)
        before, after = (
            float((each(**batch).mean(0) - wanted).abs().mean()) for each in (quantised, made)
        )
    assert after < before * (1e-4 if sequential else 0.5)


def test_a_few_clipped_places_do_not_shift_all_others():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(4, 100, 8, generator=generator)
    got = wanted + 0.1 * torch.randn(4, 100, 8, generator=generator) + 0.05
    difference = Difference("layer", -1)
    difference.update(wanted, got)
    mean, partly = difference.shift()
    assert not partly
    assert torch.allclose(mean, (wanted - got).mean((0, 1)).double(), atol=1e-6)
    got[:, 0] += 50
    difference = Difference("layer", -1)
    difference.update(wanted, got)
    shift, partly = difference.shift()
    assert partly
    assert torch.allclose(shift, (wanted - got)[:, 1:].mean((0, 1)).double(), atol=1e-6)


def test_rounded_weights_are_compared_with_the_original():
    program = captured(Mobile, 2, 3, 16, 16)
    quantised = apply(WeightOnly, program, {"bits": 2, "group": None}).program
    bypassed = apply(BiasCorrect, quantised, {"calibration": 64}, images())
    assert bypassed.edits == ()
    assert "set `reference: original`" in bypassed.reasons()["stem"]
    options = {"calibration": 64, "reference": "original"}
    made = apply(BiasCorrect, quantised, options, images(program))
    x = random_input(64, 3, 16, 16)
    assert mean_error(program, made.program, x) < mean_error(program, quantised, x) / 5


def test_layers_that_are_others_in_the_original_are_left():
    original = captured(ResNet, 2, 3, 16, 16)
    quantised = apply(Static, folded(ResNet, 2, 3, 16, 16), COARSE, images()).program
    options = {"calibration": 32, "reference": "original"}
    made = apply(BiasCorrect, quantised, options, images(original))
    assert made.reasons()["stem.0"] == "its weight or bias is another one in the original"
    assert [each.layer for each in made.decision.layers] == ["head"]


def test_the_float_model_is_the_one_before_quantization():
    program, quantised = coarse(ResNet)
    assert relative_error(program, without_quantizers(quantised), random_input(2, 3, 16, 16)) == 0


def test_a_plan_shows_the_new_biases():
    _, quantised = coarse(Mobile)
    made = apply(BiasCorrect, quantised, {}, Context(planning=True))
    assert "blocks.0.2.bias" in made.program.state()
    assert len(made.decision.pending) == 11
    assert all("known after calibration (128 samples)" in line for line in made.decision.pending)
    assert relative_error(quantised, made.program, random_input(2, 3, 16, 16)) == 0


class TestBadInput:
    def test_nothing_is_quantised(self):
        with pytest.raises(UsageError, match="no quantised layer") as error:
            apply(BiasCorrect, captured(Mobile, 2, 3, 16, 16), None, images())
        assert "stem: its weight is not quantised" in error.value.reason
        assert "after the pass that quantises" in error.value.hint

    def test_no_calibration_data(self):
        with pytest.raises(DataError, match="no split calibration"):
            apply(BiasCorrect, coarse(Mobile)[1])

    def test_there_is_no_original(self):
        options = {"reference": "original", "calibration": 16}
        with pytest.raises(UsageError, match="no original to compare with"):
            apply(BiasCorrect, coarse(Mobile)[1], options, images())

    def test_it_says_what_it_reads(self):
        assert BiasCorrect().reads(BiasCorrectOptions()) == {"calibration"}
