"""Which weights `prune.unstructured` finds: layers, addmm, experts, shared and free ones."""

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from passes.prune.unstructured import Unstructured
from tests.passes.prune.sparse import (
    CRITERIA,
    MODELS,
    Products,
    density,
    model,
    pruned,
    resnet,
)
from tests.passes.support import apply, seeded


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


def test_half_precision_weights_are_pruned_in_their_own_type():
    program = capture(seeded(lambda: nn.Linear(16, 8).to(torch.bfloat16)),
                      (torch.randn(8, 16, dtype=torch.bfloat16),))  # fmt: skip
    batch = torch.randn(8, 16).to(torch.bfloat16)
    for criterion in CRITERIA:
        options = {"ratio": 0.5, "criterion": criterion, "calibration": 8}
        result = apply(Unstructured, program, options, Context(data={"calibration": [(batch,)]}))
        assert result.program.state()["weight"].dtype == torch.bfloat16
        assert density(result.program, "weight") == 64


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
