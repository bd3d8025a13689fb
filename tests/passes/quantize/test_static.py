"""`quantize.static`: the graph it makes, what it plans, repeats and refuses."""

import json

import pytest
import torch
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from tests.passes.models import ResNet, image_batches
from tests.passes.quantize.quantised import Add, calibrated, quantised, quantizers
from tests.passes.support import apply, captured, random_input, text_of


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
