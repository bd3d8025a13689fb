"""Experts that become one dense layer: when that loses nothing, and how far it is otherwise."""

import pytest
import torch

from fxcompress.errors import UsageError
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import taps_of
from fxcompress.testing import check_pass
from passes.moe.merge_experts import MergeExperts
from passes.moe.to_dense import ToDense
from passes.moe.upcycle import Upcycle
from tests.passes.moe.leaves import HIDDEN, experts_in, mixture, program_of, tokens
from tests.passes.moe.test_merge_experts import context, outputs, twins
from tests.passes.moe.test_upcycle import WIDTH, gated
from tests.passes.support import apply

ALL_EQUAL = ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5))


@pytest.mark.parametrize("weighting", ["usage", "uniform"])
def test_equal_experts_are_one_layer(weighting):
    model = twins(ALL_EQUAL)
    result = apply(ToDense, program_of(model), {"weighting": weighting}, context())
    assert not experts_in(result.program)
    assert all(each.error < 1e-5 for each in result.decision.layers)
    assert "they are equal" in result.decision.summary()[0]
    assert result.program.module.get_submodule("blocks.0.experts_dense.up").out_features == HIDDEN
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(result.program, x), outputs(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"gated": False}])
def test_constant_weights_are_experts_side_by_side(options):
    """A router that says the same to every token: its weights are numbers."""
    model = mixture(k=4, **options)
    for block in model.blocks:
        scores = torch.linspace(1, 2, 6)
        block.router.register_forward_hook(lambda _, __, y, scores=scores: y * 0 + scores)
        block.router.weight.data.zero_()
    program = program_of(model)
    result = apply(ToDense, program, {"how": "concat"}, context())
    for each in result.decision.layers:
        assert each.experts == (2, 3, 4, 5)
        assert each.error < 1e-6
        assert each.hidden == 4 * HIDDEN
    assert "weights are constant" in result.decision.summary()[0]
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(result.program, x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_a_sum_that_is_not_one_goes_into_the_layer():
    model = twins(ALL_EQUAL, renormalise=False, k=6)
    result = apply(ToDense, program_of(model), {}, context())
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(result.program, x), outputs(model, x), rtol=1e-5, atol=1e-5)
    model = twins(ALL_EQUAL, renormalise=False, k=2)
    result = apply(ToDense, program_of(model), {}, context())
    (first, _) = result.decision.layers
    assert 0.3 < sum(first.factors) < 1
    assert first.error > 0.01
    with pytest.raises(UsageError, match="sum to is not known") as error:
        apply(ToDense, program_of(model), {"weighting": "uniform"})
    assert "weighting: usage" in error.value.hint


def test_layers_are_the_means_that_are_said():
    """Of the first block, by hand: the mean of weights, or of what experts make."""
    model = mixture()
    block, batches = model.blocks[0], torch.cat([b[0] for b in tokens()])
    weights, chosen = (3 * block.router(block.norm(batches))).softmax(-1).topk(2, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).detach().flatten(0, -2)
    each = torch.zeros(len(weights), 6).scatter_(1, chosen.flatten(0, -2), weights)
    x = tokens(seed=5)[0][0]
    made = apply(ToDense, program_of(model), {"how": "concat"}, context())
    mean = each.mean(0)
    assert made.decision.layers[0].factors == pytest.approx(mean.tolist(), rel=1e-5)
    assert made.decision.layers[0].error == pytest.approx(
        float((each.amax(0) - each.amin(0)).max()), rel=1e-5
    )
    y, experts = block.norm(x), block.experts
    wanted = sum(mean[e] * experts.apply_expert(e, y) for e in range(6))
    net = made.program.module.get_submodule("blocks.0.experts_dense")
    hidden = torch.nn.functional.silu(net.gate(y)) * net.up(y)
    torch.testing.assert_close(net.down(hidden), wanted, rtol=1e-4, atol=1e-5)
    options = {"weighting": "mass", "align": "none"}
    made = apply(ToDense, program_of(model), options, context())
    net = made.program.module.get_submodule("blocks.0.experts_dense")
    share = each.sum(0) / each.sum()
    wanted = (share[:, None, None] * experts.up).sum(0)
    torch.testing.assert_close(net.up.weight, wanted, rtol=1e-4, atol=1e-6)
    assert "they differ by" in made.decision.summary()[0]


def test_an_upcycled_model_comes_back():
    options = {"experts": 4, "top_k": 2}
    upcycled = apply(Upcycle, gated(), options).program
    back = apply(ToDense, upcycled, {"weighting": "uniform", "align": "none"})
    assert not taps_of(back.program)
    assert not [name for name in back.program.state() if "router" in name]
    x = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outputs(back.program, x), outputs(gated(), x), rtol=1e-5, atol=1e-6)
    sizes = [sum(p.numel() for p in each.module.parameters()) for each in (back.program, gated())]
    assert sizes[0] == sizes[1]


def test_merged_to_one_expert_it_is_exact_too():
    merged = apply(MergeExperts, program_of(mixture()), {"experts": 1}, context()).program
    dense = apply(ToDense, merged, {"how": "concat"}, context())
    assert all(each.error < 1e-5 for each in dense.decision.layers)
    x = tokens(seed=5)[0][0]
    torch.testing.assert_close(outputs(dense.program, x), outputs(merged, x), rtol=1e-5, atol=1e-5)


def test_every_pass_owes_this_too():
    check_pass(ToDense, program_of(mixture()), {}, context=context(), idempotent=False)


@pytest.mark.parametrize("how", ["merge", "concat"])
def test_it_plans_without_data_and_weights(how):
    with torch.device("meta"):
        model = mixture()
    result = apply(ToDense, program_of(model), {"how": how}, Context(planning=True))
    assert result.decision.pending
    wide = HIDDEN * (6 if how == "concat" else 1)
    down = result.program.module.get_submodule("blocks.0.experts_dense.down")
    assert down.weight.shape == (8, wide)
    counted = sum(p.numel() for p in result.program.module.parameters())
    before = sum(p.numel() for p in model.parameters()) - 2 * 6 * 8
    assert before - counted == sum(e.before - e.after for e in result.decision.layers)
