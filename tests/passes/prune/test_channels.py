"""`prune.channels`: what goes, what it costs then, and the promise that nothing else changes."""

import json

import numpy as np
import pytest
import torch

from fxcompress.analysis import cost
from fxcompress.axes import analyze
from fxcompress.errors import PassError
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from passes.prune._channels.shrink import KEEP, check_masked, shrunk
from passes.prune.channels import Channels
from tests.passes.models import ResNet, image_batches
from tests.passes.prune.shrinking import (
    INNER,
    LAST,
    STEM,
    kept,
    resnet,
    sizes,
    transformer,
    with_weak_channels,
)
from tests.passes.support import apply, captured, random_input


def test_a_ratio_cuts_every_axis_and_the_program_still_runs():
    result = apply(Channels, resnet(), {"ratio": 0.5})
    assert sizes(result) == {
        STEM: 4, INNER: 4, "layer1.1.conv1.weight[0]": 4, "layer2.0.conv1.weight[0]": 8,
        LAST: 8, "layer2.1.conv1.weight[0]": 8,
    }  # fmt: skip
    state = result.program.state()
    assert state["layer1.0.conv2.weight"].shape == (4, 4, 3, 3)
    assert state["layer2.0.down.1.running_var"].shape == (8,)
    assert state["head.weight"].shape == (10, 8)
    assert result.program(random_input(5, 3, 16, 16)).shape == (5, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"budget": {"macs": "60%"}},
        {"ratio": 0.4, "kinds": ["channel"], "round_to": 2},
    ],
)
def test_the_polynomials_tell_what_the_result_costs(options):
    for program in (resnet(), transformer()):
        if "channel" in options.get("kinds", ()) and program.name != "ResNet":
            options = {**options, "kinds": ["neuron"]}
        result = apply(Channels, program, options)
        counted = cost(result.program).summary()
        assert result.decision.after.macs == counted.macs
        assert result.decision.after.parameters == counted.parameters
        assert result.decision.before.macs == cost(program).summary().macs


def test_the_lowest_scores_go():
    program = with_weak_channels()
    result = apply(Channels, program, {"ratio": 0.4, "targets": ["layer1.0.conv1"]})
    assert kept(result, INNER).tolist() == [0, 2, 3, 5, 7]
    assert torch.equal(
        result.program.state()["layer1.0.conv1.weight"],
        program.state()["layer1.0.conv1.weight"][[0, 2, 3, 5, 7]],
    )


def test_criteria_with_data_read_it():
    data = {"calibration": [(b, torch.zeros(8, dtype=torch.long)) for b in image_batches(2)]}
    options = {"ratio": 0.5, "criterion": {"name": "activation_norm", "samples": 8}}
    result = apply(Channels, resnet(), options, Context(data=data))
    assert sizes(result)[STEM] == 4


def test_compensation_makes_up_for_what_goes():
    program = resnet()
    data = {"calibration": [(random_input(16, 3, 16, 16, seed=s),) for s in range(4)]}
    context = Context(data=data)
    options = {"ratio": 0.5, "targets": ["layer1.0.conv1", "layer1.1.conv1"]}
    bare = apply(Channels, program, options)
    method = {"method": "least_squares", "samples": 64}
    made = apply(Channels, program, {**options, "compensation": method}, context)
    assert any(name.startswith("value/") for name in made.decision.arrays)
    x = random_input(8, 3, 16, 16, seed=9)
    with torch.no_grad():
        errors = [float((r.program(x) - program(x)).square().mean()) for r in (bare, made)]
    assert errors[1] < 0.7 * errors[0]


def test_a_changed_weight_is_caught():
    program = resnet()
    options = Channels.Options.model_validate_json(json.dumps({"ratio": 0.5}))
    decision = Channels().decide(program, options, Context())
    rewriter = GraphRewriter(program)
    Channels().rewrite(rewriter, decision)
    rewriter.set_tensor("head.bias", rewriter.get_tensor("head.bias") + 1e-6)
    after = rewriter.finish()
    with pytest.raises(PassError, match=r"head\.bias is not what was kept of it"):
        Channels().ensures(program, after, decision)


def test_a_wrong_channel_is_caught():
    for program in (resnet(), transformer()):
        options = Channels.Options.model_validate_json(json.dumps({"ratio": 0.5}))
        decision = Channels().decide(program, options, Context())
        analysis = analyze(program)
        keep = {
            analysis.axis(name.removeprefix(KEEP)): np.asarray(array)
            for name, array in decision.arrays.items()
        }
        check_masked(analysis, keep, shrunk(program, analysis, keep))
        axis, indices = next(iter(keep.items()))
        gone = np.setdiff1d(np.arange(axis.size), indices)
        wrong = {**keep, axis: np.sort(np.append(indices[1:], gone[0]))}
        with pytest.raises(PassError, match="does not compute what the masked one does"):
            check_masked(analysis, keep, shrunk(program, analysis, wrong))


def test_a_decision_about_other_sizes_is_refused():
    options = Channels.Options.model_validate_json(json.dumps({"ratio": 0.5}))
    decision = Channels().decide(resnet(), options, Context())
    other = captured(lambda: ResNet(width=16), 2, 3, 16, 16)
    with pytest.raises(PassError, match="the decision does not fit"):
        Channels().rewrite(GraphRewriter(other), decision)
