"""The example with fewer experts: its steps, and what is planned without its text."""

import pytest

from fxcompress.api import prepare
from fxcompress.spec import Spec
from tests.specs.examples import SPECS, needs

PRUNED = SPECS / "moe_prune/spec.yaml"


def test_experts_go_before_the_rest_heals():
    steps = Spec.load(PRUNED).steps
    assert [step.use for step in steps] == ["moe.prune_experts", "train.fit"]
    assert [loss.use for loss in steps[1].options.losses] == ["next_token"]


@pytest.mark.slow
@needs("transformers")
def test_a_quarter_of_the_experts_of_each_layer_is_planned():
    changed = ["passes.fewer.criterion=random"]
    plan = prepare(Spec.load(PRUNED, changed)).plan()
    decision = plan.basis.passes[0].decision
    assert [each["before"] for each in decision["mixtures"]] == [8, 8, 8]
    assert [len(each["kept"]) for each in decision["mixtures"]] == [6, 6, 6]
    assert len(decision["lifted"]) == 3
    assert plan.original.parameters - plan.result.parameters == 3 * 2 * (3 * 64 * 128 + 64)
