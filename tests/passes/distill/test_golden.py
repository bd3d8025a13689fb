"""Golden graphs of taps and of a joint program."""

import pytest

from fxcompress.ir import Program, capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import hash_weights_
from fxcompress.train.joint import ProjectorConfig, join
from passes.distill.tap import Tap
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply
from tests.train.joint.models import terms


def transformer() -> Program:
    model = Transformer(width=8, depth=2, heads=2).eval()
    program = capture(model, token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}})
    return hash_weights_(program)


def resnet(width: int) -> Program:
    program = capture(ResNet(width).eval(), image_batches(1, 2, 3, 8, 8)[0])
    return hash_weights_(program)


@pytest.mark.golden("passes/distill/tap")
def test_tap(golden_graph):
    options = {
        "taps": [
            {"name": "shares", "at": "layers.1", "what": "attention"},
            {"name": "queries", "at": "layers.0", "what": "query"},
        ],
        "layers": {"at": "layers.*", "name": "hidden"},
    }
    program = transformer()
    golden_graph(apply(Tap, program, options, Context(original=program)).program)


@pytest.mark.golden("passes/distill/joint")
def test_joint(golden_graph):
    taps = [
        {"name": "mid", "at": "layer1"},
        {"name": "end", "at": "layer2", "teacher": "layer1.1"},
    ]
    student = apply(Tap, resnet(4), {"taps": taps}).program
    losses = (
        {"use": "hard_labels"},
        {"use": "soft_labels"},
        {"use": "features"},
        {"use": "rkd", "taps": ["end"]},
    )
    wide = ProjectorConfig(taps=("end",), use="mlp", hidden=5)
    joint = join(student, resnet(6), terms(*losses), projectors=[wide])
    # The state of projectors comes from torch's generator, whose bytes differ between processors.
    golden_graph(joint.text(state=False))
