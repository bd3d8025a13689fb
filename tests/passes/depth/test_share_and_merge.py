"""Blocks that share tensors, and blocks that become one: the formulas, exactness, and refusals."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.depth.merge_layers import MergeLayers
from passes.depth.share_layers import ShareLayers
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, seeded

SIZES = {"ids": {0: "batch", 1: "seq"}}


def transformer(depth=4, seed=0, equal=()):
    model = seeded(lambda: Transformer(width=16, depth=depth, heads=2), seed)
    for place in equal[1:]:
        model.layers[place].load_state_dict(model.layers[equal[0]].state_dict())
    return model


@cache
def program_of(depth=4, seed=0, equal=()):
    return capture(
        transformer(depth, seed, equal), token_batches(1)[0], dynamic=SIZES, verify=False
    )


def outputs(net, ids):
    with torch.no_grad():
        return net(ids)


# -- sharing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["first", "mean"])
@pytest.mark.parametrize("seed", range(2))
def test_equal_layers_share_exactly(init, seed):
    program = program_of(4, seed, (0, 1, 2))
    result = apply(ShareLayers, program, {"groups": [[0, 1, 2]], "init": init})
    ids = token_batches(1, seed=seed)[0][0]
    torch.testing.assert_close(
        outputs(result.program, ids), outputs(program, ids), rtol=1e-6, atol=1e-6
    )
    (group,) = result.decision.groups
    assert group.distance == 0
    # In training the tensors get the gradients of all their uses.
    grads = []
    for each in (program, result.program):
        each.module.zero_grad()
        each(ids).square().sum().backward()
        grads.append({n: p.grad for n, p in each.module.named_parameters() if p.grad is not None})
    for name in grads[1]:
        if name.startswith("layers.0."):
            same = [f"layers.{i}.{name.removeprefix('layers.0.')}" for i in range(3)]
            wanted = torch.stack([grads[0][each] for each in same]).sum(0)
            torch.testing.assert_close(grads[1][name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["first", "mean"])
def test_a_group_has_the_tensors_of_its_first_or_the_mean(init):
    model = transformer(5)
    result = apply(ShareLayers, program_of(5), {"groups": 2, "init": init})
    assert [group.paths for group in result.decision.groups] == [
        ("layers.0", "layers.1"), ("layers.2", "layers.3"),
    ]  # fmt: skip
    with torch.no_grad():
        for first in (0, 2):
            pair = [model.layers[first].state_dict(), model.layers[first + 1].state_dict()]
            mean = {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}
            for place in (first, first + 1):
                model.layers[place].load_state_dict(pair[0] if init == "first" else mean)
    ids = token_batches(1, seed=3)[0][0]
    torch.testing.assert_close(
        outputs(result.program, ids), outputs(model, ids), rtol=1e-5, atol=1e-6
    )
    count = sum(p.numel() for p in model.layers[0].parameters())
    assert result.decision.saved == 2 * count
    before, after = (
        sum(p.numel() for p in program.module.parameters())
        for program in (result.before, result.program)
    )
    assert before - after == 2 * count
    distances = [group.distance for group in result.decision.groups]
    assert all(0.5 < each < 3 for each in distances)


def test_every_pass_owes_this_too():
    check_pass(ShareLayers, program_of(4, 0, (1, 2)), {"groups": [[1, 2]]}, idempotent=False)


# -- merging -----------------------------------------------------------------------------------


def merged_by_hand(model, places):
    """Fold layers into the first, each difference to the first as it was."""
    first = {name: value.clone() for name, value in model.layers[places[0]].state_dict().items()}
    total = {name: value.clone() for name, value in first.items()}
    for place in places[1:]:
        for name, value in model.layers[place].state_dict().items():
            total[name] += value - first[name]
    model.layers[places[0]].load_state_dict(total)
    gone = set(places[1:])
    model.layers = nn.ModuleList(m for i, m in enumerate(model.layers) if i not in gone)
    return model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("places", [(0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_differences_are_to_the_first_layer_as_it_was(places, seed):
    result = apply(MergeLayers, program_of(4, seed), {"groups": [list(places)]})
    ids = token_batches(1, seed=seed)[0][0]
    wanted = outputs(merged_by_hand(transformer(4, seed), places), ids)
    torch.testing.assert_close(outputs(result.program, ids), wanted, rtol=1e-4, atol=1e-5)


def test_a_sum_of_differences_is_not_the_last_layer():
    """A known slip subtracts what the first layer has become: only the last one is then left."""
    model = transformer(3)
    result = apply(MergeLayers, program_of(3), {"groups": [[0, 1, 2]]})
    made = result.program.state()["layers.0.up.weight"]
    layers = [layer.up.weight.detach() for layer in model.layers]
    assert not torch.allclose(made, layers[2], atol=1e-3)
    torch.testing.assert_close(made, layers[1] + layers[2] - layers[0])


@pytest.mark.parametrize("formula", ["differences", "mean"])
def test_equal_layers_merge_into_one_of_them(formula):
    program = program_of(4, 0, (1, 2, 3))
    options = {"groups": [[1, 2, 3]], "formula": formula}
    result = apply(MergeLayers, program, options)
    model = transformer(4)
    model.layers = model.layers[:2]
    ids = token_batches(1)[0][0]
    torch.testing.assert_close(
        outputs(result.program, ids), outputs(model, ids), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("formula", "variance"), [("differences", 5.0), ("mean", 8 / 3)])
def test_a_variance_never_ends_below_zero(formula, variance):
    blocks = nn.Sequential(*(Normed() for _ in range(3)))
    for block, value in zip(blocks, (5.0, 1.0, 2.0), strict=True):
        block.norm.running_var.fill_(value)
    program = capture(blocks.eval(), (torch.randn(2, 4, 5, 5),))
    after = apply(MergeLayers, program, {"groups": [[0, 1, 2]], "formula": formula}).program
    torch.testing.assert_close(after.state()["0.norm.running_var"], torch.full((4,), variance))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def similar(threshold, depth=6, **options):
    context = Context(data={"calibration": token_batches(2)})
    options = {"threshold": threshold, "size": 2, "calibration": 8, **options}
    return apply(MergeLayers, program_of(depth), options, context)


def cosine(left, right):
    batches = [ids for (ids,) in token_batches(2)]
    rows = [
        torch.cosine_similarity(outputs(left, ids).double(), outputs(right, ids).double(), dim=-1)
        for ids in batches
    ]
    return float(torch.cat(rows).mean())


def test_merges_stop_where_outputs_change_too_much():
    with pytest.raises(UsageError, match="no merge keeps a cosine above") as error:
        similar(0.999999)
    assert "the best one has 0." in error.value.reason
    counts = []
    for threshold in (0.9, 0.5, -0.999):
        result = similar(threshold)
        found = cosine(result.before, result.program)
        assert found > threshold
        assert result.decision.merges[0].similarity == pytest.approx(found, abs=1e-6)
        counts.append(len(result.decision.skipped))
    assert counts == sorted(counts)
    # Anything goes: all become one, merged blocks merged again.
    assert counts[-1] == 5
    (all_of_them,) = result.decision.merges
    assert sum(all_of_them.factors) == pytest.approx(1)


def test_the_range_is_kept():
    result = similar(-0.999, range=[1, 3])
    assert [merge.paths for merge in result.decision.merges] == [
        ("layers.1", "layers.2", "layers.3")
    ]


def test_a_plan_compares_nothing():
    decision = apply(MergeLayers, program_of(), {"threshold": 0.8}, Context(planning=True)).decision
    assert decision.pending == ("which blocks: known after comparing outputs",)


# -- bad input ---------------------------------------------------------------------------------


def test_blocks_that_are_no_pair_say_why():
    program = capture(seeded(ResNet), image_batches(1)[0])
    with pytest.raises(UsageError, match=r"layer2\.0 cannot be merged") as error:
        apply(MergeLayers, program, {"groups": [[2, 3]]})
    assert "differs from its input" in error.value.reason
    with pytest.raises(UsageError, match=r"layer2\.1 cannot share the tensors of layer1\.0"):
        apply(ShareLayers, program, {"groups": [[0, 3]]})
    with pytest.raises(UsageError, match="there is no block 9"):
        apply(ShareLayers, program, {"groups": [[0, 9]]})


def test_tied_layers_cannot_be_merged():
    model = transformer(4)
    model.layers[2].up.weight = model.layers[0].up.weight
    program = capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)
    for pass_, name in ((MergeLayers, "groups"), (ShareLayers, "groups")):
        with pytest.raises(UsageError, match=r"layers\.[02] has tensors of its own no more"):
            apply(pass_, program, {name: [[0, 1]]})


@pytest.mark.parametrize(
    ("pass_", "options", "match"),
    [
        (ShareLayers, {"groups": 1}, "at least 2 blocks"),
        (ShareLayers, {"groups": [[0]]}, "at least two"),
        (ShareLayers, {"groups": [[0, 1], [1, 2]]}, "one group only"),
        (MergeLayers, {}, "either groups or a threshold"),
        (MergeLayers, {"groups": [[0, 2]]}, "neighbours"),
        (MergeLayers, {"groups": [[0, 1], [1, 2]]}, "one group only"),
        (MergeLayers, {"threshold": 0.5, "range": [3, 1]}, "ascending"),
    ],
    ids=str,
)
def test_options_are_checked(pass_, options, match):
    import json

    with pytest.raises(ValueError, match=match):
        pass_.Options.model_validate_json(json.dumps(options))
