"""What blocks are ranked by: each criterion against its definition written out."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.analysis import cost
from fxcompress.errors import DataError, NumericsError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.train.metrics import Metric, accuracy
from passes.depth.skip_blocks import SkipBlocks
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, seeded


def labelled(seed=0, masked=False):
    batches = token_batches(2, masked=masked, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return [(batch, torch.randint(0, 7, (4,), generator=generator)) for batch in batches]


def transformer(seed=0, depth=5):
    model = seeded(lambda: Transformer(width=16, depth=depth, heads=2), seed)
    dynamic = {"ids": {0: "batch", 1: "seq"}}
    return model, capture(model, token_batches(1)[0], dynamic=dynamic, verify=False)


def decide(program, data, context=None, **options):
    context = context or Context(data={"calibration": data})
    return apply(SkipBlocks, program, {"calibration": 8, **options}, context).decision


def skipped(decision):
    return [block.index for block in decision.blocks if block.skip]


def states(model, batch, **kwargs):
    """Return what each layer reads, and what the last one makes."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
        for layer in model.layers
    ]
    with torch.no_grad():
        model(*batch, **kwargs)
    for hook in hooks:
        hook.remove()
    return [each[0] for each in found] + [found[-1][1]]


# -- angular distance --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_run_whose_ends_differ_least_is_skipped(seed, count):
    model, program = transformer(seed)
    data = labelled(seed)
    decision = decide(program, data, criterion="angular", count=count)
    wanted = torch.zeros(6 - count, dtype=torch.float64)
    for batch, _ in data:
        found = states(model, batch)
        for start in range(6 - count):
            a, b = (found[place][:, -1].double() for place in (start, start + count))
            wanted[start] += torch.arccos(torch.cosine_similarity(a, b)).sum() / math.pi / 8
    start = int(wanted.argmin())
    assert skipped(decision) == list(range(start, start + count))
    scores = [block.score for block in decision.blocks if block.score is not None]
    assert scores == pytest.approx(wanted.tolist(), abs=1e-9)


def test_the_last_token_is_no_padding():
    model = seeded(lambda: Transformer(width=16, depth=3, heads=2))
    (batch, _), *_ = data = labelled(masked=True)
    names = {key: {0: "batch", 1: "seq"} for key in batch}
    program = capture(model, (), batch, dynamic=names, verify=False)
    decision = decide(program, data, criterion="angular", count=1)
    total = 0.0
    for each, _ in data:
        found = states(model, (), **each)
        last = each["attention_mask"].sum(1) - 1
        a, b = (found[place][torch.arange(4), last].double() for place in (0, 1))
        total += float(torch.arccos(torch.cosine_similarity(a, b)).sum() / math.pi / 8)
    assert decision.blocks[0].score == pytest.approx(total, abs=1e-9)


def test_equal_states_are_at_distance_0_and_no_nan():
    model, _ = transformer()
    with torch.no_grad():
        for linear in (model.layers[2].out, model.layers[2].down):
            linear.weight.zero_()
            linear.bias.zero_()
    program = capture(model, token_batches(1)[0])
    decision = decide(program, labelled(), criterion="angular", count=1)
    assert skipped(decision) == [2]
    assert decision.blocks[2].score == pytest.approx(0.0, abs=1e-7)


def test_a_run_does_not_cross_a_block_that_stays():
    program = captured(ResNet, 2, 3, 16, 16)
    data = image_batches(2)
    decision = decide(program, [(batch, None) for batch in data], criterion="angular", count=2)
    # layer2.0 changes the type, so that layer1.1 and layer2.1 are no run.
    assert [b.path for b in decision.blocks if b.skip] == ["layer1.0", "layer1.1"]
    with pytest.raises(UsageError, match="no run of blocks is long enough") as error:
        decide(program, [(batch, None) for batch in data], criterion="angular", count=3)
    assert "has 2" in error.value.reason


# -- gradients and metrics ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_taylor_is_the_derivative_of_a_gate(seed):
    model, program = transformer(seed, depth=3)
    data = labelled(seed)
    decision = decide(program, data, criterion="taylor", count=1)
    gates = [torch.ones((), requires_grad=True) for _ in model.layers]
    for gate, layer in zip(gates, model.layers, strict=True):
        layer.register_forward_hook(
            lambda _, args, out, gate=gate: args[0] + gate * (out - args[0])
        )
    wanted = [0.0] * 3
    for (ids,), target in data:
        for index in range(4):
            loss = F.cross_entropy(model(ids[index : index + 1]), target[index : index + 1])
            gradients = torch.autograd.grad(loss, gates)
            wanted = [w + abs(float(g)) / 8 for w, g in zip(wanted, gradients, strict=True)]
    assert [block.score for block in decision.blocks] == pytest.approx(wanted, rel=1e-4)


def test_the_metric_without_each_block():
    model, program = transformer(depth=3)
    data = labelled()
    context = Context(data={"calibration": data}, metric=Metric("accuracy", accuracy))
    decision = decide(program, data, context, criterion="metric", count=1)

    def measured(net):
        with torch.no_grad():
            hits = [(net(*batch).argmax(-1) == target).float() for batch, target in data]
        return float(torch.cat(hits).mean())

    whole = measured(model)
    layers = list(model.layers)
    for block in decision.blocks:
        model.layers = nn.ModuleList(layers[: block.index] + layers[block.index + 1 :])
        assert block.score == pytest.approx(whole - measured(model), abs=1e-6)
    with pytest.raises(DataError, match="no metric to rank blocks by"):
        decide(program, data, criterion="metric", count=1)


def test_chance_is_drawn_by_the_seed():
    _, program = transformer()
    found = {
        tuple(skipped(apply(SkipBlocks, program, {"criterion": "random", "count": 2},
                            Context(seed=seed)).decision))
        for seed in range(8)
    }  # fmt: skip
    assert len(found) > 2
    assert all(len(each) == 2 for each in found)


# -- how many ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["block_influence", "angular", "taylor"])
@pytest.mark.parametrize("name", ["parameters", "macs"])
def test_a_budget_takes_as_few_blocks_as_it_must(criterion, name):
    _, program = transformer()
    before = getattr(cost(program), name)
    context = Context(data={"calibration": labelled()})
    options = {"criterion": criterion, "budget": {name: "70%"}, "calibration": 8}
    result = apply(SkipBlocks, program, options, context)
    count = len(skipped(result.decision))
    assert getattr(cost(result.program), name) <= 0.7 * before
    fewer = apply(SkipBlocks, program, {"layers": list(range(count - 1))})
    assert getattr(cost(fewer.program), name) > 0.7 * before


def test_a_budget_that_cannot_be_met_says_what_can():
    _, program = transformer()
    with pytest.raises(UsageError, match="5% of parameters cannot be met") as error:
        decide(program, labelled(), budget={"parameters": "5%"})
    least = int(error.value.hint.split()[-1])
    assert len(skipped(decide(program, labelled(), budget={"parameters": least}))) == 5


@pytest.mark.parametrize("criterion", ["block_influence", "taylor"])
def test_ranking_again_measures_the_model_that_is_left(criterion):
    _, program = transformer()
    data = labelled()
    decision = decide(program, data, criterion=criterion, count=2, iterative=True)
    first = decide(program, data, criterion=criterion, count=1)
    (gone,) = skipped(first)
    rest = apply(SkipBlocks, program, {"layers": [gone]}).program
    second = decide(rest, data, criterion=criterion, count=1)
    (path,) = [block.path for block in second.blocks if block.skip]
    paths = [block.path for block in decision.blocks if block.skip]
    assert sorted(paths) == sorted([first.blocks[gone].path, path])


def test_bad_criteria():
    for criterion in ("angular", "random"):
        with pytest.raises(ValueError, match="ranks once"):
            SkipBlocks.Options(count=1, criterion=criterion, iterative=True)
    with pytest.raises(ValueError, match="exactly one of layers, count, ratio and budget"):
        SkipBlocks.Options(count=1, ratio=0.5)
    model, _ = transformer(depth=2)
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    program = capture(model, token_batches(1)[0], verify=False)
    for criterion in ("angular", "taylor"):
        with pytest.raises(NumericsError, match=r"NaN or an infinity .* layers\.0"):
            decide(program, labelled(), criterion=criterion, count=1)
