"""Drops: nothing in evaluation, the right shares while training, gone with their block."""

from functools import cache

import pytest
import torch

from fxcompress.emit._plain import plain_program
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.nn import LayerDrop
from fxcompress.testing import hash_weights_
from passes.depth.skip_blocks import SkipBlocks
from passes.depth.stochastic import Stochastic
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, captured, random_input, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


@cache
def program_of(first=True):
    model = seeded(lambda: Transformer(width=8, depth=3, heads=2, first=first))
    return capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("branch", True),
        ("block", False),
        pytest.param("branch", False, marks=pytest.mark.slow),
        pytest.param("block", True, marks=pytest.mark.slow),
    ],
)
def test_nothing_changes_in_evaluation_and_skipping_takes_drops_along(form, first):
    program = program_of(first)
    result = apply(Stochastic, program, {"form": form, "p": 0.6})
    ids = token_batches(1, batch=3, seq=5, seed=4)[0][0]
    assert torch.equal(result.program(ids), program(ids))
    skipped = apply(SkipBlocks, result.program, {"layers": [1]}).program
    assert torch.equal(skipped(ids), apply(SkipBlocks, program, {"layers": [1]}).program(ids))
    assert not any("layers_1" in str(node.target) for node in skipped.nodes)


def test_branches_are_those_that_are_added():
    result = apply(Stochastic, program_of(), {"p": 0.3})
    assert [block.p for block in result.decision.blocks] == pytest.approx([0.1, 0.2, 0.3])
    assert result.decision.blocks[1].nodes == (
        ("layers.1/add", "layers.1.out"),
        ("layers.1/add@2", "layers.1.down"),
    )
    (line,) = result.decision.summary()
    assert "6 branches are dropped while training, p from 0.1 to 0.3: 2.4 of 3 blocks" in line


def test_a_dropped_block_passes_its_input_and_its_gradient():
    program = apply(Stochastic, program_of(), {"p": 0.999999, "form": "block",
                                               "schedule": "uniform"}).program  # fmt: skip
    copy = program.copy()
    copy.module.train()
    ids = token_batches(1)[0][0]
    out = copy(ids)
    out.sum().backward()
    state = dict(copy.module.named_parameters())
    assert state["layers.1.qkv.weight"].grad.abs().sum() == 0
    assert state["embed.weight"].grad.abs().sum() > 0


def test_training_equals_the_expectation_of_a_branch():
    program = apply(Stochastic, program_of(), {"p": 0.5, "schedule": "uniform"}).program
    copy = program.copy()
    drop = next(m for m in copy.module.modules() if type(m).__name__ == "StochasticDepth").train()
    torch.manual_seed(0)
    kept = torch.stack([drop(torch.ones(64, 1, 1)) for _ in range(64)])
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean() == pytest.approx(1.0, abs=0.05)


def test_layer_drop_draws_for_a_sample_or_for_all():
    torch.manual_seed(0)
    x, y = torch.zeros(500, 2), torch.ones(500, 2)
    by_row = LayerDrop(0.3, "row").train()(x, y)
    assert by_row[:, 0].mean() == pytest.approx(0.7, abs=0.06)
    assert len(LayerDrop(0.3).train()(x, y).unique()) == 1
    assert torch.equal(LayerDrop(0.3).eval()(x, y), y)


@pytest.mark.parametrize("form", ["branch", "block"])
def test_what_is_emitted_has_no_drops(form):
    program = apply(Stochastic, program_of(), {"form": form}).program
    emitted = plain_program(program)
    assert not any("drops" in str(node.target) for node in emitted.module.graph.nodes)
    ids = token_batches(1)[0][0]
    assert torch.equal(emitted.module(ids), program(ids))


def test_blocks_that_cannot_be_dropped_say_why():
    program = captured(ResNet, 2, 3, 16, 16)
    result = apply(Stochastic, program)
    assert [block.path for block in result.decision.blocks] == ["layer1.0", "layer1.1", "layer2.1"]
    assert result.reasons() == {
        "layer2.0": "its output f32[batch,16,4,4] differs from its input f32[batch,8,8,8]"
    }
    x = random_input(3, 3, 16, 16)
    assert torch.equal(result.program(x), program(x))
    with pytest.raises(UsageError) as caught:
        apply(Stochastic, result.program)
    assert caught.value.what == "no block can be dropped"
    assert caught.value.reason.startswith("layer1.0: it is dropped at random already, by ")


def test_it_plans_from_meta_weights():
    with torch.device("meta"):
        model = Transformer(width=64, depth=4)
    program = capture(model, token_batches(1)[0], dynamic=SIZES)
    assert len(apply(Stochastic, program).decision.blocks) == 4


@pytest.mark.golden("passes/depth/stochastic")
def test_golden(golden_graph):
    golden_graph(hash_weights_(apply(Stochastic, program_of(), {"form": "branch"}).program))
