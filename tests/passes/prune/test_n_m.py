import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.axes import analyze
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from passes.prune._sparsity.orders import apply_orders
from passes.prune.n_m import NM
from tests.passes.prune.sparse import CRITERIA, MODELS, images, pruned, resnet, squared_error
from tests.passes.support import apply, captured, random_input, relative_error


def groups_of(weight, form, m):
    """Return how many entries each group keeps."""
    return form.matrices(weight).unflatten(-1, (-1, m)).count_nonzero(-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("permute", [False, True])
def test_every_group_keeps_two_of_four(name, criterion, permute):
    build, data, example = MODELS[name]
    program = build()
    options = {"criterion": criterion, "permute": permute, "escapes": 1}
    result = pruned(NM, program, options, data())
    state = result.program.state()
    assert len(result.decision.weights) >= 8
    for weight in result.decision.weights:
        kept = groups_of(state[weight.tensor], weight.form, 4)
        assert torch.equal(kept, torch.full_like(kept, 2))
        assert weight.sparsity == 0.5
    assert bool(result.decision.orders) == permute
    x = example()
    silence = float(program(x).detach().square().sum())
    assert 0 < squared_error(program, result.program, x) < silence


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4), more=st.integers(1, 4), groups=st.integers(1, 4), out=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_largest_of_each_group_stay(n, more, groups, out, seed):
    m = n + more
    layer = nn.Linear(groups * m, out)
    values = torch.randn(out, groups * m, generator=torch.Generator().manual_seed(seed))
    layer.weight = nn.Parameter(values)
    program = capture(nn.Sequential(layer), (torch.ones(2, groups * m),))
    after = apply(NM, program, {"n": n, "m": m}).program.state()["0.weight"].detach()
    before = values.unflatten(-1, (groups, m))
    largest = before.abs().topk(n).indices
    expected = torch.zeros_like(before).scatter(-1, largest, before.gather(-1, largest))
    assert torch.equal(after, expected.flatten(1))


def test_groups_of_a_convolution_run_along_its_input_channels():
    program = captured(lambda: nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)), 2, 8, 6, 6)
    after = apply(NM, program).program.state()["0.weight"]
    assert torch.equal((after != 0).sum(1), torch.full((4, 3, 3), 2))
    transposed = captured(lambda: nn.Sequential(nn.ConvTranspose2d(8, 4, 3)), 2, 8, 6, 6)
    after = apply(NM, transposed).program.state()["0.weight"]
    assert torch.equal((after.unflatten(0, (2, 4)) != 0).sum(1), torch.full((2, 4, 3, 3), 2))


def test_channels_that_cannot_be_grouped_are_a_reason():
    result = apply(NM, resnet())
    assert result.reasons() == {"stem.0": "its 3 input channels are no multiple of 4"}
    depthwise = captured(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), 2, 4, 6, 6)
    with pytest.raises(UsageError, match="there is no weight to prune") as caught:
        apply(NM, depthwise)
    assert "its 1 input channels per group are no multiple of 4" in caught.value.reason


def test_sparsegpt_makes_up_for_what_groups_lose():
    program = resnet()
    x = random_input(16, 3, 16, 16)
    errors = {
        criterion: squared_error(program, pruned(NM, program, {"criterion": criterion}).program, x)
        for criterion in CRITERIA
    }
    assert errors["sparsegpt"] < 0.5 * errors["wanda"] < 0.5 * errors["magnitude"]


def test_two_of_four_again_finds_nothing_to_do():
    once = apply(NM, resnet()).program
    with pytest.raises(UsageError) as caught:
        apply(NM, once)
    assert "it is as sparse already" in caught.value.reason


@pytest.mark.parametrize("name", MODELS)
def test_another_order_is_the_same_function(name):
    build, data, example = MODELS[name]
    program = build()
    options = {"permute": True, "escapes": 0, "criterion": "wanda"}
    result = pruned(NM, program, options, data())
    rewriter = GraphRewriter(program)
    apply_orders(rewriter, result.decision.orders, result.decision.arrays)
    ordered = rewriter.finish()
    assert relative_error(program, ordered, example()) < 1e-4
    changed = [n for n, t in program.state().items() if not torch.equal(t, ordered.state()[n])]
    free = {place.tensor for axis in analyze(program).axes for place in axis.places}
    assert {program.ties.get(name, name) for name in changed} <= free
    for order in result.decision.orders:
        assert order.after > order.before
        indices = result.decision.arrays[f"{order.axis}.order"]
        assert sorted(indices.tolist()) == list(range(len(indices)))


def test_orders_rescue_channels_that_crowd_into_one_group():
    """Hidden units of which the large ones stand together: 2:4 loses half of them."""

    def build():
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        with torch.no_grad():
            model[2].weight.uniform_(0.9, 1.1)
            model[2].weight[:, 4:] *= 0.01
        return model

    program = captured(build, 2, 6)
    x = random_input(16, 6)
    plain = apply(NM, program, {"targets": ["2"]}).program
    options = {"targets": ["2"], "permute": True}
    result = apply(NM, program, options)
    assert squared_error(program, result.program, x) < 1e-3 * squared_error(program, plain, x)
    assert [each.axis for each in result.decision.orders] == ["0.weight[0]"]
    assert result.kinds() == {"set-tensor": 3}


def test_a_plan_leaves_orders_open_and_a_lock_replays_them():
    program = resnet()
    planned = apply(NM, program, {"permute": True}, Context(planning=True))
    assert "head.weight: zeros known after the search for orders" in " ".join(
        planned.decision.pending
    )
    first, again = (pruned(NM, program, {"permute": True}) for _ in range(2))
    assert first.program.fingerprint() == again.program.fingerprint()


def test_the_promise_is_checked_group_by_group():
    result = apply(NM, resnet())
    rewriter = GraphRewriter(result.program)
    rewriter.set_tensor("head.weight", torch.ones(10, 16))
    with pytest.raises(PassError, match=r"head\.weight is not as decided"):
        NM().ensures(result.before, rewriter.finish(), result.decision)
    rewriter = GraphRewriter(result.program)
    rewriter.set_tensor("stem.0.bias", torch.ones(8))
    with pytest.raises(PassError, match=r"stem\.0\.bias changed, and it is not pruned"):
        NM().ensures(result.before, rewriter.finish(), result.decision)


@pytest.mark.parametrize(
    "options",
    [{"n": 4}, {"n": 0}, {"m": 1}, {"n": 3, "m": 2}, {"ratio": 0.5}, {"escapes": -1}, {"n": 2.0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        NM.Options.model_validate_json(json.dumps(options))


def test_general_patterns_compose_with_earlier_masks():
    once = apply(NM, resnet(), {"n": 4, "m": 8, "mode": "keep"}).program
    result = pruned(NM, once, {"mode": "keep", "criterion": "sparsegpt"}, images())
    for weight in result.decision.weights:
        assert weight.masked
        after = result.program.state()[weight.tensor]
        assert int(groups_of(after, weight.form, 8).max()) <= 4
        assert int(groups_of(after, weight.form, 4).max()) <= 2
        assert bool((after[once.state()[weight.tensor] == 0] == 0).all())
