"""`quantize.equalize`: exact unless asked otherwise, and one scale for a weight fits."""

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.quantize._scaling.groups import find_groups
from passes.quantize.equalize import Equalize, EqualizeOptions
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import ResNet, image_batches
from tests.passes.quantize.scaled import Mixed, Mobile, scaled_at_random
from tests.passes.support import apply, captured, random_input, relative_error, seeded, sqnr


def images():
    return Context(data={"calibration": image_batches(8)})


def spread(build, seed=0):
    """Return a Program whose channels differ by factors up to a thousand, as it was in function."""
    made, _ = scaled_at_random(captured(build, 2, 3, 16, 16, seed=seed), seed + 9)
    return made


def six():
    return Mobile(nn.ReLU6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("build", [Mobile, Mixed, ResNet])
def test_it_is_exact_and_changes_nothing_the_second_time(build, seed):
    program = spread(build, seed)
    result = check_pass(Equalize, program)
    assert result.decision.groups
    assert result.decision.rounds < 200
    assert relative_error(program, result.program, random_input(5, 3, 16, 16)) < 1e-5


@pytest.mark.parametrize("build", [Mobile, Mixed])
def test_ranges_of_a_pair_are_equal_afterwards(build):
    program = apply(Equalize, spread(build)).program
    state = program.state()
    for group in find_groups(program).all:
        if not group.open or group.layer is None:
            continue
        first = group.layer.output_range(state[group.layer.weight])
        second = torch.zeros_like(first)
        for reader in group.readers:
            largest = reader.layer.input_range(state[reader.layer.weight])
            second = torch.maximum(second, reader.largest(largest, len(first)))
        assert torch.allclose(first[group.free], second[group.free], rtol=1e-3)


def test_the_factors_of_one_pair_are_those_of_the_paper():
    program = captured(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), 2, 6)
    made = apply(Equalize, program)
    first, second = (program.state()[f"{name}.weight"].detach() for name in (0, 2))
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    wanted = (r1 * r2).sqrt() / r2
    assert torch.allclose(made.decision.arrays["0.bias.divisor"], wanted, rtol=1e-5)
    (group,) = made.decision.groups
    before = float((r1 / r1.max() * r2 / r2.max()).mean())
    assert group.before == pytest.approx(before, rel=1e-5)
    assert group.after > before


@pytest.mark.parametrize("seed", range(2))
def test_int8_with_one_scale_per_weight_wins_many_decibels(seed):
    program = spread(Mobile, seed)
    equal = apply(Equalize, program).program
    options = {"calibration": 32, "weights": {"per": "tensor"}}
    x = random_input(16, 3, 16, 16)
    before, after = (
        sqnr(program, apply(Static, each, options, images()).program, x)
        for each in (program, equal)
    )
    assert after > before + 15


def test_a_batch_norm_takes_the_division_as_its_folded_layer_would():
    program = captured(ResNet, 2, 3, 16, 16)
    early = apply(FoldBatchNorm, apply(Equalize, program).program).program
    late = apply(Equalize, apply(FoldBatchNorm, program).program).program
    for name in ("layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer1.0.conv1.bias"):
        assert torch.allclose(early.state()[name], late.state()[name], rtol=1e-3, atol=1e-6)


class TestReLU6:
    def test_it_is_left_alone_with_a_hint(self):
        with_six = captured(six, 2, 3, 16, 16)
        made = apply(Equalize, with_six)
        assert set(made.ops()) & {"relu6"}
        assert "set `relu6: replace`" in made.reasons()["stem"]
        assert [each.source for each in made.decision.groups] == ["blocks.0.2"]

    def test_it_becomes_a_relu_between_pairs_where_asked(self):
        program = captured(six, 2, 3, 16, 16)
        result = check_pass(Equalize, program, {"relu6": "replace"})
        assert "relu6" not in result.graph
        assert len(result.decision.replaced) == 7
        small = image_batches(1, 8, 3, 16, 16)[0][0] / 100
        # Nothing reaches 6 here, so the replacement shows in large inputs only.
        assert relative_error(program, result.program, small) < 1e-5
        assert relative_error(program, result.program, small * 1e4) > 1e-3
        assert "7 ReLU6 become ReLU (approximate)" in result.decision.summary()

    def test_what_it_preserves_depends_on_it(self):
        promises = Equalize().promises
        assert promises(EqualizeOptions()) == "exact"
        assert promises(EqualizeOptions(relu6="replace")) == "approximate"
        assert promises(EqualizeOptions(absorb_bias=True)) == "approximate"


class Lifted(nn.Module):
    """Layers whose ReLU nearly always sees large positive values."""

    def __init__(self, norm=False, pad=0):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=pad, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def lifted(norm=False, pad=0):
    model = seeded(lambda: Lifted(norm, pad))
    model.a.bias.data += 0 if norm else torch.linspace(-2, 12, 8)
    if norm:
        model.norm.bias.data = torch.linspace(-2, 12, 8)
        model.norm.running_mean.zero_()
        model.norm.running_var.copy_(model.a.weight.detach().square().sum((1, 2, 3)))
    return capture(model, (torch.randn(2, 3, 8, 8),))


def inputs(count=16):
    return Context(data={"calibration": image_batches(count, 4, 3, 8, 8)})


class TestAbsorption:
    def test_biases_move_to_the_next_layer(self):
        program = lifted()
        options = {"absorb_bias": True, "calibration": 64}
        made = apply(Equalize, program, options, inputs())
        plain = apply(Equalize, program).program
        x = random_input(16, 3, 8, 8)
        first = made.decision.groups[0]
        assert first.absorbed >= 4
        assert float(made.program.state()["a.bias"].detach().max()) < 0.5 * float(
            plain.state()["a.bias"].detach().max()
        )
        assert "b.bias" in made.program.state()
        assert relative_error(program, made.program, x) < 0.02
        shifts = {each.tensor: each.new for each in made.decision.shifted}
        assert shifts["b.bias"] is True
        assert shifts["a.bias"] is False

    def test_a_batch_norm_tells_its_statistics_without_data(self):
        program = lifted(norm=True)
        made = apply(Equalize, program, {"absorb_bias": True, "calibration": 0})
        norm = made.program.state()
        mean, deviation = norm["norm.bias"], norm["norm.weight"].abs()
        assert made.decision.groups[0].absorbed >= 4
        assert bool((mean <= 3 * deviation + 1e-5).all())
        assert relative_error(program, made.program, random_input(16, 3, 8, 8)) < 0.05

    def test_zeros_that_are_padded_would_not_get_the_constant(self):
        options = {"absorb_bias": True, "calibration": 64}
        made = apply(Equalize, lifted(pad=1), options, inputs())
        reason = made.reasons()["a"]
        assert reason == "its bias is not absorbed: the zeros that b pads would not get it"
        assert made.decision.groups[0].absorbed == 0

    def test_data_is_needed_and_named(self):
        with pytest.raises(DataError, match="no split calibration"):
            apply(Equalize, lifted(), {"absorb_bias": True})
        assert Equalize().reads(EqualizeOptions(absorb_bias=True)) == {"calibration"}
        assert Equalize().reads(EqualizeOptions()) == frozenset()

    def test_a_plan_says_what_data_will_tell(self):
        planning = Context(planning=True)
        made = apply(Equalize, lifted(), {"absorb_bias": True}, planning)
        assert made.decision.pending
        assert made.decision.arrays == {}


class TestBadInput:
    def test_a_model_without_pairs(self):
        program = captured(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), 2, 4)
        with pytest.raises(UsageError, match="no layers to equalise") as error:
            apply(Equalize, program)
        assert "0: 1 reads it and does not pass factors on" in error.value.reason
        assert "2: output reads it and is the model's output" in error.value.reason

    def test_quantised_layers_are_too_late(self):
        program = apply(Static, captured(Mobile, 2, 3, 16, 16), {"calibration": 16}, images())
        with pytest.raises(UsageError) as error:
            apply(Equalize, program.program)
        assert "it is quantised already" in error.value.reason
        assert "before the pass that quantises" in error.value.hint

    def test_a_nan_in_a_weight_is_named(self):
        model = seeded(Mobile)
        model.stem.weight.data[0, 0, 0, 0] = float("nan")
        program = capture(model, (torch.randn(2, 3, 16, 16),))
        with pytest.raises(NumericsError, match=r"NaN or an infinity in stem\.weight"):
            apply(Equalize, program)

    def test_a_pair_needs_both_of_its_layers(self):
        made = apply(Equalize, captured(Mobile, 2, 3, 16, 16), {"exclude": ["blocks.0.1"]})
        sources = {each.source for each in made.decision.groups}
        assert not sources & {"blocks.0.0", "blocks.0.1"}
        assert made.reasons()["blocks.0.1"] == "it is not selected"
        assert "a layer that reads it, is not selected" in made.reasons()["blocks.0.0"]

    def test_dead_channels_keep_their_weights(self):
        model = seeded(Mobile)
        model.stem.weight.data[2] = 0
        model.blocks[0][0].weight.data[:, 5] = 0
        program = capture(model, (torch.randn(2, 3, 16, 16),))
        made = apply(Equalize, program)
        divisor = made.decision.arrays["stem.weight.divisor"]
        assert divisor[[2, 5]].tolist() == [1, 1]
        assert relative_error(program, made.program, random_input(5, 3, 16, 16)) < 1e-5


def test_modules_stay_what_they_were():
    before = captured(Mobile, 2, 3, 16, 16)
    after = apply(Equalize, before).program
    kinds = [
        [type(module_of(node)) for node in each.nodes if op_name(node).startswith("conv")]
        for each in (before, after)
    ]
    assert kinds[0] == kinds[1]
