"""One golden graph per pass: what it makes of a small model."""

import pytest
import torch

from fxcompress.api import compress
from fxcompress.ir import Program, capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import hash_inputs, hash_weights_
from passes.depth.merge_layers import MergeLayers
from passes.depth.share_layers import ShareLayers
from passes.depth.skip_blocks import SkipBlocks
from passes.distill.prompt import Prompt
from passes.distill.student import Student
from passes.factorize.cp import Cp
from passes.factorize.depthwise import Depthwise
from passes.factorize.embedding import Embedding
from passes.factorize.lora import Lora
from passes.factorize.lora_merge import LoraMerge
from passes.factorize.share_weights import ShareWeights
from passes.factorize.svd import Svd
from passes.factorize.tucker import Tucker
from passes.prune.burn_in import BurnIn
from passes.prune.channels import Channels
from passes.prune.n_m import NM
from passes.prune.unstructured import Unstructured
from passes.quantize.adaround import Adaround
from passes.quantize.bias_correct import BiasCorrect
from passes.quantize.binary import Binary
from passes.quantize.dynamic import Dynamic
from passes.quantize.equalize import Equalize
from passes.quantize.mixed import Mixed
from passes.quantize.qat import Qat
from passes.quantize.smooth import Smooth
from passes.quantize.static import Static
from passes.quantize.ternary import Ternary
from passes.quantize.weight_only import WeightOnly
from passes.tidy.cast import Cast
from passes.tidy.fold_batchnorm import FoldBatchNorm
from passes.tidy.replace_activation import ReplaceActivation
from tests.passes.models import Reader, ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply


def resnet() -> Program:
    program = capture(ResNet(width=4).eval(), image_batches(1, 2, 3, 8, 8)[0])
    return hash_weights_(program)


def transformer() -> Program:
    model = Transformer(width=8, depth=3, heads=2).eval()
    program = capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})
    return hash_weights_(program)


def hashed_data(program: Program) -> Context:
    batches = [hash_inputs(program, {"batch": 4}, seed=seed) for seed in range(2)]
    return Context(data={"calibration": batches})


@pytest.mark.golden("passes/tidy/fold_batchnorm")
def test_fold_batchnorm(golden_graph):
    golden_graph(apply(FoldBatchNorm, resnet()).program)


@pytest.mark.golden("passes/tidy/replace_activation")
def test_replace_activation(golden_graph):
    golden_graph(apply(ReplaceActivation, resnet(), {"replace": {"relu": "relu6"}}).program)


@pytest.mark.golden("passes/tidy/cast")
def test_cast(golden_graph):
    golden_graph(apply(Cast, transformer(), {"dtype": "bfloat16"}).program)


@pytest.mark.golden("passes/tidy/cast_float8")
def test_cast_to_8_bits(golden_graph):
    golden_graph(apply(Cast, transformer(), {"dtype": "float8_e4m3"}).program)


@pytest.mark.golden("passes/quantize/static")
def test_static(golden_graph):
    program = apply(FoldBatchNorm, resnet()).program
    # Min-max, because a search over ranges may decide otherwise in the last bit elsewhere.
    options = {"calibration": 8, "activations": {"observer": "minmax"}}
    golden_graph(apply(Static, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/static_executorch")
def test_static_for_executorch(golden_graph):
    program = apply(FoldBatchNorm, resnet()).program
    options = {"calibration": 8, "activations": {"observer": "minmax"}, "target": "executorch"}
    options["overrides"] = [{"targets": ["stem.0"], "keep": True}]
    golden_graph(apply(Static, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/static_tensorrt")
def test_static_for_tensorrt(golden_graph):
    program = apply(FoldBatchNorm, resnet()).program
    options = {"calibration": 8, "activations": {"observer": "minmax"}, "target": "tensorrt-qdq"}
    golden_graph(apply(Static, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/static_float8")
def test_static_in_8_bit_floats(golden_graph):
    program = apply(FoldBatchNorm, resnet()).program
    options = {"calibration": 8, "activations": {"observer": "minmax"}, "dtype": "float8_e4m3"}
    golden_graph(apply(Static, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/qat")
def test_qat(golden_graph):
    options = {"calibration": 8, "activations": {"observer": "minmax"}, "method": "lsq_plus"}
    options["weights"] = {"observer": "minmax", "bits": 4}
    program = resnet()
    golden_graph(apply(Qat, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/weight_only")
def test_weight_only(golden_graph):
    # To nearest, because a last bit elsewhere in the inputs may round a column the other way.
    options = {"group": 4, "embeddings": True, "overrides": [{"targets": ["head"], "bits": 8}]}
    golden_graph(apply(WeightOnly, transformer(), options).program)


@pytest.mark.golden("passes/quantize/mixed")
def test_mixed(golden_graph):
    # By the layers' own noise and far from a tie, because a last bit may rank two layers otherwise.
    options = {"budget": {"size": "45%"}, "choices": [2, 8], "weights": {"search": "minmax"}}
    program = transformer()
    options |= {"sensitivity": "sqnr", "calibration": 8}
    golden_graph(apply(Mixed, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/binary")
def test_binary(golden_graph):
    golden_graph(apply(Binary, resnet()).program)


@pytest.mark.golden("passes/quantize/ternary")
def test_ternary(golden_graph):
    golden_graph(apply(Ternary, transformer(), {"train": False}).program)


@pytest.mark.golden("passes/quantize/adaround")
def test_adaround(golden_graph):
    # A step too small to turn a weight, because a last bit elsewhere may turn it the other way.
    program = apply(FoldBatchNorm, resnet()).program
    options = {"calibration": 8, "activations": {"observer": "minmax"}, "weights": {"bits": 4}}
    quantised = apply(Static, program, options, hashed_data(program)).program
    options = {"calibration": 8, "iterations": 1, "lr": 1e-6}
    golden_graph(apply(Adaround, quantised, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/smooth")
def test_smooth(golden_graph):
    program = transformer()
    # A fixed α, because a search may choose its neighbour by a last bit elsewhere.
    options = {"calibration": 8, "alpha": 0.5, "insert": True, "targets": ["*.qkv", "*.out"]}
    golden_graph(apply(Smooth, program, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/equalize")
def test_equalize(golden_graph):
    golden_graph(apply(Equalize, apply(FoldBatchNorm, resnet()).program).program)


@pytest.mark.golden("passes/quantize/bias_correct")
def test_bias_correct(golden_graph):
    program = apply(FoldBatchNorm, resnet()).program
    static = {"calibration": 8, "activations": {"observer": "minmax"}, "weights": {"bits": 4}}
    quantised = apply(Static, program, static, hashed_data(program)).program
    options = {"calibration": 8}
    golden_graph(apply(BiasCorrect, quantised, options, hashed_data(program)).program)


@pytest.mark.golden("passes/quantize/dynamic")
def test_dynamic(golden_graph):
    model = Reader(width=6).eval()
    program = capture(model, (torch.zeros(2, 5, 4),), dynamic={"x": {0: "batch"}})
    golden_graph(apply(Dynamic, hash_weights_(program)).program)


@pytest.mark.golden("passes/depth/merge_layers")
def test_merge_layers(golden_graph):
    golden_graph(apply(MergeLayers, transformer(), {"groups": [[1, 2]]}).program)


@pytest.mark.golden("passes/depth/share_layers")
def test_share_layers(golden_graph):
    golden_graph(apply(ShareLayers, transformer(), {"groups": 2, "init": "mean"}).program)


@pytest.mark.golden("passes/depth/skip_blocks")
def test_skip_blocks(golden_graph):
    golden_graph(apply(SkipBlocks, transformer(), {"layers": [1]}).program)


@pytest.mark.golden("passes/distill/prompt")
def test_prompt(golden_graph):
    options = {"tokens": 2, "init": [3, 7], "train": ["head.*"]}
    golden_graph(apply(Prompt, transformer(), options).program)


@pytest.mark.golden("passes/distill/student")
def test_student(golden_graph):
    options = {"layers": [0, 2], "width": {"head": 0.5, "neuron": 0.25}, "share": 2}
    golden_graph(apply(Student, transformer(), options).program)


@pytest.mark.golden("passes/factorize/lora")
def test_lora(golden_graph):
    options = {"rank": 2, "targets": ["embed", "layers.0.qkv", "head"], "dora": True}
    adapted = apply(Lora, transformer(), options).program
    # Hashed again: A is drawn by torch, and B is zero.
    golden_graph(hash_weights_(adapted))


@pytest.mark.golden("passes/factorize/svd")
def test_svd(golden_graph):
    options = {"rank": 2, "whiten": "none", "types": ["conv2d", "linear"]}
    # Hashed again: the last digits of a decomposition are the machine's.
    golden_graph(hash_weights_(apply(Svd, resnet(), options).program))


@pytest.mark.golden("passes/factorize/tucker")
def test_tucker(golden_graph):
    # Hashed again, as of svd.
    golden_graph(hash_weights_(apply(Tucker, resnet(), {"ratio": 0.5}).program))


@pytest.mark.golden("passes/factorize/cp")
def test_cp(golden_graph):
    options = {"rank": 3, "separable": True}
    golden_graph(hash_weights_(apply(Cp, resnet(), options).program))


@pytest.mark.golden("passes/factorize/depthwise")
def test_depthwise(golden_graph):
    options = {"multiplier": 1, "whiten": "none"}
    golden_graph(hash_weights_(apply(Depthwise, resnet(), options).program))


@pytest.mark.golden("passes/factorize/share_weights")
def test_share_weights(golden_graph):
    golden_graph(apply(ShareWeights, transformer(), {"entries": 4, "embeddings": True}).program)


@pytest.mark.golden("passes/factorize/embedding")
def test_embedding(golden_graph):
    program = transformer()
    rows = next(t for name, t in program.state().items() if "emb" in name).shape[0]
    context = Context(data={"train": [(torch.arange(0, rows, 3)[None],)]})
    golden_graph(apply(Embedding, program, {"vocabulary": {}}, context).program)


@pytest.mark.golden("passes/factorize/lora_merge")
def test_lora_merge(golden_graph):
    adapted = hash_weights_(apply(Lora, resnet(), {"rank": 2}).program)
    golden_graph(apply(LoraMerge, adapted).program)


@pytest.mark.golden("passes/prune/unstructured")
def test_unstructured(golden_graph):
    # By magnitude, because rounding elsewhere may rank two scores from data the other way.
    golden_graph(apply(Unstructured, transformer(), {"ratio": 0.5, "mode": "keep"}).program)


@pytest.mark.golden("passes/prune/n_m")
def test_n_m(golden_graph):
    golden_graph(apply(NM, resnet(), {"exclude": ["stem.0"]}).program)


@pytest.mark.golden("passes/prune/burn_in")
def test_burn_in(golden_graph):
    masked = apply(NM, resnet(), {"mode": "keep"}).program
    golden_graph(apply(BurnIn, masked).program)


@pytest.mark.golden("passes/prune/channels")
def test_channels(golden_graph):
    options = {"ratio": 0.5, "kinds": ["head", "neuron", "residual"]}
    golden_graph(apply(Channels, transformer(), options).program)


@pytest.mark.golden("passes/prune/iterative")
def test_iterative(golden_graph):
    step = {"use": "prune.iterative", "id": "shrink", "ratio": 0.5, "steps": 2}
    result = compress(resnet(), [step])
    assert [each.id for each in result.record.passes] == ["shrink.1.prune", "shrink.2.prune"]
    golden_graph(result.program)
