import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, seeded, sqnr, text_of


def calibrated(batches=None):
    return Context(data={"calibration": batches or image_batches()})


@cache
def folded(build, *shape, seed=0):
    program = captured(build, *shape, seed=seed)
    if any(op_name(node) == "batch_norm" for node in program.nodes):
        program = apply(FoldBatchNorm, program).program
    return program


def quantised(build, options=None, *, shape=(3, 16, 16), seed=0):
    program = folded(build, 2, *shape, seed=seed)
    context = calibrated(image_batches(4, 4, *shape, seed=seed))
    return apply(Static, program, {"calibration": 16, **(options or {})}, context)


def quantizers(result):
    ids = node_ids(result.program)
    return {
        ids[node]: module_of(node) for node in result.program.nodes if op_name(node) == "fake_quant"
    }


def sequence(*layers):
    return lambda: nn.Sequential(*layers)


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x):
        y = (self.a(x) + self.b(x).relu()).relu()
        return self.head(self.pool(y).flatten(1))


def test_the_graph_of_a_residual_add():
    result = quantised(Add)
    assert text_of(result.program) == [
        "x = input()",
        "x_fq = fake_quant(x)",
        "a.weight = param()",
        "a_weight_fq = fake_quant(a.weight)",
        "a = conv2d(x_fq, a_weight_fq)",
        "a_fq = fake_quant(a)",
        "b.weight = param()",
        "b_weight_fq = fake_quant(b.weight)",
        "b = conv2d(x_fq, b_weight_fq)",
        "/relu = relu(b)",
        "relu_fq = fake_quant(/relu)",
        "/add = add(a_fq, relu_fq)",
        "/relu@2 = relu(/add)",
        "relu_2_fq = fake_quant(/relu@2)",
        "pool = max_pool2d(relu_2_fq)",
        "relu_2_fq@2 = fake_quant(pool)",
        "/flatten = flatten(relu_2_fq@2)",
        "relu_2_fq@3 = fake_quant(/flatten)",
        "head.weight = param()",
        "head_weight_fq = fake_quant(head.weight)",
        "head = linear(relu_2_fq@3, head_weight_fq)",
        "output = output(head)",
    ]
    assert result.kinds()["add-node"] == 12
    assert [e.path for e in result.edits if e.kind == "set-module"] == ["a", "b", "head"]
    assert not [e for e in result.edits if e.kind in ("set-tensor", "remove-tensor")]


def test_weights_are_symmetric_per_channel_and_activations_affine():
    fakes = quantizers(quantised(Add))
    weight, act = fakes["a_weight_fq"], fakes["relu_fq"]
    assert (weight.qmin, weight.qmax, weight.axis, weight.shape) == (-127, 127, 0, (4,))
    assert not bool(weight.zero_point.any())
    assert (act.qmin, act.qmax, act.shape) == (0, 255, ())
    # A ReLU's range starts at 0: the runtime may then leave the ReLU out.
    assert int(act.zero_point) == 0
    assert 0 < int(fakes["a_fq"].zero_point) < 255


def test_parameters_keep_their_names_and_values():
    result = quantised(Add)
    before, after = result.before.state(), result.program.state()
    assert set(before) < set(after)
    assert all(after[name] is before[name] for name in before)
    added = set(after) - set(before)
    assert {name.rpartition(".")[2] for name in added} == {"scale", "zero_point"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("observer", "search"),
    [("minmax", "mse"), ("moving_average", "mse"), ("percentile", "mse"), ("histogram", "mse"),
     ("histogram", "entropy")],
)  # fmt: skip
def test_int8_stays_close_on_a_resnet(observer, search, seed):
    options = {"activations": {"observer": observer, "search": search, "percentile": 99.9}}
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


def test_quantising_twice_is_refused():
    result = quantised(Add)
    with pytest.raises(UsageError, match="there is no layer to quantise") as caught:
        apply(Static, result.program, {"calibration": 16}, calibrated())
    assert "a: it is quantised already" in caught.value.reason


def test_quantising_in_two_steps_uses_the_quantizers_that_are_there():
    program = captured(Add, 2, 3, 16, 16)
    once = apply(Static, program, {"targets": ["a", "b"], "calibration": 16}, calibrated())
    both = apply(Static, once.program, {"targets": ["head"], "calibration": 16}, calibrated())
    assert both.reasons()["a"] == "it is not selected"
    at_once = quantised(Add)
    assert [line for line in text_of(both.program) if "conv2d" in line or "linear" in line] == [
        line.replace("relu_2_fq@3", "relu_2_fq@3")
        for line in text_of(at_once.program)
        if "conv2d" in line or "linear" in line
    ]


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


def test_a_plan_has_the_graph_and_names_the_scales_as_pending():
    program = captured(Add, 2, 3, 16, 16)
    planned = apply(Static, program, {"calibration": 16}, Context(planning=True))
    assert "x_fq.scale: known after calibration (16 samples)" in planned.decision.pending
    assert text_of(planned.program) == text_of(quantised(Add).program)


def test_plans_on_meta_weights():
    with torch.device("meta"):
        model = Add().eval()
    program = capture(model, (torch.empty(2, 3, 16, 16, device="meta"),))
    planned = apply(Static, program, {}, Context(planning=True))
    assert planned.ops().count("fake_quant") == 9


def test_the_same_data_gives_the_same_decision():
    one, two = quantised(ResNet).decision, quantised(ResNet).decision
    assert one.model_dump() == two.model_dump()
    assert one.arrays.keys() == two.arrays.keys()
    assert all(torch.equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_calibration_streams_and_keeps_training_flags():
    program = captured(lambda: Add(), 2, 3, 16, 16)  # its own: the mode is changed
    program.module.train()
    seen = []

    class Lazy:
        def __iter__(self):
            for batch in image_batches():
                seen.append(len(seen))
                yield batch

    apply(Static, program, {"calibration": 6}, Context(data={"calibration": Lazy()}))
    assert seen == [0, 1]
    assert program.module.training
    assert all(module.training for module in program.module.modules())


@pytest.mark.parametrize(
    ("options", "data", "error", "message"),
    [
        ({"calibration": 17}, None, DataError, "holds 16 samples, and 17 are asked for"),
        ({"targets": ["conv*"]}, None, SelectorError, "matches nothing"),
        ({"targets": ["a"], "expect": 2}, None, SelectorError, "1 nodes are selected"),
        ({"keep": ["/mul"]}, None, SelectorError, "matches nothing"),
        ({"calibration": 4}, {}, DataError, "there is no split calibration"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, data, error, message):
    program = captured(Add, 2, 3, 16, 16)
    context = calibrated() if data is None else Context(data=data)
    with pytest.raises(error, match=message):
        apply(Static, program, options, context)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_named(bad):
    program = captured(Add, 2, 3, 16, 16)
    batches = image_batches()
    batches[2][0][0, 0, 0, 0] = bad
    with pytest.raises(NumericsError, match="in the output of x during calibration"):
        apply(Static, program, {"calibration": 16}, calibrated(batches))

    def build():
        model = Add()
        with torch.no_grad():
            model.head.weight[0, 0] = bad
        return model

    with pytest.raises(NumericsError, match=r"a NaN or an infinity in head\.weight"):
        quantised(build)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": {"bits": 1}},
        {"weights": {"per": "token"}},
        {"activations": {"bits": "8"}},
        {"activations": {"observer": "kl"}},
        {"activations": {"percentile": 101}},
        {"calibration": 0},
        {"weigths": {}},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Static.Options.model_validate_json(json.dumps(options))


def test_a_quantised_program_trains_through_its_quantizers():
    program = quantised(lambda: Add()).program  # its own: it is trained
    module = program.module.train()
    x, target = random_input(32, 3, 16, 16), random_input(32, 5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scales = {name: t.clone() for name, t in program.state().items() if name.endswith("scale")}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(bool(p.grad.any()) for p in module.parameters())
    assert all(torch.equal(program.state()[name], scale) for name, scale in scales.items())
