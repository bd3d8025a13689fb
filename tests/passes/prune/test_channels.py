"""prune.channels: amounts, selection, plans, promises, and everything that cannot be."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.api import prepare
from fxcompress.axes import analyze
from fxcompress.errors import DataError, NumericsError, PassError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline import render_plan
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from passes.prune._channels.shrink import KEEP, check_masked, shrunk
from passes.prune.channels import Channels
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, seeded

STEM, INNER, LAST = "stem.0.weight[0]", "layer1.0.conv1.weight[0]", "layer2.0.conv2.weight[0]"


def resnet():
    return captured(ResNet, 2, 3, 16, 16)


def transformer():
    return capture(
        seeded(Transformer), token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}}
    )


def sizes(result):
    return {each.name: each.kept for each in result.decision.axes}


def kept(result, name):
    return np.asarray(result.decision.arrays[f"keep/{name}"])


# -- amounts -------------------------------------------------------------------------------------


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


def with_weak_channels():
    """Return a ResNet in which channels 1, 4 and 6 of layer1.0.conv1 hardly matter."""
    model = seeded(ResNet)
    with torch.no_grad():
        for index in (1, 4, 6):
            model.layer1[0].conv1.weight[index] *= 0.01
            model.layer1[0].bn1.weight[index] *= 0.01
            model.layer1[0].conv2.weight[:, index] *= 0.01
    return capture(model, (random_input(2, 3, 16, 16),))


def test_the_lowest_scores_go():
    program = with_weak_channels()
    result = apply(Channels, program, {"ratio": 0.4, "targets": ["layer1.0.conv1"]})
    assert kept(result, INNER).tolist() == [0, 2, 3, 5, 7]
    assert torch.equal(
        result.program.state()["layer1.0.conv1.weight"],
        program.state()["layer1.0.conv1.weight"][[0, 2, 3, 5, 7]],
    )


def test_numbers_and_globs_say_how_much():
    assert set(sizes(apply(Channels, resnet(), {"keep": 8})).values()) == {8}
    options = {"keep": {"layer1.0.*": 5, "layer*": 8}, "max_ratio": 0.9}
    assert sizes(apply(Channels, resnet(), options)) == {
        STEM: 5, INNER: 5, "layer1.1.conv1.weight[0]": 8, "layer2.0.conv1.weight[0]": 8,
        LAST: 8, "layer2.1.conv1.weight[0]": 8,
    }  # fmt: skip
    by_glob = apply(Channels, resnet(), {"ratio": {"layer2.*.conv1": "25%"}})
    assert sizes(by_glob)["layer2.1.conv1.weight[0]"] == 12
    assert sizes(by_glob)[LAST] == 16


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("name", ["macs", "parameters", "bytes"])
def test_budgets_are_met_closely(name, scope):
    program = captured(lambda: ResNet(32), 2, 3, 16, 16)
    result = apply(Channels, program, {"budget": {name: "55%"}, "scope": scope})
    share = getattr(result.decision.after, name) / getattr(result.decision.before, name)
    assert (0.54 if scope == "global" else 0.5) < share <= 0.55
    if scope == "global":
        parts = {round(e.kept / e.size, 2) for e in result.decision.axes}
        assert len(parts) > 2, "a global budget is not a uniform ratio"


def test_relative_scores_cut_axes_more_alike_than_scores_in_one_unit():
    spreads = []
    for normalise in ("auto", "mean"):
        criterion = {"name": "l2", "normalise": normalise}
        options = {"budget": {"macs": "50%"}, "criterion": criterion}
        result = apply(Channels, resnet(), options)
        parts = [each.kept / each.size for each in result.decision.axes]
        spreads.append(max(parts) - min(parts))
    assert spreads[0] <= 0.2 < spreads[1]


def test_absolute_budgets_and_several_at_once():
    result = apply(Channels, resnet(), {"budget": {"macs": "200k", "parameters": "6k"}})
    assert result.decision.after.macs <= 200_000
    assert result.decision.after.parameters <= 6_000


def test_a_global_ratio_compares_indices_of_all_axes():
    result = apply(Channels, with_weak_channels(), {"ratio": 0.125, "scope": "global"})
    assert sum(sizes(result).values()) == 63
    assert sizes(result)[INNER] == 5


def test_multiples_caps_and_least_sizes_hold():
    options = {"budget": {"macs": "65%"}, "round_to": {"residual": 4, "default": 2}, "min_keep": 5}
    result = apply(Channels, resnet(), options)
    for entry in result.decision.axes:
        assert entry.kept % (4 if entry.kind == "residual" else 2) == 0
        assert entry.kept >= max(5, entry.size / 2)


# -- selection -----------------------------------------------------------------------------------


def test_kinds_select_axes():
    result = apply(Channels, transformer(), {"ratio": 0.5, "kinds": ["head", "neuron"]})
    assert {each.kind for each in result.decision.axes} == {"head", "neuron"}
    state = result.program.state()
    assert state["layers.0.qkv.weight"].shape == (48, 32)
    assert state["layers.0.up.weight"].shape == (64, 32)


def test_targets_are_modules_that_make_an_axis_not_those_that_read_it():
    result = apply(Channels, resnet(), {"ratio": 0.5, "targets": ["layer1.0.conv1"]})
    assert sizes(result) == {INNER: 4}
    assert apply(Channels, resnet(), {"ratio": 0.5, "targets": [INNER]}).decision.axes
    excluded = apply(Channels, resnet(), {"ratio": 0.5, "exclude": ["layer1*", "stem*"]})
    assert all(name.startswith("layer2") for name in sizes(excluded))


def test_what_cannot_shrink_is_declined_with_the_reason():
    reasons = apply(Channels, resnet(), {"ratio": 0.5}).reasons()
    assert reasons["head.weight[0]"].startswith("it is a size of the model's output")
    assert reasons["stem.0.weight[1]"].startswith("it is a size of the model's input")


def test_outputs_shrink_if_asked_for_and_are_named():
    options = {"ratio": 0.5, "targets": ["head"], "signature": "free"}
    result = apply(Channels, resnet(), options)
    assert result.program(random_input(3, 3, 16, 16)).shape == (3, 5)
    assert result.decision.outputs == ("output 0: size 1 10 → 5 (head.weight[0])",)


class Unknown(nn.Module):
    """A product whose op has no rule."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.third, self.fourth = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(torch.renorm(self.first(x), 2, 1, 1.0))
        return self.fourth(self.third(x))


def test_ops_without_a_rule_are_counted_and_keep_what_they_touch():
    result = apply(Channels, captured(Unknown, 2, 4), {"ratio": 0.5, "targets": ["third"]})
    if result.decision.unknown:
        assert result.decision.unknown == {"renorm": 1}
        assert "in 1 node" in result.reasons()["renorm"]


# -- plans ---------------------------------------------------------------------------------------


def test_the_plan_says_what_shrinks():
    text = render_plan(
        prepare([{"use": "prune.channels", "ratio": 0.5}], transformer()).plan()
    ).plain
    assert "  head: 4 axes, 4 → 2 each\n" in text
    assert "  residual: 1 axis, 32 → 16\n" in text
    assert "norms over embed.weight[1] count only what is kept" in text


def test_a_plan_decides_what_a_run_will():
    steps = [{"use": "prune.channels", "budget": {"macs": "50%"}}]
    job = prepare(steps, resnet())
    plan = job.plan()
    assert plan.steps[0].settled
    result = job.run(plan=plan)
    assert result.record.result.macs == plan.result.macs


def test_a_plan_on_meta_weights_shows_the_sizes():
    with torch.device("meta"):
        model = Transformer().eval()
        batch = token_batches(1)[0]
    program = capture(model, tuple(each.to("meta") for each in batch))
    plan = prepare([{"use": "prune.channels", "ratio": 0.5}], program).plan()
    assert plan.steps[0].pending == ("which indices stay: known after reading weights",)
    assert plan.result.macs < 0.3 * plan.original.macs
    budget = prepare([{"use": "prune.channels", "budget": {"macs": "50%"}}], program).plan()
    assert "shown as the same part of all" in budget.steps[0].pending[1]
    assert 0.4 * plan.original.macs < budget.result.macs <= 0.5 * plan.original.macs


def test_a_plan_of_a_criterion_with_data_is_pending():
    options = {"ratio": 0.5, "criterion": {"name": "taylor"}}
    result = apply(Channels, resnet(), options, Context(planning=True))
    assert result.decision.pending == ("which indices stay: known after calibration",)
    assert sizes(result)[STEM] == 4


# -- criteria and compensation -------------------------------------------------------------------


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


def test_a_decision_about_other_sizes_is_refused():
    options = Channels.Options.model_validate_json(json.dumps({"ratio": 0.5}))
    decision = Channels().decide(resnet(), options, Context())
    other = captured(lambda: ResNet(width=16), 2, 3, 16, 16)
    with pytest.raises(PassError, match="the decision does not fit"):
        Channels().rewrite(GraphRewriter(other), decision)


# -- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.0, "max_ratio": 1.0}, UsageError, "a ratio of 1 empties stem.0.weight[0]"),
        ({"ratio": 0.6}, UsageError, "max_ratio 0.5 leaves at least 4"),
        ({"keep": 2}, UsageError, "max_ratio 0.5 leaves at least 4"),
        ({"budget": {"macs": "5%"}}, UsageError, "the smallest reachable is 97,360 (29.2%"),
        ({"ratio": 0.5, "round_to": 64}, UsageError, "larger than stem.0.weight[0], which has 8"),
        ({"ratio": 0.5, "targets": ["head"]}, SelectorError, "it is a size of the model's output"),
        ({"ratio": 0.5, "targets": ["head"]}, SelectorError, "`signature: free`"),
        ({"ratio": 0.5, "targets": ["stem.0.weight[1]"]}, SelectorError, "the model's input (x)"),
        ({"ratio": 0.5, "targets": ["stem.0.weight[1]"], "signature": "free"}, SelectorError,
         "of the model's input"),
        ({"ratio": 0.5, "targets": ["layer9.*"]}, SelectorError, "`layer9.*` in `targets` matches"),
        ({"ratio": 0.5, "targets": ["layer1"]}, SelectorError, "write `layer1.*`"),
        ({"ratio": 0.5, "exclude": ["fc"]}, SelectorError, "`fc` in `exclude` matches no axis"),
        ({"ratio": {"layer9.*": 0.5}}, SelectorError, "`layer9.*` in `ratio` matches no axis"),
        ({"ratio": 0.5, "kinds": ["channel", "head"]}, SelectorError, "`head` in `kinds` matches"),
        ({"ratio": 0.5, "kinds": ["head"]}, SelectorError, "there are: `channel`, `residual`"),
        ({"ratio": 0.5, "kinds": ["neuron"]}, SelectorError, "head.weight[0]: it is a size of the"),
        ({"ratio": 0.5, "kinds": ["residual"], "targets": ["layer1.0.conv1"]}, SelectorError,
         "the targets are of the kinds `channel`"),
        ({"ratio": 0.5, "expect": 4}, SelectorError, "6 axes are selected, 4 are expected"),
        ({"ratio": 0.5, "criterion": {"name": "taylor"}}, DataError, "needs a split calibration"),
        ({"ratio": 0.5, "compensation": {"method": "bias"}}, DataError, "needs a split calib"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error_that_says_why(options, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        apply_told(options)
    assert caught.value.what


def apply_told(options):
    try:
        apply(Channels, resnet(), options)
    except (UsageError, SelectorError, DataError) as error:
        # What matters may be in the reason or in the hint.
        raised = type(error)(str(error))
        raise raised from error


def test_a_target_that_only_reads_says_who_makes_it():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.tail = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.tail(self.wide(x))

    with pytest.raises(SelectorError, match="matches only axes that cannot shrink"):
        apply(Channels, captured(Tail, 2, 4), {"ratio": 0.5, "targets": ["tail"]})


def test_a_nan_weight_is_named():
    model = seeded(ResNet)
    with torch.no_grad():
        model.layer1[0].conv1.weight[2, 0, 0, 0] = float("nan")
    program = capture(model, (random_input(2, 3, 16, 16),))
    with pytest.raises(NumericsError, match=r"layer1\.0\.conv1\.weight"):
        apply(Channels, program, {"ratio": 0.5})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.5, "keep": 4},
        {"ratio": "150%"},
        {"keep": 0},
        {"budget": {}},
        {"budget": {"latency": "80%", "macs": "50%"}},
        {"budget": {"flops": "50%"}},
        {"keep": 4, "scope": "global"},
        {"ratio": {"layer1.*": 0.5}, "scope": "global"},
        {"ratio": 0.5, "round_to": 0},
        {"ratio": 0.5, "kinds": ["channels"]},
        {"ratio": 0.5, "min_keep": 0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Channels.Options.model_validate_json(json.dumps(options))


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
