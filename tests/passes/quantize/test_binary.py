"""`quantize.binary`: signs and scales, the order with batch norms, training, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fxcompress.analysis import cost
from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.nn import Binarize
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.quantize.binary import Binary, BinaryOptions
from passes.quantize.static import Static
from passes.quantize.weight_only import WeightOnly
from passes.tidy.fold_batchnorm import FoldBatchNorm
from passes.train.fit import Fit
from tests.passes.models import ResNet, image_batches
from tests.passes.support import apply, captured, random_input, relative_error, text_of


class Chain(nn.Module):
    """conv → BatchNorm → ReLU, twice, with a pool; then a linear layer."""

    def __init__(self, leak=False):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        self.leak = leak

    def forward(self, x):
        x = self.bn1(self.first(x)).relu()
        pooled = F.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        x = self.bn3(self.conv3(pooled)).relu()
        if self.leak:
            x = x + pooled[:, :6]
        return self.fc(x.mean((2, 3)))


def fresh():
    """A program of its own, whose weights a test may change."""
    return captured(lambda: Chain(), 2, 3, 8, 8)


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def test_the_order_becomes_norm_sign_layer():
    result = check_pass(Binary, captured(Chain, 2, 3, 8, 8), idempotent=False)
    assert text_of(result.program) == [
        "x = input()",
        "first = conv2d(x)",
        "bn1 = batch_norm(first)",
        "bn1_sign = binarize(bn1)",
        "conv2.weight = param()",
        "conv2_weight_sign = binarize(conv2.weight)",
        "conv2 = conv2d(bn1_sign, conv2_weight_sign)",
        "bn2 = batch_norm(conv2)",
        "/max_pool2d = max_pool2d(bn2)",
        "max_pool2d_sign = binarize(/max_pool2d)",
        "conv3.weight = param()",
        "conv3_weight_sign = binarize(conv3.weight)",
        "conv3 = conv2d(max_pool2d_sign, conv3_weight_sign)",
        "bn3 = batch_norm(conv3)",
        "/relu = relu(bn3)",
        "/mean = mean(/relu)",
        "fc = linear(/mean)",
        "output = output(fc)",
    ]
    assert result.reasons() == {"first": "keep_first is set", "fc": "keep_last is set"}


@pytest.mark.parametrize("train", [True, False])
def test_it_computes_what_the_paper_says(train):
    result = apply(Binary, captured(Chain, 2, 3, 8, 8), {"train": train})
    before, x = result.before.module, random_input(4, 3, 8, 8)

    def binary(layer, x):
        alpha = layer.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(signs(x), alpha * signs(layer.weight), layer.bias, padding=1)

    def wanted(x):
        x = before.bn2(binary(before.conv2, before.bn1(before.first(x))))
        x = before.bn3(binary(before.conv3, F.max_pool2d(x, 2)))
        return before.fc(x.relu().mean((2, 3)))

    assert relative_error(wanted, result.program.module, x) <= 1e-5
    weight = result.program.state()["conv2.weight"]
    assert torch.equal(weight, before.conv2.weight) == train


def test_weights_alone_leave_the_order_alone():
    result = apply(Binary, captured(Chain, 2, 3, 8, 8), {"activations": "none"})
    assert result.ops().count("binarize") == 2
    assert result.ops().count("relu") == 3


@pytest.mark.parametrize("norms", ["insert", "require"])
def test_where_others_read_what_comes_after_the_relu(norms):
    result = apply(Binary, captured(lambda: Chain(leak=True), 2, 3, 8, 8), {"norms": norms})
    lines = text_of(result.program)
    assert "/max_pool2d = max_pool2d(/relu)" in lines
    if norms == "insert":
        assert "max_pool2d_norm = batch_norm(/max_pool2d)" in lines
        assert "max_pool2d_sign = binarize(max_pool2d_norm)" in lines
    else:
        reason = "/relu@2 cannot be left out before its signs: /getitem reads what comes after"
        assert result.reasons()["conv3"].startswith(reason)
        assert "conv2_weight_sign = binarize(conv2.weight)" in lines


def test_a_residual_add_gets_a_norm_that_its_layers_share():
    result = apply(Binary, captured(ResNet, 2, 3, 16, 16))
    lines = text_of(result.program)
    (sign,) = [each for each in result.decision.signs if "layer2.0.down.0" in each.layers]
    assert set(sign.layers) == {"layer2.0.conv1", "layer2.0.down.0"}
    assert f"{sign.norm} = batch_norm(layer1.1.relu)" in lines
    assert "layer1.1/add = add(layer1.1.bn2, layer1.0.relu)" in lines
    norms = [m for m in result.program.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    refused = apply(Binary, captured(ResNet, 2, 3, 16, 16), {"norms": "require"}).reasons()
    assert refused["layer2.0.conv1"] == "no batch norm makes its input: layer1.1/add does"


def test_norms_of_linear_layers_need_rows_of_features():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    result = apply(Binary, captured(Rows, 5, 4))
    assert "a_norm = batch_norm(a)" in text_of(result.program)
    with pytest.raises(UsageError) as error:
        apply(Binary, captured(Rows, 2, 5, 4))
    assert "its channels are the last of 3 dimensions" in str(error.value)


def test_it_trains_and_follows_its_weights():
    program = captured(Chain, 2, 3, 8, 8)
    images = random_input(64, 3, 8, 8)
    classes = (images.mean((1, 2, 3)) > 0).long() + 2 * (images[:, 0, 0, 0] > 0).long()
    data = {"train": [((images,), classes)]}
    binary = apply(Binary, program).program
    options = {"epochs": 30, "optimizer": {"use": "Adam", "lr": 0.02}}
    trained = apply(Fit, binary, options, Context(data=data))
    losses = [epoch.loss for epoch in trained.decision.history]
    assert losses[-1] < 0.5 * losses[0]
    weight = trained.program.state()["conv2.weight"]
    assert not torch.equal(weight, program.state()["conv2.weight"])
    read = trained.program.module.get_submodule("conv2_weight_sign")(weight)
    alpha = weight.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(read, alpha * signs(weight))


def test_weights_take_one_bit_each():
    result = apply(Binary, captured(Chain, 2, 3, 8, 8), {"activations": "none"})
    saved = cost(result.before).bytes - cost(result.program).bytes
    assert saved == (8 * 8 * 9 + 6 * 8 * 9) * 31 // 8
    fixed = apply(Binary, captured(Chain, 2, 3, 8, 8), {"activations": "none", "train": False})
    assert saved - (cost(fixed.before).bytes - cost(fixed.program).bytes) == 4 * (8 + 6)


def test_what_is_quantised_already_stays_so():
    program = apply(WeightOnly, captured(Chain, 2, 3, 8, 8), {"group": None}).program
    with pytest.raises(UsageError, match="no layer to quantise") as error:
        apply(Binary, program)
    assert "it is quantised already" in str(error.value)
    again = apply(Binary, captured(Chain, 2, 3, 8, 8), {"targets": ["conv2"]})
    both = apply(Binary, again.program)
    assert both.reasons()["conv2"] == "it is quantised already"
    folded = apply(FoldBatchNorm, captured(Chain, 2, 3, 8, 8)).program
    context = Context(data={"calibration": image_batches(2, 8, 3, 8, 8)})
    static = apply(Static, folded, {"calibration": 16, "targets": ["conv2"]}, context).program
    assert apply(Binary, static).reasons()["conv2"] == "it is quantised already"
    with pytest.raises(UsageError, match="no layer to quantise") as error:
        apply(Static, both.program, {"calibration": 16, "keep_last": True}, context)
    assert "conv3: it is quantised already" in str(error.value)


def test_channels_of_zeros_are_named_and_stay_zeros():
    program = fresh()
    with torch.no_grad():
        program.module.conv2.weight[3] = 0
    for train in (True, False):
        result = apply(Binary, program, {"train": train})
        assert any(
            "conv2.weight: 1 of 8 scales are 0" in line for line in result.decision.summary()
        )
        weight = result.program.state()["conv2.weight"]
        read = result.program.module.get_submodule("conv2_weight_sign")(weight)
        assert not read[3].any()
        assert read.isfinite().all()


def test_a_nan_is_refused():
    program = fresh()
    with torch.no_grad():
        program.module.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"conv2\.weight"):
        apply(Binary, program)


def test_quantizers_are_of_weights_and_activations_as_told():
    result = apply(Binary, captured(Chain, 2, 3, 8, 8), {"exclude": ["conv3"]})
    modules = dict(result.program.module.named_modules())
    assert {n for n, m in modules.items() if isinstance(m, Binarize)} == {
        "bn1_sign", "conv2_weight_sign",
    }  # fmt: skip
    assert modules["conv2_weight_sign"].tracking
    assert not modules["bn1_sign"].tracking
    assert "/relu" in node_ids(result.program).values()


class Windows(nn.Module):
    """Layers whose windows have different shapes, strides and paddings, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.b = nn.Conv2d(8, 6, 3, stride=(2, 1), padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 6, 3, stride=(2, 1), padding=1, groups=2, bias=False)
        self.bn2, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 5, bias=False)
        self.last = nn.Linear(5, 4)

    def forward(self, x):
        x = self.bn1(self.first(x)).relu()
        y = F.pad(self.a(x), (0, 1)) + self.b(x) + self.grouped(x)
        return self.last(self.fc(self.bn2(y.mean((2, 3)))))


def k_of(x, size, stride, padding):
    """Convolve the channels' mean with 1 / (w·h), as the paper writes it."""
    a = x.abs().sum(1, keepdim=True) / x.shape[1]
    k = torch.full((1, 1, *size), 1 / (size[0] * size[1]))
    return F.conv2d(a, k, stride=stride, padding=padding)


def test_a_result_is_scaled_by_the_windows_of_its_input():
    model = Windows().eval()
    program = captured(lambda: model, 2, 3, 8, 8)
    result = apply(Binary, program, {"input_scale": True})
    assert result.decision.unscaled == ("grouped (its windows are over some of the channels)",)

    def layer(module, x, **given):
        weight = module.weight
        alpha = weight.abs().flatten(1).mean(1)
        shape = (-1, *[1] * (weight.dim() - 1))
        return F.conv2d(signs(x), alpha.reshape(shape) * signs(weight), **given)

    x = random_input(2, 3, 8, 8)
    with torch.no_grad():
        h = model.bn1(model.first(x))
        geometry = {"stride": (2, 1), "padding": (1, 0)}
        a = layer(model.a, h, **geometry) * k_of(h, (3, 2), **geometry)
        geometry = {"stride": (2, 1), "padding": 1}
        b = layer(model.b, h, **geometry) * k_of(h, (3, 3), **geometry)
        c = layer(model.grouped, h, groups=2, **geometry)
        y = model.bn2((F.pad(a, (0, 1)) + b + c).mean((2, 3)))
        alpha = model.fc.weight.abs().mean(1, keepdim=True)
        z = F.linear(signs(y), alpha * signs(model.fc.weight)) * y.abs().mean(1, keepdim=True)
        expected = model.last(z)
    torch.testing.assert_close(result.program.module(x), expected)


def test_a_bias_is_not_scaled_and_signs_alone_are():
    decision = apply(Binary, captured(Chain, 2, 3, 8, 8), {"input_scale": True}).decision
    assert decision.unscaled == ("conv3 (its bias would be multiplied too)",)
    assert [sign.scaled for sign in decision.signs] == [("conv2",), ()]
    with pytest.raises(ValidationError, match="there are none"):
        BinaryOptions(input_scale=True, activations="none")
