import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from passes.prune.unstructured import Unstructured
from tests.passes.models import image_batches, token_batches
from tests.passes.prune.sparse import (
    CRITERIA,
    MODELS,
    density,
    images,
    pruned,
    resnet,
    squared_error,
    transformer,
)
from tests.passes.support import apply, captured, random_input, seeded, text_of


@cache
def model(name):
    return MODELS[name][0]()


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


def test_conv1d_of_hugging_face_is_pruned_through_its_addmm():
    result = pruned(Unstructured, model("addmm"), {"ratio": 0.3}, MODELS["addmm"][1]())
    (entry,) = [w for w in result.decision.weights if w.tensor.endswith("h.0.attn.c_attn.weight")]
    assert entry.layers == ("model.transformer.h.0.attn.c_attn/addmm",)
    assert (entry.form.out, entry.form.input) == (1, 0)
    assert "also read by something that is no layer" in result.reasons()["model.lm_head"]


def test_stacked_experts_are_pruned_one_by_one():
    options = {"ratio": 0.5, "criterion": "wanda"}
    result = pruned(Unstructured, model("experts"), options, MODELS["experts"][1]())
    name = "model.model.layers.0.mlp.experts.gate_up_proj"
    weight = result.program.state()[name]
    assert weight.shape == (4, 32, 32)
    assert torch.equal((weight == 0).sum(-1), torch.full((4, 32), 16))


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


class Shared(nn.Module):
    """A layer that is called twice, one that shares its weight, and a tied embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.b.weight = self.a.weight
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.b(self.a(self.a(x).relu())))


@pytest.mark.parametrize("mode", ["burn", "keep"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_shared_weights_stay_shared(mode, criterion):
    ids = torch.arange(20).reshape(4, 5)
    program = capture(seeded(Shared), (ids,))
    context = Context(data={"calibration": [(ids,)]})
    options = {"ratio": 0.5, "criterion": criterion, "mode": mode, "calibration": 4}
    result = apply(Unstructured, program, options, context)
    assert result.program.ties == program.ties
    assert [w.layers for w in result.decision.weights] == [("a", "a@2", "b")]
    assert result.reasons() == {
        "head": "its weight embed.weight is also read by something that is no layer"
    }
    assert density(result.program, "b.weight") == 32
    with pytest.raises(UsageError) as caught:
        apply(Unstructured, program, {**options, "targets": ["a", "a@2"]}, context)
    assert "a.weight is also read by a layer that is not selected" in caught.value.reason


class Products(nn.Module):
    """Free weights in every product, one expert at a time and as a batch."""

    def __init__(self):
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(5, 6))
        self.experts, self.batch = (
            nn.Parameter(torch.randn(3, 4, 6)),
            nn.Parameter(torch.randn(3, 6, 4)),
        )
        self.free = nn.Parameter(torch.randn(4, 6))
        self.mixed = nn.Parameter(torch.randn(6, 6))
        self.parts = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        right = x @ self.right
        left = self.left @ x.transpose(1, 2)
        experts = sum(nn.functional.linear(x, self.experts[i]) for i in range(3))
        batch = x.unsqueeze(1) @ self.batch
        free = nn.functional.linear(x, self.free)
        mixed = torch.einsum("bnd,de->bne", x, self.mixed)
        mixed = mixed + x @ self.parts[:6]
        return right.sum(-1), left.sum(1), experts, batch, free, mixed


@pytest.mark.parametrize("mode", ["burn", "keep"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_free_weights_are_found_in_every_product(criterion, mode):
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))
    program = capture(seeded(Products), (x,))
    options = {"ratio": 0.5, "criterion": criterion, "mode": mode, "calibration": 8}
    result = apply(Unstructured, program, options, Context(data={"calibration": [(x,)]}))
    forms = {w.tensor: (w.form.stack, w.form.out, w.form.input) for w in result.decision.weights}
    assert forms == {
        "right": (None, 1, 0),
        "left": (None, 0, 1),
        "experts": (0, 1, 2),
        "batch": (0, 2, 1),
        "free": (None, 0, 1),
    }
    assert all(w.zeros == w.entries // 2 for w in result.decision.weights)
    assert result.reasons() == {
        "/einsum": "the weight of einsum has no form as a matrix that is known here",
        "/matmul@4": "its weight is computed in the graph",
    }


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_an_expert_that_no_token_reaches_keeps_its_largest_weights(criterion):
    program = model("experts")
    name = "model.model.layers.0.mlp.experts.down_proj"
    ids = torch.ones(1, 12, dtype=torch.int64)
    options = {"ratio": 0.5, "criterion": criterion, "calibration": 1, "block": 16}
    context = Context(data={"calibration": [(ids,)]})
    result = apply(Unstructured, program, options, context)
    before, after = (p.state()[name].detach() for p in (program, result.program))
    untouched = [e for e in range(4) if torch.equal(after[e], before[e] * (after[e] != 0))]
    # All tokens are alike: two of four experts are reached.
    assert len(untouched) == (4 if criterion == "wanda" else 2)
    whole = 0
    for expert in range(4):
        size = before[expert].abs().flatten()
        gone = (after[expert] == 0).flatten()
        rows = before[expert].abs(), after[expert] == 0
        by_row = all(r[~z].min() >= r[z].max() for r, z in zip(*rows, strict=True))
        whole += by_row if criterion == "wanda" else bool(size[~gone].min() >= size[gone].max())
    assert whole == 2


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


def test_half_precision_weights_are_pruned_in_their_own_type():
    program = capture(seeded(lambda: nn.Linear(16, 8).to(torch.bfloat16)),
                      (torch.randn(8, 16, dtype=torch.bfloat16),))  # fmt: skip
    batch = torch.randn(8, 16).to(torch.bfloat16)
    for criterion in CRITERIA:
        options = {"ratio": 0.5, "criterion": criterion, "calibration": 8}
        result = apply(Unstructured, program, options, Context(data={"calibration": [(batch,)]}))
        assert result.program.state()["weight"].dtype == torch.bfloat16
        assert density(result.program, "weight") == 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 100.0}, UsageError, r"every entry of stem\.0\.weight would become zero"),
        ({"threshold": 1e-12}, UsageError, "there is no weight to prune"),
        ({"ratio": 0.0001, "types": ["linear"]}, UsageError, "there is no weight to prune"),
        ({"ratio": 0.5, "targets": ["convs*"]}, SelectorError, "matches nothing"),
        ({"ratio": 0.5, "expect": 3}, SelectorError, "11 nodes are selected, 3 are expected"),
        ({"ratio": 0.5, "criterion": "wanda", "calibration": 99}, DataError, "holds 32 samples"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        apply(Unstructured, resnet(), options, images())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_criteria_of_data_need_data(criterion):
    with pytest.raises(DataError, match="there is no split calibration"):
        apply(Unstructured, resnet(), {"ratio": 0.5, "criterion": criterion})
    with pytest.raises(DataError):
        apply(Unstructured, resnet(), {"ratio": 0.5, "criterion": criterion},
              Context(data={"calibration": []}))  # fmt: skip


def test_pruning_as_much_again_finds_nothing_to_do():
    once = apply(Unstructured, resnet(), {"ratio": 0.5}).program
    with pytest.raises(UsageError) as caught:
        apply(Unstructured, once, {"ratio": 0.5})
    assert "stem.0: it is as sparse already" in caught.value.reason
    more = apply(Unstructured, once, {"ratio": 0.75}).program
    for name, tensor in once.state().items():
        if name.endswith("conv1.weight"):
            assert bool(((tensor != 0) | (more.state()[name] == 0)).all())
            assert density(more, name) == tensor.numel() // 4


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_name_the_weight(criterion, bad):
    def build():
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            layers[1].weight[0, 0] = bad
        return layers

    program = captured(build, 2, 4)
    context = Context(data={"calibration": [(random_input(4, 4),)]})
    options = {"ratio": 0.5, "criterion": criterion, "calibration": 4}
    with pytest.raises(NumericsError) as caught:
        apply(Unstructured, program, options, context)
    assert caught.value.where == "1.weight"


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_bad_data_names_the_weight_it_reaches(criterion):
    batches = image_batches(4, 8)
    batches[1][0][0, 0, 0, 0] = float("nan")
    options = {"ratio": 0.5, "criterion": criterion, "calibration": 32}
    with pytest.raises(NumericsError, match=r"in the inputs that stem\.0\.weight"):
        apply(Unstructured, resnet(), options, Context(data={"calibration": batches}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.5, "threshold": 0.1},
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": "0.5"},
        {"threshold": -1.0},
        {"threshold": 0.1, "criterion": "wanda"},
        {"threshold": 0.1, "scope": "global"},
        {"ratio": 0.5, "criterion": "sparsegpt", "scope": "row"},
        {"ratio": 0.5, "criterion": "l1"},
        {"ratio": 0.5, "damping": 0.0},
        {"ratio": 0.5, "mask": True},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        Unstructured.Options.model_validate_json(json.dumps(options))


def test_masks_are_named_beside_their_layers():
    result = apply(Unstructured, resnet(), {"ratio": 0.5, "mode": "keep"})
    masks = [str(n.target) for n in result.program.nodes if op_name(n) == "mask"]
    assert masks[:3] == ["stem_0_weight_mask", "layer1.0.conv1_weight_mask",
                         "layer1.0.conv2_weight_mask"]  # fmt: skip
    assert masks == [w.mask for w in result.decision.weights]
    kept = {name: t for name, t in result.program.state().items() if name.endswith(".mask")}
    assert len(kept) == 11
    layer = next(n for n in result.program.nodes if n.target == "head")
    assert type(module_of(layer)).__name__ == "OperandLinear"
