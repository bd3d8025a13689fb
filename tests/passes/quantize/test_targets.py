"""Placement per target runtime: the graph of each, the integers each takes, what stays in float."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit import emit, integer_kernels
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from passes.quantize._rules import AVERAGES, CONVOLUTIONS, LAYERS
from passes.quantize._targets import TARGETS, PlacementRules, Target
from passes.quantize.qat import Qat
from passes.quantize.static import Static
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.quantize.quantised import Add, calibrated, quantised, quantizers
from tests.passes.support import apply, captured, random_input, seeded, sqnr, text_of

PAGE = Path(__file__).parents[3] / "docs" / "passes" / "quantize.static.md"


def lines_of(build, target, options=None, **more):
    return text_of(quantised(build, {"target": target, **(options or {})}, **more).program)


def row(rules: PlacementRules) -> str:
    """Return a target's row of the page."""
    missing = sorted(LAYERS - rules.layers)
    results = [name for name, ops in (("convolutions", CONVOLUTIONS), ("linear layers", {"linear"}),
               ("adds", {"add"}), ("products", {"mul"}), ("concatenations", {"cat"}),
               ("averages", AVERAGES - {"mean"})) if ops <= rules.results]  # fmt: skip
    add = "no kernel" if "add" not in rules.combines else "its own kernel"
    if rules.fused_adds:
        add = "part of a convolution" + (", or its own kernel" if "add" in rules.results else "")
    first, last = min(rules.weight_bits), max(rules.weight_bits)
    widths = f"{first}" if first == last else f"{first} to {last}"
    signed = {None: "signed or unsigned", True: "signed", False: "unsigned"}[rules.signed]
    kind = {None: "affine or symmetric", True: "symmetric", False: "affine"}[rules.symmetric]
    cells = [
        f"`{rules.name}`",
        ", ".join(results) or "none",
        add,
        ", ".join(f"`{each}`" for each in missing) or "–",
        f"{widths} bits, per {' or '.join(rules.weight_per)}",
        f"{signed}, {kind}",
        "yes" if rules.products else "no",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_has_a_row_per_target_and_so_has_the_page():
    assert tuple(TARGETS) == get_args(Target)
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [row(rules) for rules in TARGETS.values() if row(rules) not in page] == []


@pytest.mark.parametrize("target", get_args(Target))
def test_every_target_stays_close_on_a_resnet(target):
    result = quantised(ResNet, {"target": target})
    assert result.decision.target == target
    assert sqnr(result.before, result.program, random_input(16, 3, 16, 16)) > 35
    rules = TARGETS[target]
    for fake in quantizers(result).values():
        if fake.axis is None:
            assert (fake.signed, fake.symmetric) == (bool(rules.signed), bool(rules.symmetric))


def test_onnxruntime_takes_the_generic_form():
    assert lines_of(ResNet, "onnxruntime") == lines_of(ResNet, "generic")


def test_executorch_quantises_what_every_layer_gives():
    def build():
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
        )

    result = quantised(build, {"target": "executorch"}, shape=(6,))
    assert [line for line in text_of(result.program) if "param" not in line] == [
        "input = input()",
        "input_fq = fake_quant(input)",
        "0_weight_fq = fake_quant(0.weight)",
        "0 = linear(input_fq, 0_weight_fq)",
        "1 = relu(0)",
        "1_fq = fake_quant(1)",
        "2_weight_fq = fake_quant(2.weight)",
        "2 = linear(1_fq, 2_weight_fq)",
        "2_fq = fake_quant(2)",
        "3 = gelu(2_fq)",
        "3_fq = fake_quant(3)",
        "4_weight_fq = fake_quant(4.weight)",
        "4 = linear(3_fq, 4_weight_fq)",
        "4_fq = fake_quant(4)",
        "output = output(4_fq)",
    ]


def test_executorch_keeps_the_residual_stream_of_a_transformer_in_float():
    program = capture(seeded(Transformer), token_batches(1)[0])
    options = {"target": "executorch", "calibration": 16}
    result = apply(Static, program, options, calibrated(token_batches()))
    lines = text_of(result.program)
    assert "layers.0/add = add(embed, layers.0.out_fq)" in lines
    assert "layers.0.norm2 = layer_norm(layers.0/add)" in lines
    ids = token_batches(1, seed=3)[0][0]
    assert sqnr(program, result.program, ids) > 25


class Fused(nn.Module):
    """A residual block, and an add of two activations that no convolution gives."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        y = self.a(x).relu()
        z = (y + self.b(y)).relu()
        return self.last(z + y)


def test_an_add_is_a_part_of_the_convolution_before_it():
    assert [
        line for line in lines_of(Fused, "tensorrt-qdq", shape=(4, 6, 6)) if "w" not in line
    ] == [
        "x = input()",
        "x_fq = fake_quant(x)",
        "/relu = relu(a)",
        "relu_fq = fake_quant(/relu)",
        "/add = add(relu_fq, b)",
        "/relu@2 = relu(/add)",
        "/add@2 = add(/relu@2, /relu)",
        "add_2_fq = fake_quant(/add@2)",
        "output = output(last)",
    ]


@pytest.mark.parametrize("target", ["inductor", "openvino"])
def test_an_add_that_no_convolution_computes_is_a_kernel_of_its_own(target):
    result = quantised(Fused, {"target": target}, shape=(4, 6, 6))
    lines = text_of(result.program)
    assert "/add = add(relu_fq, b)" in lines
    assert "/add@2 = add(relu_2_fq, relu_fq)" in lines
    # What no kernel reads stays as the kernel gives it.
    assert "output = output(last)" in lines
    assert result.decision.in_float == ()


def test_of_two_convolutions_the_first_operand_computes_the_add():
    lines = lines_of(Add, "tensorrt-qdq")
    assert "relu_fq = fake_quant(/relu)" in lines
    assert "/add = add(a, relu_fq)" in lines
    assert "pool = max_pool2d(/relu@2)" in lines
    assert "flatten_fq = fake_quant(/flatten)" in lines
    kept = quantised(Add, {"target": "inductor", "keep": ["/add"]})
    assert "/add = add(a, /relu)" in text_of(kept.program)
    assert kept.reasons()["/add"] == "it is excluded"


class Dropped(nn.Module):
    """What stands between the convolution and the add does nothing outside training."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.last = nn.Conv2d(4, 4, 1), nn.Dropout(0.1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = nn.functional.silu(self.last(x))
        return self.last(y + self.drop(self.a(y)))


@pytest.mark.parametrize("target", ["inductor", "openvino"])
def test_silu_is_computed_with_the_convolution_and_so_are_adds_behind_dropout(target):
    result = quantised(Dropped, {"target": target}, shape=(4, 6, 6))
    lines = text_of(result.program)
    assert "/silu = silu(last)" in lines
    assert "/add = add(silu_fq, drop)" in lines
    assert "drop = dropout(a)" in lines
    assert result.decision.in_float == ()


class Broadcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(1, 4, 6, 6))

    def forward(self, x):
        return self.b(self.a(x) + x.mean((2, 3), keepdim=True)), self.a(x) + self.scale


def test_no_convolution_computes_an_add_that_broadcasts_or_adds_a_parameter():
    result = quantised(Broadcast, {"target": "tensorrt-qdq"}, shape=(4, 6, 6))
    lines = text_of(result.program)
    assert "/add = add(a, /mean)" in lines
    assert "/add@2 = add(a@2, scale)" in lines


@pytest.mark.parametrize(
    ("target", "layer", "kernel"),
    [
        ("onnxruntime", lambda: nn.ConvTranspose2d(4, 4, 2), False),
        ("openvino", lambda: nn.ConvTranspose2d(4, 4, 2), False),
        ("executorch", lambda: nn.ConvTranspose2d(4, 4, 2), False),
        ("generic", lambda: nn.ConvTranspose2d(4, 4, 2), True),
        ("inductor", lambda: nn.ConvTranspose2d(4, 4, 2), False),
        ("tensorrt-qdq", lambda: nn.ConvTranspose2d(4, 4, 2), True),
    ],
)
def test_a_layer_without_an_integer_kernel_stays_in_float(target, layer, kernel):
    def build():
        return nn.Sequential(nn.Conv2d(4, 4, 1), layer())

    result = quantised(build, {"target": target}, shape=(4, 6, 6))
    assert ("1_weight_fq" in quantizers(result)) == kernel
    if not kernel:
        assert result.reasons()["1"] == f"{target} has no integer kernel of conv_transpose2d"
        (share,) = result.decision.in_float
        assert (share.op, share.count) == ("conv_transpose2d", 1)
        assert share.share == pytest.approx(16 * 4 / (16 + 16 * 4), abs=1e-6)
        assert "in float, 80.0% of MACs: conv_transpose2d × 1 (80.0% of MACs)" in (
            result.decision.summary()
        )


def test_what_stays_in_float_is_told_with_its_share():
    program = capture(seeded(Transformer), token_batches(1)[0])
    result = apply(Static, program, {"calibration": 16}, calibrated(token_batches()))
    first, *rest = result.decision.in_float
    assert (first.op, first.count) == ("sdpa", 4)
    assert 0 < first.share < 0.5
    assert {each.op: each.count for each in rest} == {
        "add": 8, "layer_norm": 9, "gelu": 4, "mean": 1,
    }  # fmt: skip
    assert not any(each.share for each in rest)
    (line,) = [line for line in result.decision.summary() if line.startswith("in float")]
    assert line.endswith("layer_norm × 9, add × 8, gelu × 4, mean × 1")


def test_a_model_in_integers_throughout_says_nothing_of_float():
    assert quantised(ResNet).decision.in_float == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": "onnxruntime", "weights": {"bits": 4}},
            "onnxruntime's integer kernels take weights of 8 bits, not of 4",
        ),
        (
            {"target": "executorch", "activations": {"bits": 16}},
            "executorch's integer kernels take activations of 8 bits, not of 16",
        ),
        (
            {"target": "openvino", "overrides": [{"targets": ["*"], "weights": {"bits": 2}}]},
            "openvino's integer kernels take weights of 8 bits, not of 2",
        ),
        (
            {"target": "inductor", "weights": {"per": "tensor"}},
            "inductor's integer kernels take weights with a scale per channel, not per tensor",
        ),
        (
            {"target": "tensorrt-qdq", "activations": {"signed": False}},
            "tensorrt-qdq takes signed activations, not unsigned ones",
        ),
        (
            {"target": "tensorrt-qdq", "activations": {"symmetric": False}},
            "tensorrt-qdq takes symmetric activations, not affine ones",
        ),
        (
            {"target": "onnxruntime", "activations": {"signed": True}},
            "onnxruntime takes unsigned activations, not signed ones",
        ),
        (
            {"target": "executorch", "products": True},
            "executorch has no integer products of two activations",
        ),
        ({"target": "tensorrt"}, "tensorrt-qdq"),
    ],
)
def test_what_a_runtime_cannot_do_is_an_error_that_says_what_it_can(options, message):
    with pytest.raises(ValueError, match="validation error") as caught:
        Static.Options.model_validate_json(json.dumps(options))
    assert message in str(caught.value)


def test_what_a_target_leaves_open_can_be_told():
    result = quantised(Add, {"target": "openvino", "activations": {"signed": True}})
    assert quantizers(result)["relu_fq"].signed
    told = {"target": "tensorrt-qdq", "activations": {"signed": True, "symmetric": True}}
    assert Static.Options.model_validate_json(json.dumps(told)).signed


def test_training_places_for_a_target_too():
    program = captured(ResNet, 2, 3, 16, 16)
    options = {"target": "executorch", "calibration": 16}
    result = apply(Qat, program, options, calibrated(image_batches()))
    assert "head_fq = fake_quant(head)" in text_of(result.program)
    assert quantizers(result)["head_fq"].signed
    with pytest.raises(ValueError, match="learns zero points"):
        Qat.Options.model_validate_json('{"target": "tensorrt-qdq", "method": "lsq_plus"}')


class Gated(nn.Module):
    """Convolutions with SiLU between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)
        )

    def forward(self, x):
        return self.layers(x)


def test_silu_becomes_an_integer_product_for_onnxruntime_alone(tmp_path):
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    program = fxc.capture(Gated().eval(), (images[:2],))
    made = {}
    for target in ("onnxruntime", "generic"):
        step = {"use": "quantize.static", "calibration": 8, "target": target}
        made[target] = fxc.compress(program, [step], data={"calibration": [(images,)]}).program
    names = {t: [op_name(node) for node in p.nodes] for t, p in made.items()}
    assert (names["onnxruntime"].count("sigmoid"), names["onnxruntime"].count("silu")) == (2, 0)
    assert (names["generic"].count("sigmoid"), names["generic"].count("silu")) == (0, 2)
    expected = program(images)
    noise = {t: (p(images) - expected).pow(2).sum() for t, p in made.items()}
    assert noise["onnxruntime"] < 2 * noise["generic"]
    (artefact,) = emit(made["onnxruntime"], tmp_path, ["onnx"])
    kernels = integer_kernels(artefact.path)
    assert (kernels["QLinearSigmoid"], kernels["QLinearMul"], kernels["QLinearConv"]) == (2, 2, 3)
