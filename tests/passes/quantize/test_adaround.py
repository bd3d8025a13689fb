"""quantize.adaround: units, learned integers, grids, and what has nothing to learn."""

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune.unstructured import Unstructured
from passes.quantize._adaround.rounding import SoftRounding
from passes.quantize.adaround import Adaround
from passes.quantize.mixed import Mixed
from passes.quantize.qat import Qat
from passes.quantize.static import Static
from passes.quantize.weight_only import WeightOnly
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import folded, sequence
from tests.passes.support import apply, captured, random_input, sqnr

QUICK = {"iterations": 150, "lr": 0.05, "calibration": 16, "batch": 8}


def images():
    return Context(data={"calibration": image_batches(2, 8)})


@pytest.fixture(scope="module")
def resnet():
    return folded(ResNet, 2, 3, 16, 16)


@pytest.fixture(scope="module")
def static(resnet):
    options = {"calibration": 16, "weights": {"bits": 3}, "activations": {"observer": "minmax"}}
    return apply(Static, resnet, options, images()).program


@pytest.fixture(scope="module")
def blocks(static):
    return apply(Adaround, static, QUICK, images())


def integers(program, path, tensor):
    return program.module.get_submodule(path).quantize(program.state()[tensor].detach())


def weights(result):
    return [each for unit in result.decision.units for each in unit.weights]


def units(result):
    return {unit.name: len(unit.weights) for unit in result.decision.units}


class TestLearning:
    def test_the_error_of_the_blocks_falls(self, blocks):
        for unit in blocks.decision.units:
            assert unit.after <= unit.before
        # Few steps on noise: what the units before a block did to its inputs is most of its error.
        fallen = [unit for unit in blocks.decision.units if unit.after < 0.8 * unit.before]
        assert len(fallen) >= 3

    def test_the_model_is_closer_to_the_float_one(self, resnet, static, blocks):
        x = image_batches(1, 32, seed=7)[0][0]
        assert sqnr(resnet, blocks.program, x) > sqnr(resnet, static, x) + 2

    def test_integers_are_next_to_the_nearest_and_the_grid_is_the_same(self, static, blocks):
        moved = 0
        for each in weights(blocks):
            old, new = (integers(p, each.path, each.tensor) for p in (static, blocks.program))
            fake = blocks.program.module.get_submodule(each.path)
            assert (old - new).abs().max() <= 1
            value = blocks.program.state()[each.tensor].detach()
            assert torch.equal(fake(value), value)
            assert torch.equal(fake.scale, static.module.get_submodule(each.path).scale)
            assert each.moved == int((old != new).sum())
            moved += each.moved
        assert moved > 100
        (line,) = blocks.decision.summary()
        assert line.startswith(f"{moved:,} integers of ")

    def test_the_same_seed_gives_the_same_integers(self, static, blocks):
        again = apply(Adaround, static, QUICK, images()).decision
        assert again.model_dump() == blocks.decision.model_dump()
        for name, value in blocks.decision.arrays.items():
            assert torch.equal(value, again.arrays[name])

    @pytest.mark.parametrize("options", [{"unit": "layer"}, {"weighted": True}])
    def test_layers_and_weighted_blocks_learn_too(self, resnet, static, options):
        result = apply(Adaround, static, {**QUICK, **options}, images())
        x = image_batches(1, 32, seed=7)[0][0]
        assert sqnr(resnet, result.program, x) > sqnr(resnet, static, x) + 1

    def test_weights_that_are_0_stay_0(self):
        program = captured(sequence(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), 2, 16)
        pruned = apply(Unstructured, program, {"ratio": 0.5, "mode": "keep"}).program
        # Inputs of few dimensions, because nearest is best where all are independent.
        mixed = random_input(32, 4) @ random_input(4, 16, seed=2)
        context = Context(data={"calibration": [(mixed,)]})
        options = {"calibration": 32, "weights": {"bits": 3}}
        quantised = apply(Static, pruned, options, context).program
        result = apply(Adaround, quantised, {**QUICK, "calibration": 32}, context)
        assert sum(each.moved for each in weights(result)) > 0
        for name in ("0.weight", "2.weight"):
            zero = pruned.state()[name] * _mask(pruned, name) == 0
            assert zero.float().mean() >= 0.4
            assert not (result.program.state()[name][zero] != 0).any()


def _mask(program, name):
    masks = [m for path, m in program.module.named_modules() if "mask" in path]
    return next(m.mask for m in masks if m.mask.shape == program.state()[name].shape)


class TestUnits:
    def test_residual_blocks_are_found(self, blocks):
        assert units(blocks) == {
            "stem.0": 1,
            "layer1.0.conv1 … layer1.0.conv2": 2,
            "layer1.1.conv1 … layer1.1.conv2": 2,
            "layer2.0.conv1 … layer2.0.down.0": 3,
            "layer2.1.conv1 … layer2.1.conv2": 2,
            "head": 1,
        }

    def test_blocks_by_path_leave_other_layers_alone(self, static):
        result = apply(Adaround, static, {**QUICK, "iterations": 2, "blocks": ["layer?"]}, images())
        assert units(result) == {"stem.0": 1, "layer1": 4, "layer2": 5, "head": 1}

    def test_halves_of_transformer_layers_are_found_past_a_mask(self):
        batches = token_batches(2, masked=True)
        model = Transformer(width=16, depth=2, heads=2).eval()
        program = capture(
            model,
            kwargs=batches[0],
            dynamic={"ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}},
        )
        context = Context(data={"calibration": batches}, original=program)
        quantised = apply(WeightOnly, program, {"bits": 3, "group": 8}).program
        result = apply(Adaround, quantised, {**QUICK, "calibration": 8, "batch": 4}, context)
        assert units(result) == {
            "layers.0.qkv … layers.0.out": 2,
            "layers.0.up … layers.0.down": 2,
            "layers.1.qkv … layers.1.out": 2,
            "layers.1.up … layers.1.down": 2,
            "head": 1,
        }
        changed = [unit for unit in result.decision.units if unit.after < 0.9 * unit.before]
        assert len(changed) >= 4

    def test_a_weight_of_two_units_keeps_its_integers(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

            def forward(self, x):
                return self.b(self.a(self.a(x).relu()))

        program = captured(Twice, 2, 8)
        context = Context(data={"calibration": [(torch.randn(16, 8),)]})
        quantised = apply(Static, program, {"calibration": 16}, context).program
        result = apply(Adaround, quantised, {**QUICK, "iterations": 5}, context)
        assert "more than one unit" in result.reasons()["a"]
        assert units(result) == {"b": 1}


class TestSoftRounding:
    @pytest.fixture
    def made(self, static):
        fake = static.module.get_submodule("layer1.0.conv1_weight_fq")
        value = static.state()["layer1.0.conv1.weight"].detach()
        return fake, value, SoftRounding(fake, value)

    def test_it_starts_at_the_float_weight(self, made):
        fake, value, soft = made
        inside = (fake.dequantize(soft.nearest) - value).abs() <= fake.scale.view(-1, 1, 1, 1) / 2
        difference = (soft.soft() - value).abs() / fake.scale.view(-1, 1, 1, 1)
        assert difference[inside].max() < 1e-3

    def test_its_integers_start_as_the_nearest(self, made):
        _, _, soft = made
        assert (soft.integers() != soft.nearest).float().mean() < 0.01

    def test_the_penalty_is_least_where_h_is_decided(self, made):
        _, _, soft = made
        undecided = float(soft.penalty(2.0).detach())
        with torch.no_grad():
            soft.v.copy_(soft.v.sign() * 20)
        assert float(soft.penalty(2.0).detach()) == pytest.approx(0, abs=1e-3)
        assert undecided > 10


class TestAfterOtherPasses:
    def test_after_mixed_precision(self, resnet):
        options = {"budget": {"size": "15%"}, "calibration": 16}
        quantised = apply(Mixed, resnet, options, images()).program
        result = apply(Adaround, quantised, QUICK, images())
        x = image_batches(1, 32, seed=7)[0][0]
        assert sqnr(resnet, result.program, x) > sqnr(resnet, quantised, x) + 1

    def test_after_weight_only_without_the_original(self, resnet):
        quantised = apply(WeightOnly, resnet, {"bits": 4, "group": None}).program
        with pytest.raises(UsageError, match="no weight that can be rounded") as error:
            apply(Adaround, quantised, QUICK, images())
        assert "are gone" in error.value.reason
        assert "quantize.static or quantize.mixed" in error.value.hint


class TestErrors:
    def test_nothing_is_quantised(self, resnet):
        with pytest.raises(UsageError, match="no weight is quantised yet") as error:
            apply(Adaround, resnet, QUICK, images())
        assert "run quantize.static" in error.value.hint

    def test_no_calibration_split(self, static):
        with pytest.raises(DataError, match="no split calibration"):
            apply(Adaround, static, QUICK)

    def test_quantizers_that_are_trained(self, resnet):
        trained = apply(Qat, resnet, {"calibration": 16}, images()).program
        with pytest.raises(UsageError, match="no weight that can") as error:
            apply(Adaround, trained, QUICK, images())
        assert "end quantisation-aware training first" in error.value.reason

    def test_blocks_that_are_not_there(self, static):
        with pytest.raises(SelectorError, match=r"`stage\?` in `blocks` matches nothing"):
            apply(Adaround, static, {**QUICK, "blocks": ["stage?"]}, images())

    def test_a_plan_needs_no_data(self, static):
        result = apply(Adaround, static, {}, Context(planning=True))
        assert result.decision.pending[0].startswith("stem.0.weight: rounding known after")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ('{"unit": "layer", "blocks": ["a"]}', "`blocks` needs `unit: block`"),
            ('{"beta": [2, 20]}', "`beta` falls"),
        ],
    )
    def test_options_that_contradict_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            Adaround.Options.model_validate_json(options)
