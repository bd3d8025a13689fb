"""Where `quantize.static` puts quantizers, and which layers it leaves in float."""

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from passes.quantize.static import Static
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import Add, calibrated, quantised
from tests.passes.support import apply, captured, random_input, seeded, sqnr, text_of


def test_transformers_keep_norms_attention_and_residuals_in_float():
    program = capture(seeded(Transformer), token_batches(1)[0])
    result = apply(Static, program, {"calibration": 16}, calibrated(token_batches()))
    reads = {line.split(" = ")[0]: line for line in text_of(result.program)}
    layer = "layers.0"
    assert reads[f"{layer}.qkv"] == f"{layer}.qkv = linear({layer}.norm1_fq, {layer}.qkv_weight_fq)"
    assert reads[f"{layer}.down"].startswith(f"{layer}.down = linear({layer}.act_fq, ")
    assert reads[f"{layer}/add"] == f"{layer}/add = add(embed, {layer}.out)"
    assert reads[f"{layer}.norm2"] == f"{layer}.norm2 = layer_norm({layer}/add)"
    assert "fq" not in reads[f"{layer}/sdpa"]
    assert result.reasons()[f"{layer}/sdpa"].startswith("it multiplies two activations")
    ids = token_batches(1, seed=3)[0][0]
    assert sqnr(program, result.program, ids) > 25


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).relu(), self.b(x)], 1))


def test_concatenated_tensors_share_one_scale():
    result = quantised(Concat)
    lines = text_of(result.program)
    assert "/cat = cat(relu_fq, relu_fq@2)" in lines
    assert "relu_fq@3 = fake_quant(/cat)" in lines
    entry = next(a for a in result.decision.activations if a.path == "relu_fq")
    assert [call.node for call in entry.calls] == ["/relu", "b", "/cat"]
    x = random_input(8, 3, 16, 16)
    with torch.no_grad():
        whole = torch.cat([result.before.module.a(x).relu(), result.before.module.b(x)], 1)
    assert entry.low == pytest.approx(float(whole.min()), rel=0.4)
    assert entry.high == pytest.approx(float(whole.max()), rel=0.4)


class Gate(nn.Module):
    """Squeeze and excite: a product of a tensor and a function of its average."""

    def __init__(self):
        super().__init__()
        self.conv, self.squeeze, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        x = nn.functional.silu(self.conv(x))
        return self.last(x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))


def test_gates_are_integer_and_float_functions_between_kernels_are_quantised():
    lines = text_of(quantised(Gate).program)
    for line in (
        "/silu = silu(conv_fq)",
        "silu_fq = fake_quant(/silu)",
        "/mean = mean(silu_fq)",
        "squeeze = conv2d(mean_fq, squeeze_weight_fq)",
        "/sigmoid = sigmoid(squeeze_fq)",
        "/mul = mul(silu_fq, sigmoid_fq)",
        "last = conv2d(mul_fq, last_weight_fq)",
    ):
        assert line in lines


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        y = torch.cat([self.left(a), b], 1)
        y = y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.last(y)


def test_scales_pass_through_moves():
    result = quantised(Shuffle)
    (entry,) = [a for a in result.decision.activations if a.path == "first_fq"]
    moved = [call.node for call in entry.calls]
    assert moved == ["first", "/getitem", "/getitem@2", "left", "/cat", "/unflatten",
                     "/transpose", "/flatten"]  # fmt: skip
    x = random_input(4, 3, 16, 16)
    assert sqnr(result.before, result.program, x) > 30


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9), 0),
        (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 4, 4, 4), 0),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 1),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), None),
        (
            lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"),
            (4, 6, 6),
            0,
        ),
        (lambda: nn.Linear(6, 5, bias=False), (3, 6), 0),
    ],
)
def test_every_kind_of_layer(layer, shape, axis):
    result = quantised(lambda: nn.Sequential(layer()), shape=shape)
    assert result.decision.weights[0].axis == axis
    (x,) = image_batches(4, 4, *shape)[0]
    assert sqnr(result.before, result.program, x) > 30


def test_free_weights_are_quantised_where_they_are_read():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            y = nn.functional.linear(x, self.weight)
            return nn.functional.linear(x * 2, self.weight[:3]) + y[..., :3]

    result = quantised(Free, shape=(4, 6))
    lines = text_of(result.program)
    assert "/linear = linear(input_fq, weight_fq)".replace("input", "x") in lines
    assert result.reasons()["/linear@2"] == "its weight is computed in the graph"


def test_a_layer_called_twice_shares_its_weights_quantizer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    result = quantised(Twice)
    assert [w.layers for w in result.decision.weights] == [("conv", "conv@2")]
    assert result.ops().count("param") == 1
    some = captured(Twice, 2, 3, 16, 16)
    with pytest.raises(UsageError) as caught:
        apply(Static, some, {"targets": ["conv@2"], "calibration": 16}, calibrated())
    assert "called again where it stays in float" in caught.value.reason


def test_selection_first_and_last():
    ends = quantised(ResNet, {"keep_first": True, "keep_last": True})
    assert ends.reasons()["stem.0"] == "keep_first is set"
    assert ends.reasons()["head"] == "keep_last is set"
    assert len(ends.decision.weights) == len(quantised(ResNet).decision.weights) - 2
    only = quantised(ResNet, {"types": ["linear"], "expect": 1})
    assert [w.path for w in only.decision.weights] == ["head_weight_fq"]
    assert only.reasons()["stem.0"] == "it is not selected"
    assert only.ops().count("fake_quant") == 2


def test_adds_can_be_kept_in_float():
    result = quantised(Add, {"keep": ["/add"]})
    assert result.reasons()["/add"] == "it is excluded"
    assert "/add = add(a_fq, relu_fq)" in text_of(result.program)
    assert "/relu@2 = relu(/add)" in text_of(result.program)
    assert "pool_fq" not in " ".join(text_of(result.program))


def test_products_are_quantised_on_request():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x) @ self.k(x).transpose(1, 2)

    plain = quantised(Attention, shape=(5, 8))
    assert plain.reasons()["/matmul"] == "it multiplies two activations"
    assert "/matmul = matmul(q, /transpose)" in text_of(plain.program)
    asked = quantised(Attention, {"products": True}, shape=(5, 8))
    assert "/matmul = matmul(q_fq, transpose_fq)" in text_of(asked.program)


def test_an_unfolded_batch_norm_is_a_reason():
    program = captured(ResNet, 2, 3, 16, 16)
    result = apply(Static, program, {"calibration": 16}, calibrated())
    assert "run tidy.fold_batchnorm first" in result.reasons()["stem.0"]
    assert [w.path for w in result.decision.weights] == ["head_weight_fq"]
