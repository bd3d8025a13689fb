"""What a plan of `prune.channels` says before any weight is touched."""

import torch

from fxcompress.api import prepare
from fxcompress.ir import capture
from fxcompress.pipeline import render_plan
from fxcompress.pipeline.context import Context
from passes.prune.channels import Channels
from tests.passes.models import Transformer, token_batches
from tests.passes.prune.shrinking import STEM, resnet, sizes, transformer
from tests.passes.support import apply


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
