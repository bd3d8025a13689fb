"""Taps follow their value through other passes."""

import pytest
import torch

from fxcompress.axes import analyze
from fxcompress.emit._plain import plain_program
from fxcompress.emit.driver import write_unproved
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter, taps_of, without_taps
from passes.depth.skip_blocks import SkipBlocks
from passes.prune.channels import Channels
from passes.quantize.qat import Qat
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.distill.taps import of_depth, read_by, resnet, tapped
from tests.passes.models import image_batches, token_batches
from tests.passes.support import apply


def test_survives_files(tmp_path):
    program = tapped(resnet(), ("mid", "layer1", "output", "stage.1")).program
    again = Program.load(program.save(tmp_path / "p.fxp"))
    assert again.text() == program.text()
    (tap,) = [m for m in again.module.modules() if type(m).__name__ == "Tap"]
    assert (tap.name, tap.at, tap.what, tap.teacher) == ("mid", "layer1", "output", "stage.1")


def test_nothing_emitted_has_taps(tmp_path):
    program = tapped(resnet(), ("mid", "layer1")).program
    write_unproved(program, tmp_path, "program")
    assert Program.load(tmp_path / "model.fxp").text() == resnet().text()
    plain = plain_program(program)
    assert "tap" not in " ".join(str(n.target) for n in plain.module.graph.nodes)
    assert plain_program(resnet()).module.code == plain.module.code


def test_follows_a_norm_into_its_layer():
    program = tapped(resnet(), ("normed", "layer1.0.bn1")).program
    folded = apply(FoldBatchNorm, program)
    assert read_by(folded.program) == {"normed": "layer1.0.conv1"}
    assert "batch_norm" not in folded.ops()


def test_a_norm_after_a_tap_stays():
    program = tapped(resnet(), ("raw", "layer1.0.conv1")).program
    folded = apply(FoldBatchNorm, program)
    assert read_by(folded.program) == {"raw": "layer1.0.conv1"}
    assert "layer1.0.conv1 has 2 users" in folded.reasons()["layer1.0.bn1"]


def test_shrinks_with_its_channels():
    program = tapped(resnet(), ("inner", "layer1.0.conv1"), ("mid", "layer1")).program
    ours, bare = analyze(program), analyze(resnet())
    assert [axis.name for axis in ours.axes] == [axis.name for axis in bare.axes]
    pruned = apply(Channels, program, {"ratio": 0.5})
    shapes = {name: node.meta["val"].shape[1] for name, node in taps_of(pruned.program).items()}
    assert shapes == {"inner": 4, "mid": 4}
    plain = apply(Channels, resnet(), {"ratio": 0.5})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.program(x), pruned.program(x))


def test_moves_to_the_input_of_a_block_that_is_skipped():
    program = tapped(of_depth(4), ("second", "layers.1"), ("third", "layers.2")).program
    result = apply(SkipBlocks, program, {"layers": [1]})
    found = read_by(result.program)
    assert found["second"] == read_by(tapped(of_depth(4), ("x", "layers.0")).program)["x"]
    ids = token_batches(1)[0][0]
    assert torch.equal(
        result.program(ids), apply(SkipBlocks, of_depth(4), {"layers": [1]}).program(ids)
    )


def test_a_block_with_a_tap_inside_is_not_skipped():
    program = tapped(of_depth(4), ("inner", "layers.1.norm2")).program
    with pytest.raises(UsageError, match=r"taps\.inner"):
        apply(SkipBlocks, program, {"layers": [1]})
    data = Context(data={"calibration": token_batches(2)})
    result = apply(SkipBlocks, program, {"count": 3, "calibration": 8}, data)
    assert "taps.inner" in result.reasons()["layers.1"]
    assert [b.index for b in result.decision.blocks if b.skip] == [0, 2, 3]


def test_follows_into_quantization_aware_training():
    data = Context(data={"calibration": image_batches(2)})
    program = tapped(resnet(), ("mid", "layer1"), ("normed", "layer2.0.bn1")).program
    options = {
        "calibration": 8,
        "activations": {"observer": "minmax"},
        "weights": {"observer": "minmax"},
    }
    result = apply(Qat, program, options, data)
    plain = apply(Qat, resnet(), options, data)
    x = image_batches(1)[0][0]
    assert torch.equal(result.program(x), plain.program(x))
    assert set(taps_of(result.program)) == {"mid", "normed"}
    assert without_taps(result.program).text() == plain.program.text()


def test_follows_a_replaced_node():
    program = tapped(resnet(), ("mid", "layer1")).program
    rewriter = GraphRewriter(program)
    relu = rewriter.node("layer1.1.relu@2")
    new = rewriter.call_function(torch.relu, (relu.args[0],), after=relu)
    rewriter.replace_uses(relu, new)
    rewriter.remove(relu)
    assert read_by(rewriter.finish()) == {"mid": "layer1.1/relu"}
