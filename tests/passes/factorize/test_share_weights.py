"""factorize.share_weights: exact with few values, codebooks that train, and how they are stored."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.emit import emit
from fxcompress.errors import NumericsError, SelectorError, UsageError
from fxcompress.ir import Program, capture
from fxcompress.nn import Codebook
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.factorize._codebooks.kmeans import cluster
from passes.factorize.share_weights import ShareWeights
from passes.prune.unstructured import Unstructured
from tests.passes.factorize.adapted import MODELS
from tests.passes.support import apply, relative_error, seeded


class Few(nn.Module):
    """Layers of all kinds whose weights have few distinct values, in each row or in all."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.back = nn.ConvTranspose1d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 20)
        values = torch.randn(12)
        for layer in (self.embed, self.conv, self.back, self.head):
            shape = layer.weight.shape
            layer.weight.data.copy_(values[torch.randint(0, 12, shape)])

    def forward(self, ids):
        x = torch.relu(self.conv(self.embed(ids).transpose(1, 2)))
        return self.head(torch.tanh(self.back(x)).mean(2))


IDS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


@cache
def few():
    return capture(seeded(Few), (IDS,))


OPTIONS = {"entries": 12, "embeddings": True}


@pytest.mark.parametrize("more", [{}, {"entries": 16}, {"rows": 5}], ids=str)
@pytest.mark.parametrize("init", ["linear", "density", "between", "best"])
def test_few_values_are_kept_exactly(more, init):
    result = apply(ShareWeights, few(), OPTIONS | more | {"init": init})
    assert len(result.decision.weights) == 4
    assert all(each.error == 0 for each in result.decision.weights)
    assert relative_error(few(), result.program, IDS) == 0


def test_gradients_are_the_sums_over_members():
    result = apply(ShareWeights, few(), OPTIONS | {"rows": 5})
    weights = [e for e in result.decision.weights if e.tensor in ("conv.weight", "back.weight")]
    models = few().copy().module, result.program.module
    for module in models:
        module(IDS).square().sum().backward()
    dense = dict(models[0].named_parameters())
    for entry in weights:
        book = models[1].get_submodule(entry.path)
        gradient = dense[entry.tensor].grad
        members = book.indices(dense[entry.tensor].detach()).movedim(entry.axis, 0)
        wanted = torch.zeros_like(book.codebook)
        for row, (ids, values) in enumerate(
            zip(members, gradient.movedim(entry.axis, 0), strict=True)
        ):
            wanted[row // entry.rows].scatter_add_(0, ids.flatten().long(), values.flatten())
        torch.testing.assert_close(book.codebook.grad, wanted, rtol=1e-4, atol=1e-6)
        assert not dict(models[1].named_parameters())[entry.tensor].requires_grad


def test_membership_stays_while_values_train():
    book = Codebook(3).fit(torch.tensor([[-1.0, 0.0, 2.0]]))
    x = torch.tensor([-1.0, 2.0, 2.0, 0.0])
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[5.0, 7.0, -3.0]]))
    # That of exactly 0 stays 0.
    assert book(x).tolist() == [5.0, -3.0, -3.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_no_value_can_move_to_gain(seed):
    torch.manual_seed(seed)
    numbers = torch.randn(2, 500)
    found = {
        start: cluster(numbers, 8, start, 500, zero=False)
        for start in ("linear", "density", "between", "best")
    }
    for centres in found.values():
        for row, values in zip(numbers.double(), centres, strict=True):
            nearest = (row.unsqueeze(1) - values).abs().argmin(1)
            means = torch.stack([row[nearest == k].mean() for k in range(8)])
            torch.testing.assert_close(values, means)
    lost = {
        start: (numbers.double().unsqueeze(2) - centres.unsqueeze(1)).square().amin(2).sum(1)
        for start, centres in found.items()
    }
    least = torch.stack([lost[start] for start in ("linear", "density", "between")]).amin(0)
    assert torch.allclose(lost["best"], least)


def test_zeros_stay_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight.data[torch.rand(32, 64) < 0.5] = 0
    program = capture(nn.Sequential(layer), (torch.randn(2, 64),))
    kept = apply(ShareWeights, program, {"entries": 8})
    (entry,) = kept.decision.weights
    assert entry.zeros == 1
    made = kept.program.state()["0.weight"]
    assert bool((made[layer.weight == 0] == 0).all())
    free = apply(ShareWeights, program, {"entries": 8, "zeros": "free"})
    assert free.decision.weights[0].zeros == 0
    assert "stays 0" in kept.decision.summary()[1]


def test_what_it_costs_and_how_it_is_stored(tmp_path):
    program, _ = MODELS["transformer"](0)
    result = apply(ShareWeights, program, {"entries": 6, "rows": 8, "embeddings": True})
    saved = cost(program).bytes - cost(result.program).bytes
    elements = sum(each.elements for each in result.decision.weights)
    tables = sum(each.groups * each.entries for each in result.decision.weights)
    # 3 bits in place of 32; anchors and values of each codebook.
    assert saved == elements * 29 // 8 - 8 * tables
    with torch.no_grad():
        for entry in result.decision.weights:
            # Trained values, which are no anchors any more.
            result.program.module.get_submodule(entry.path).codebook.mul_(1.1)
    result.program.save(tmp_path / "shared")
    again = Program.load(tmp_path / "shared")
    assert again.fingerprint() == result.program.fingerprint()
    emitted = emit(result.program, tmp_path, ["python"])[0]
    assert "packed in bytes" in emitted.notes[-1]
    source = (tmp_path / "model.py").read_text()
    assert "class CodebookWeight" in source
    weights = (tmp_path / "weights.safetensors").stat().st_size
    assert weights < 0.5 * cost(program).bytes


def test_onnx_stores_a_byte_each(tmp_path):
    onnx = pytest.importorskip("onnx")
    program, _ = MODELS["resnet"](0)
    result = apply(ShareWeights, program, {"entries": 16, "rows": 8})
    emit(result.program, tmp_path, ["onnx"])
    model = onnx.load(tmp_path / "model.onnx")
    stored = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    assert sum(torch.Size(t.dims).numel() for t in stored) == sum(
        each.elements for each in result.decision.weights
    )
    ops = {node.op_type for node in model.graph.node}
    assert "Gather" in ops
    assert "DequantizeLinear" not in ops


def test_the_pass_keeps_what_every_pass_owes():
    result = check_pass(ShareWeights, few(), OPTIONS, idempotent=False)
    assert "codebook(%" in result.graph


def test_what_stays_and_why():
    result = apply(ShareWeights, few(), {"entries": 256, "embeddings": True})
    assert result.reasons()["head"] == (
        "its 320 weights take 1,280 bytes, and shared in 1 codebooks 1,344"
    )
    again = apply(ShareWeights, few(), {"entries": 16})
    with pytest.raises(UsageError, match="no weight whose values can be shared") as error:
        apply(ShareWeights, again.program, {"entries": 16})
    assert "quantised already" in error.value.reason


def test_what_would_not_survive_a_codebook_is_declined():
    masked = apply(Unstructured, few(), {"ratio": 0.5, "mode": "keep", "targets": ["head"]})
    result = apply(ShareWeights, masked.program, OPTIONS)
    assert result.reasons()["head"] == "its weight has a mask: burn it in first"
    # A weight that is set to 0 would be read as the entry next to it.
    shared = apply(ShareWeights, few(), {"entries": 12, "targets": ["head"]}).program
    pruned = apply(Unstructured, shared, {"ratio": 0.5})
    assert pruned.reasons()["head"] == "its weight is computed in the graph"
    assert torch.equal(pruned.program.state()["head.weight"], shared.state()["head.weight"])


def test_a_plan_needs_no_weights():
    model = Few().to("meta")
    program = capture(model, (IDS.to("meta"),), verify=False)
    planned = apply(ShareWeights, program, OPTIONS, Context(planning=True))
    done = apply(ShareWeights, few(), OPTIONS)
    assert planned.decision.summary() == done.decision.summary()
    assert cost(planned.program).bytes == cost(done.program).bytes


def test_errors():
    with pytest.raises(SelectorError, match="`nothing` in `by_layer` matches no selected layer"):
        apply(ShareWeights, few(), {"by_layer": {"nothing": 4}})
    model = seeded(Few)
    model.head.weight.data[0, 0] = float("inf")
    bad = capture(model, (IDS,), verify=False)
    with pytest.raises(NumericsError, match=r"infinity in head\.weight"):
        apply(ShareWeights, bad)
    with pytest.raises(ValueError, match="less than or equal to 256"):
        ShareWeights.Options.model_validate({"entries": 300})
    with pytest.raises(UsageError, match="a codebook of 1 entries"):
        Codebook(1)
    with pytest.raises(UsageError, match="3 codebooks without an axis"):
        Codebook(4, groups=3)
