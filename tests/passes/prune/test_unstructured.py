"""`prune.unstructured`: which entries go, what is planned and replayed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune.unstructured import Unstructured
from tests.passes.models import token_batches
from tests.passes.prune.sparse import (
    CRITERIA,
    MODELS,
    density,
    model,
    pruned,
    resnet,
    squared_error,
    transformer,
)
from tests.passes.support import apply, captured, seeded, text_of


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_layer_loses_its_share(name, criterion):
    build, data, example = MODELS[name]
    program = build()
    result = pruned(Unstructured, program, {"ratio": 0.5, "criterion": criterion}, data())
    state = result.program.state()
    assert len(result.decision.weights) >= 8
    for weight in result.decision.weights:
        groups, out, *columns = weight.form.matrices(state[weight.tensor]).shape
        columns = torch.Size(columns).numel()
        share = {
            "magnitude": groups * out * columns // 2,
            "wanda": groups * out * (columns // 2),
            "sparsegpt": groups * (out * columns // 2),
        }[criterion]
        assert weight.zeros == share
        # Of an expert that few tokens reach, more may vanish in float32.
        assert density(result.program, weight.tensor) == weight.entries - share
    assert result.decision.sparsity == pytest.approx(0.5, abs=0.01)
    x = example()
    silence = float(program(x).detach().square().sum())
    assert 0 < squared_error(program, result.program, x) < silence


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_the_smallest_go_and_counts_are_exact(out, into, ratio, seed, ties):
    values = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    layer = nn.Linear(into, out)
    layer.weight = nn.Parameter(values.round() + 0.5 if ties else values)
    program = capture(nn.Sequential(layer), (torch.ones(2, into),))
    count = int(ratio * out * into + 1e-9)
    if count == 0:
        with pytest.raises(UsageError, match="there is no weight to prune"):
            apply(Unstructured, program, {"ratio": ratio})
        return
    after = apply(Unstructured, program, {"ratio": ratio}).program.state()["0.weight"].detach()
    before = program.state()["0.weight"].detach()
    gone = after == 0
    assert int(gone.sum()) == count
    assert torch.equal(after[~gone], before[~gone])
    assert float(before[gone].abs().max()) <= float(before[~gone].abs().min())


def test_a_global_ranking_takes_more_from_layers_of_small_weights():
    def build():
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with torch.no_grad():
            layers[0].weight.mul_(0.5)
        return layers

    program = captured(build, 2, 8)
    result = apply(Unstructured, program, {"ratio": 0.5, "scope": "global"})
    small, large = (density(result.program, f"{i}.weight") for i in range(2))
    assert small + large == 64
    assert small < 24 < large
    weights = torch.cat([program.state()[f"{i}.weight"].abs().flatten() for i in range(2)])
    limit = weights.sort().values[64]
    assert large == int((program.state()["1.weight"].abs() >= limit).sum())


def test_a_threshold_is_of_magnitudes():
    program = captured(lambda: nn.Sequential(nn.Linear(8, 8)), 2, 8)
    result = apply(Unstructured, program, {"threshold": 0.1})
    weight = program.state()["0.weight"]
    expected = torch.where(weight.abs() < 0.1, 0.0, weight)
    assert torch.equal(result.program.state()["0.weight"], expected)


def test_wanda_is_the_product_with_the_norm_ranked_within_outputs():
    program = captured(lambda: nn.Sequential(nn.Linear(6, 4)), 2, 6)
    batches = [(torch.randn(8, 5, 6) * torch.arange(6),) for _ in range(2)]
    context = Context(data={"calibration": batches})
    program = capture(seeded(lambda: nn.Sequential(nn.Linear(6, 4))), batches[0])
    options = {"ratio": 0.5, "criterion": "wanda", "calibration": 16}
    after = apply(Unstructured, program, options, context).program.state()["0.weight"]
    weight = program.state()["0.weight"]
    scores = weight.abs() * torch.cat([x for (x,) in batches]).flatten(0, 1).norm(dim=0)
    for row, score in zip(after, scores, strict=True):
        assert set((row != 0).nonzero().flatten().tolist()) == set(score.topk(3).indices.tolist())


@pytest.mark.parametrize("seed", range(2))
def test_sparsegpt_is_nearest_in_the_layers_of_a_transformer(seed):
    program = transformer(seed)
    batches = token_batches(4, 8, seed=seed)
    for target in ("layers.0.qkv", "layers.2.down"):
        taps = {}
        for criterion in CRITERIA:
            options = {"ratio": 0.6, "criterion": criterion, "targets": [target]}
            after = pruned(Unstructured, program, options, Context(data={"calibration": batches}))
            taps[criterion] = sum(_error_at(program, after.program, target, x) for (x,) in batches)
        assert taps["sparsegpt"] < 0.8 * min(taps["wanda"], taps["magnitude"])


def _error_at(program, other, path, x):
    seen = []
    for each in (program, other):
        handle = each.module.get_submodule(path).register_forward_hook(
            lambda _module, _args, output: seen.append(output)
        )
        with torch.no_grad():
            each(x)
        handle.remove()
    return float((seen[0] - seen[1]).square().sum())


def test_later_layers_are_pruned_on_what_the_pruned_ones_give():
    """One layer at a time, by hand, gives the same weights as all at once."""
    program, context = transformer(), MODELS["transformer"][1]()
    names = [w.layers[0] for w in pruned(Unstructured, program, {"ratio": 0.5}).decision.weights]
    options = {"ratio": 0.5, "criterion": "sparsegpt"}
    at_once = pruned(Unstructured, program, options, context).program
    for name in names:
        program = pruned(Unstructured, program, {**options, "targets": [name]}, context).program
    for name, tensor in at_once.state().items():
        assert torch.equal(program.state()[name], tensor), name


def test_an_addmm_later_on_also_sees_pruned_layers():
    program, context = model("addmm"), MODELS["addmm"][1]()
    options = {"ratio": 0.5, "criterion": "sparsegpt"}
    result = pruned(Unstructured, program, options, context)
    one_by_one = program
    for weight in result.decision.weights:
        targets = {"targets": list(weight.layers)}
        one_by_one = pruned(Unstructured, one_by_one, {**options, **targets}, context).program
    for name, tensor in result.program.state().items():
        assert torch.equal(one_by_one.state()[name], tensor), name


def test_only_criteria_of_data_read_a_split():
    for criterion in CRITERIA:
        options = Unstructured.Options(ratio=0.5, criterion=criterion)
        expected = set() if criterion == "magnitude" else {"calibration"}
        assert Unstructured().reads(options) == expected


def test_untouched_weights_are_the_same_tensors():
    result = apply(Unstructured, resnet(), {"ratio": 0.5, "types": ["linear"]})
    before, after = result.before.state(), result.program.state()
    assert [name for name in before if after[name] is not before[name]] == ["head.weight"]
    assert result.kinds() == {"set-tensor": 1}
    assert result.reasons()["stem.0"] == "it is not selected"


def test_the_zeros_of_a_decision_are_replayed_to_the_bit():
    for criterion in CRITERIA:
        options = {"ratio": 0.5, "criterion": criterion}
        first = pruned(Unstructured, resnet(), options)
        second = pruned(Unstructured, resnet(), options)
        assert first.program.fingerprint() == second.program.fingerprint()
        assert first.decision.arrays.keys() == second.decision.arrays.keys()
        kinds = {name.rpartition(".")[2] for name in first.decision.arrays}
        assert kinds == ({"zeros", "kept"} if criterion == "sparsegpt" else {"zeros"})
        bits = sum(a.numel() for n, a in first.decision.arrays.items() if n.endswith("zeros"))
        assert bits <= sum(-(-w.entries // 8) for w in first.decision.weights)


def test_a_plan_names_what_only_data_can_tell():
    program = resnet()
    planned = apply(
        Unstructured, program, {"ratio": 0.5, "criterion": "wanda", "mode": "keep"},
        Context(planning=True),
    )  # fmt: skip
    assert "head.weight: zeros known after calibration (128 samples)" in planned.decision.pending
    done = pruned(Unstructured, program, {"ratio": 0.5, "criterion": "wanda", "mode": "keep"})
    assert text_of(planned.program) == text_of(done.program)
    by_weights = apply(Unstructured, program, {"ratio": 0.5}, Context(planning=True))
    assert by_weights.decision.pending == ()


@pytest.mark.parametrize("mode", ["burn", "keep"])
def test_plans_on_meta_weights(mode):
    with torch.device("meta"):
        built = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    program = capture(built, (torch.empty(2, 4, 8, 8, device="meta"),))
    options = {"ratio": 0.5, "mode": mode}
    planned = apply(Unstructured, program, options, Context(planning=True))
    assert "0.weight: zeros known once the weights have values" in planned.decision.pending
    assert planned.ops().count("mask") == (2 if mode == "keep" else 0)
