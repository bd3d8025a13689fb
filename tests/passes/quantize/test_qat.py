"""`quantize.qat`: quantizers that train, and batch norms trained as part of their layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.analysis import masked_difference
from fxcompress.axes import analyze
from fxcompress.errors import DataError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.rewrite.shrink import shrink
from passes.quantize.qat import Qat, QatOptions
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from passes.train.fit import Fit
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, relative_error, seeded, text_of

METHODS = ["ste", "lsq", "lsq_plus"]


class ConvNorm(nn.Module):
    """A convolution with a bias, its norm and clamp; then a linear layer with a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        return self.norm(self.fc(x.mean((2, 3))))


def trained_form(build, options=None, *, seed=0, shape=(3, 8, 8)):
    program = captured(build, 2, *shape, seed=seed)
    context = Context(data={"calibration": image_batches(2, 8, *shape, seed=seed)})
    return apply(Qat, program, {"calibration": 16, **(options or {})}, context)


def fakes(program):
    return {n: m for n, m in program.module.named_modules() if isinstance(m, FakeQuantize)}


def test_the_graph_of_a_layer_and_its_norm():
    result = trained_form(ConvNorm, {"method": "ste"})
    assert text_of(result.program)[:17] == [
        "x = input()",
        "x_fq = fake_quant(x)",
        "conv.weight = param()",
        "bn.running_var = buffer()",
        "/add = add(bn.running_var)",
        "/rsqrt = rsqrt(/add)",
        "bn.weight = param()",
        "/mul = mul(bn.weight, /rsqrt)",
        "/reshape = reshape(/mul)",
        "/mul@2 = mul(conv.weight, /reshape)",
        "conv_weight_fq = fake_quant(/mul@2)",
        "conv = conv2d(x_fq, conv_weight_fq)",
        "/reshape@2 = reshape(/mul)",
        "/div = div(conv, /reshape@2)",
        "bn = batch_norm(/div)",
        "/relu = relu(bn)",
        "relu_fq = fake_quant(/relu)",
    ]
    assert [(each.layer, each.norm) for each in result.decision.norms] == [
        ("conv", "bn"),
        ("fc", "norm"),
    ]


def test_a_step_of_a_channel_is_learned_on_the_weight_itself():
    result = trained_form(ConvNorm)
    lines = text_of(result.program)
    assert lines[9:12] == [
        "conv_weight_fq = fake_quant(conv.weight)",
        "/mul@2 = mul(conv_weight_fq, /reshape)",
        "conv = conv2d(x_fq, /mul@2)",
    ]
    ste = trained_form(ConvNorm, {"method": "ste"})
    x = random_input(4, 3, 8, 8)
    assert relative_error(ste.program.module, result.program.module, x) <= 1e-5
    # Statistics may move by any factor: the weight's levels stay those that are learned.
    module = result.program.copy().module
    with torch.no_grad():
        module.get_submodule("bn").running_var.mul_(25)
    levels = [m.get_submodule("conv_weight_fq").quantize(m.get_submodule("conv").weight)
              for m in (module, result.program.module)]  # fmt: skip
    assert torch.equal(*levels)
    assert levels[0].abs().amax() > 100


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("build", [ConvNorm, ResNet])
def test_folding_for_good_changes_nothing_and_gives_the_static_form(build, seed, method):
    trained = trained_form(build, {"method": method}, seed=seed)
    folded = apply(FoldBatchNorm, trained.program)
    x = random_input(4, 3, 8, 8, seed=seed + 5)
    assert relative_error(trained.program.module, folded.program.module, x) <= 1e-5
    first = apply(FoldBatchNorm, trained.before)
    context = Context(data={"calibration": image_batches(2, 8, 3, 8, 8, seed=seed)})
    options = {"calibration": 16, "weights": {"observer": "mse"}}
    static = apply(Static, first.program, options, context)
    assert text_of(folded.program) == text_of(static.program)
    before, after = fakes(static.program), fakes(folded.program)
    for name, quantizer in before.items():
        assert torch.allclose(quantizer.scale, after[name].scale, rtol=1e-3), name


def test_training_computes_what_the_paper_says():
    result = trained_form(ConvNorm, {"method": "ste", "weights": {"bits": 4}})
    module = result.program.copy().module.train()
    before = captured(ConvNorm, 2, 3, 8, 8).module
    x = random_input(8, 3, 8, 8)
    conv, bn = before.get_submodule("conv"), before.get_submodule("bn")
    s = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    scaled = conv.weight * s[:, None, None, None]
    step = scaled.abs().amax((1, 2, 3), keepdim=True) / 7
    rounded = (scaled / step).round().clamp(-7, 7) * step
    read = module.get_submodule("x_fq")(x)
    y = F.conv2d(read, rounded, padding=1) / s[:, None, None]
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    y = (y - mean[:, None, None]) * torch.rsqrt(variance + bn.eps)[:, None, None]
    wanted = (y * bn.weight[:, None, None] + bn.bias[:, None, None]).relu()
    seen = []
    module.get_submodule("relu_fq").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x)
    wanted, seen = wanted.detach(), [each.detach() for each in seen]
    # The input's quantizer followed the batch before it rounded, so read it again as it was then.
    assert relative_error(lambda: wanted, lambda: seen[0]) <= 0.02


def test_a_bias_goes_into_the_running_mean():
    result = trained_form(ConvNorm)
    before, after = result.before.state(), result.program.state()
    assert "conv.bias" not in after
    moved = before["bn.running_mean"] - before["conv.bias"]
    assert torch.equal(after["bn.running_mean"], moved)


@pytest.mark.parametrize(
    ("method", "names"),
    [("ste", set()), ("lsq", {"scale"}), ("lsq_plus", {"scale", "zero_point"})],
)
def test_what_is_trained_by_method(method, names):
    quantizers = fakes(trained_form(ConvNorm, {"method": method}).program)
    activations = [m for n, m in quantizers.items() if "weight" not in n]
    weights = [m for n, m in quantizers.items() if "weight" in n]
    assert all({n for n, _ in m.named_parameters()} == names for m in activations)
    assert all({n for n, _ in m.named_parameters()} == names - {"zero_point"} for m in weights)
    assert all(bool(m.tracking) == (method == "ste") for m in quantizers.values())


def test_straight_through_options_reach_the_quantizers():
    options = {
        "method": "ste",
        "weights": {"bits": 4, "clip": 3.0},
        "activations": {"momentum": 0.2, "delay": 5},
    }
    quantizers = fakes(trained_form(ConvNorm, options).program)
    assert (quantizers["conv_weight_fq"].clip, quantizers["conv_weight_fq"].tracking) == (3.0, 1.0)
    assert (quantizers["x_fq"].tracking, quantizers["x_fq"].delay) == (0.2, 5)


@pytest.mark.parametrize("method", METHODS)
def test_training_wins_back_what_two_bits_lose(method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, 8, 8, generator=generator)
    program = captured(ConvNorm, 2, 3, 8, 8)
    with torch.no_grad():
        logits = program.module(x)
    classes = (logits - logits.mean(0)).argmax(1)
    batches = [((a,), b) for a, b in zip(x.split(32), classes.split(32), strict=True)]
    context = Context(data={"calibration": [(x,)], "train": batches})
    low = {"weights": {"bits": 2}, "activations": {"bits": 3}, "calibration": 96, "method": method}
    start = apply(Qat, program, low, context).program
    optimizer = {"use": "Adam", "lr": 0.01}
    done = apply(Fit, start, {"epochs": 12, "optimizer": optimizer}, context).program
    done = apply(FoldBatchNorm, done).program

    def right(module):
        with torch.no_grad():
            return (module(x).argmax(1) == classes).float().mean().item()

    assert right(done.module) >= right(start.module) + 0.05


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_pruning_slices_what_is_trained(method):
    program = trained_form(ResNet, {"method": method}).program
    analysis = analyze(program)
    keep = {axis: torch.arange(0, axis.size, 2).numpy() for axis in analysis.axes}
    assert len(keep) >= 5
    rewriter = GraphRewriter(program)
    shrink(rewriter, analysis, keep)
    after = rewriter.finish()
    leaves = program.signature.flatten((random_input(3, 3, 8, 8),), {})
    assert masked_difference(analysis, keep, after, leaves) <= 1e-4


def test_a_transformer_has_no_norm_to_fold():
    batches = token_batches(2)
    program = captured_transformer(batches)
    result = apply(Qat, program, {"calibration": 2}, Context(data={"calibration": batches}))
    assert result.decision.norms == ()
    ids = node_ids(result.program).values()
    assert sum(name.endswith("_weight_fq") for name in ids) == len(result.decision.weights) > 0


def captured_transformer(batches):
    torch.manual_seed(0)
    model = Transformer(width=8, depth=1, heads=2).eval()
    return capture(model, batches[0], dynamic={"ids": {0: "batch", 1: "seq"}})


def test_a_norm_that_is_zero_somewhere_is_declined():
    model = seeded(ConvNorm)
    with torch.no_grad():
        model.bn.weight[2] = 0.0
    program = capture(model, (torch.zeros(2, 3, 8, 8),))
    context = Context(data={"calibration": image_batches(2, 8, 3, 8, 8)})
    result = apply(Qat, program, {"calibration": 16}, context)
    assert "run tidy.fold_batchnorm first" in result.reasons()["conv"]


def test_bad_input():
    with pytest.raises(ValueError, match="belong to `method: ste`"):
        QatOptions(method="lsq", activations={"delay": 3})
    with pytest.raises(ValueError, match="learns zero points"):
        QatOptions(method="lsq_plus", activations={"symmetric": True})
    program = captured(ConvNorm, 2, 3, 8, 8)
    with pytest.raises(DataError, match="calibration"):
        apply(Qat, program, {}, Context())
    done = trained_form(ConvNorm).program
    context = Context(data={"calibration": image_batches(2, 8, 3, 8, 8)})
    with pytest.raises(UsageError, match="there is no layer to quantise"):
        apply(Qat, done, {"calibration": 16}, context)
