"""Masks from pruning to burning in: training, quantisation, other passes, emission."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import fxcompress as fxc
from fxcompress.analysis import cost
from fxcompress.axes import analyze
from fxcompress.emit import emit
from fxcompress.errors import PassError
from fxcompress.ir import capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.shrink import shrink
from fxcompress.testing import check_pass
from fxcompress.train.metrics import BUILT_IN
from passes.prune._sparsity.masks import pack, unpack
from passes.prune.burn_in import BurnIn
from passes.prune.n_m import NM
from passes.prune.unstructured import Unstructured
from passes.quantize.static import Static
from passes.tidy.cast import Cast
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import image_batches
from tests.passes.prune.sparse import CRITERIA, MODELS, density, images, pruned, resnet, transformer
from tests.passes.support import apply, random_input, seeded, text_of


@pytest.mark.parametrize("pass_", [Unstructured, NM])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_burned_in_and_kept_give_the_same_bits(pass_, name, criterion):
    build, data, example = MODELS[name]
    options = {"criterion": criterion, **({"ratio": 0.6} if pass_ is Unstructured else {})}
    program, x = build(), example()
    burned = pruned(pass_, program, options, data()).program
    kept = pruned(pass_, program, {**options, "mode": "keep"}, data())
    assert torch.equal(kept.program(x), burned(x))
    assert set(program.state()) < set(kept.program.state())
    later = apply(BurnIn, kept.program).program
    assert later.fingerprint() == burned.fingerprint()
    assert type(module_of(next(n for n in later.nodes if op_name(n) == "linear"))) is nn.Linear


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_bits_come_back(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) > 0.5
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-size // 8)
    assert torch.equal(unpack(bits, mask.shape), mask)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
    ],
)
def test_masks_hold_through_training(optimizer):
    kept = pruned(Unstructured, resnet(), {"ratio": 0.8, "mode": "keep"})
    masks = {w.tensor: ~kept.program.state()[f"{w.mask}.mask"] for w in kept.decision.weights}
    program = kept.program.copy()
    for module in program.module.modules():  # the copy shares its tensors
        for key, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[key] = nn.Parameter(tensor.detach().clone())
    module = program.module.train()
    step = optimizer(module.parameters())
    x, target = random_input(32, 3, 16, 16), random_input(32, 10)
    losses = []
    for _ in range(8):
        step.zero_grad()
        loss = nn.functional.mse_loss(module(x), target)
        loss.backward()
        for tensor, zeros in masks.items():
            assert not bool(module.get_parameter(tensor).grad[zeros].any())
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for tensor, zeros in masks.items():
        trained = module.get_parameter(tensor).detach()
        assert not bool(trained[zeros].any())
        assert not torch.equal(trained, kept.program.state()[tensor])


@pytest.mark.parametrize("pass_", [Unstructured, NM])
def test_quantisers_stand_behind_masks(pass_):
    options = {"ratio": 0.5} if pass_ is Unstructured else {}
    folded = apply(FoldBatchNorm, resnet()).program
    int8 = {"calibration": 32}
    kept = apply(pass_, folded, {**options, "mode": "keep"})
    quantised = apply(Static, kept.program, int8, images())
    lines = text_of(quantised.program)
    assert "head_weight_fq = fake_quant(head_weight_mask)" in lines
    assert next(n for n in lines if n.startswith("head = ")).endswith(", head_weight_fq)")
    burned = apply(Static, apply(pass_, folded, options).program, int8, images())
    x = random_input(4, 3, 16, 16)
    assert torch.equal(quantised.program(x), burned.program(x))
    later = apply(BurnIn, quantised.program).program
    assert later.fingerprint() == burned.program.fingerprint()
    weights = sum(entry.entries for entry in kept.decision.weights)
    stored = cost(quantised.program).summary().bytes - cost(burned.program).summary().bytes
    assert stored == weights  # a byte for each boolean, and integers for the weights in both


@pytest.mark.parametrize("mode", ["burn", "keep"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_quantised_weights_are_pruned_before_their_quantisers(mode, criterion):
    folded = apply(FoldBatchNorm, resnet()).program
    quantised = apply(Static, folded, {"calibration": 32}, images()).program
    result = pruned(NM, quantised, {"mode": mode, "criterion": criterion})
    assert len(result.decision.weights) == 10
    if mode == "keep":
        assert "head_weight_fq = fake_quant(head_weight_mask)" in text_of(result.program)
    x = random_input(8, 3, 16, 16)
    seen = []
    for node in result.program.nodes:
        if op_name(node) == "fake_quant" and str(node.target) == "head_weight_fq":
            quantizer = result.program.module.get_submodule(str(node.target))
            seen.append(quantizer(result.program.state()["head.weight"].detach()))
    assert int(seen[0].count_nonzero()) <= 80
    assert bool(result.program(x).isfinite().all())


@pytest.mark.parametrize("build", [resnet, transformer])
def test_masks_shrink_with_their_weights(build):
    kept = apply(Unstructured, build(), {"ratio": 0.5, "mode": "keep"}).program
    burned = apply(BurnIn, kept).program
    outputs = []
    x = random_input(2, 3, 16, 16) if build is resnet else torch.arange(24).reshape(2, 12)
    for program in (kept, burned):
        analysis = analyze(program)
        keep = {
            axis: torch.arange(0, axis.size, 2).numpy()
            for axis in analysis.axes
            if axis.kind in ("channel", "neuron", "residual")
        }
        assert keep
        rewriter = GraphRewriter(program)
        shrink(rewriter, analysis, keep)
        shrunk = rewriter.finish()
        shrunk.verify()
        outputs.append(shrunk(x))
    assert torch.equal(*outputs)


def test_pruning_again_under_masks_prunes_more_and_never_less():
    kept = pruned(Unstructured, resnet(), {"ratio": 0.5, "mode": "keep"}).program
    more = pruned(Unstructured, kept, {"ratio": 0.75, "mode": "keep"})
    assert [w.masked for w in more.decision.weights] == [True] * 11
    assert set(more.kinds()) == {"set-tensor"}
    for weight in more.decision.weights:
        was, now = (p.state()[f"{weight.mask}.mask"] for p in (kept, more.program))
        assert not bool((now & ~was).any())
        assert weight.zeros == weight.entries * 3 // 4
    options = {"ratio": 0.25, "mode": "keep", "criterion": "wanda"}
    with pytest.raises(fxc.errors.UsageError) as caught:
        pruned(Unstructured, kept, options)
    assert "it is as sparse already" in caught.value.reason
    burned = pruned(Unstructured, kept, {"ratio": 0.75}).program
    assert "mask" not in [op_name(n) for n in burned.nodes]
    assert torch.equal(burned(random_input(2, 3, 16, 16)), more.program(random_input(2, 3, 16, 16)))


def test_burning_in_is_exact_and_needs_masks():
    kept = pruned(NM, resnet(), {"mode": "keep"}).program
    result = check_pass(BurnIn, kept, tolerance=0.0)
    assert len(result.decision.masks) == 10
    assert all(2 * mask.zeros == mask.entries for mask in result.decision.masks)
    with pytest.raises(PassError, match="burn_in changes nothing"):
        fxc.compress(resnet(), [fxc.passes.prune.burn_in()])


def test_a_cast_leaves_masks_as_they_are():
    kept = pruned(NM, transformer(), {"mode": "keep"}).program
    half = apply(Cast, kept, {"dtype": "bfloat16"}).program
    burned = apply(BurnIn, half).program
    x = torch.arange(24).reshape(2, 12)
    assert torch.equal(half(x), burned(x))
    assert burned.state()["layers.0.up.weight"].dtype == torch.bfloat16
    assert density(burned, "layers.0.up.weight") == 32 * 128 // 2


def test_a_pipeline_locks_and_replays_zeros():
    program = resnet()
    data = {"calibration": image_batches(4, 8)}
    steps = [
        fxc.passes.prune.unstructured(ratio=0.3, criterion="sparsegpt", calibration=32),
        fxc.passes.prune.n_m(mode="keep", permute=True, escapes=0),
        fxc.passes.prune.burn_in(),
    ]
    first = fxc.compress(program, steps, data=data)
    assert [each.proof.grade for each in first.record.passes] == ["measured", "measured", "equal"]
    assert first.record.passes[2].proof.error == 0.0
    again = fxc.compress(program, steps, lock=first.lock)
    assert again.program.fingerprint() == first.program.fingerprint()
    assert not first.plan.steps[0].settled


def test_what_is_emitted_has_no_masks(tmp_path):
    kept = pruned(NM, resnet(), {"mode": "keep"}).program
    names = ("pt2", "onnx", "python")
    for artifact in emit(kept, tmp_path, formats=names):
        assert artifact.comparison.relative < 1e-5
    assert "Mask" not in (tmp_path / "model.py").read_text()


class Digits(nn.Module):
    """Two convolutions and a classifier for 8 x 8 digits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, padding=1)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


def digits():
    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1)[order]
    classes = torch.tensor(raw.target)[order]

    def cut(low, high):
        pairs = zip(images[low:high].split(64), classes[low:high].split(64), strict=True)
        return [((x,), y) for x, y in pairs]

    return {"train": cut(0, 1200), "calibration": cut(0, 128), "eval": cut(1200, 1797)}


def test_training_recovers_what_pruning_lost_and_the_zeros_stay():
    program = capture(seeded(Digits), (torch.zeros(2, 1, 8, 8),))
    adam = {"use": "Adam", "lr": 3e-3}
    steps = [
        fxc.passes.train.fit(id="train", epochs=4, optimizer=adam),
        fxc.passes.prune.unstructured(ratio=0.9, mode="keep"),
        fxc.passes.train.fit(id="heal", epochs=4, optimizer=adam),
        fxc.passes.prune.burn_in(),
        fxc.passes.quantize.static(calibration=128),
    ]
    result = fxc.compress(program, steps, data=digits(), metric=BUILT_IN["accuracy"])
    trained, pruned_, healed, burned, quantised = (p.metric for p in result.record.passes)
    assert trained > 0.85
    assert pruned_ < trained - 0.1
    assert healed > trained - 0.1
    assert burned == healed
    assert quantised > healed - 0.05
    for name, entries in (("conv2.weight", 16 * 16 * 9), ("fc.weight", 2560)):
        assert density(result.program, name) == entries - int(0.9 * entries)
