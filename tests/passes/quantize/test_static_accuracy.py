"""How close `quantize.static` stays to the float model."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.passes.models import ResNet
from tests.passes.quantize.quantised import quantised, quantizers
from tests.passes.support import random_input, sqnr


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "entropy"])
def test_int8_stays_close_on_a_resnet(observer, seed):
    options = {"activations": {"observer": observer, "percentile": 99.9}}
    result = quantised(ResNet, options, seed=seed)
    x = random_input(16, 3, 16, 16, seed=seed)
    assert sqnr(result.before, result.program, x) > (20 if observer != "percentile" else 15)


@pytest.mark.parametrize("seed", range(2))
def test_more_bits_are_closer(seed):
    x = random_input(16, 3, 16, 16, seed=seed)
    found = []
    for bits in (4, 6, 8, 12):
        options = {"weights": {"bits": bits}, "activations": {"bits": bits}}
        result = quantised(ResNet, options, seed=seed)
        found.append(sqnr(result.before, result.program, x))
    # Each bit is worth 6 dB.
    assert all(b - a > 8 for a, b in pairwise(found))


def test_per_channel_beats_per_tensor_where_channels_differ():
    def build():
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        with torch.no_grad():
            small_then_large = torch.logspace(-2, 0, 8)
            model[0].weight *= small_then_large[:, None, None, None]
            model[0].bias.zero_()
            model[2].weight /= small_then_large[:, None, None]
        return model

    x = random_input(16, 3, 16, 16)
    found = {}
    for per in ("channel", "tensor"):
        result = quantised(build, {"weights": {"per": per}, "activations": {"bits": 16}})
        found[per] = sqnr(result.before, result.program, x)
    assert found["channel"] > found["tensor"] + 6


def test_a_bias_always_fits_int32():
    def build():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            model[0].weight[1] *= 1e-12
            model[0].bias[1] = 5.0
        return model

    result = quantised(build)
    fakes = quantizers(result)
    product = fakes["input_fq"].scale * fakes["0_weight_fq"].scale
    bias = result.program.state()["0.bias"]
    assert (bias.abs() / product).max() <= 2.0**30 * 1.001
    assert sqnr(result.before, result.program, random_input(4, 3, 16, 16)) > 30


def test_dead_and_constant_channels():
    def build():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            model[0].weight[0].zero_()
            model[2].weight.zero_()
        return model

    result = quantised(build)
    assert quantizers(result)["0_weight_fq"].scale[0] > 0
    out = result.program(random_input(4, 3, 16, 16))
    assert torch.isfinite(out).all()
