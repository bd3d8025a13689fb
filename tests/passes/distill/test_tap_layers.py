"""Taps on layers, matched with those of a teacher."""

import pytest
import torch

from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.depth.skip_blocks import SkipBlocks
from passes.distill.tap import Tap
from tests.passes.distill.taps import of_depth
from tests.passes.models import ResNet, image_batches, token_batches
from tests.passes.support import apply, seeded


def layers(student, teacher, planning=False, **options):
    data = {"calibration": token_batches(2)}
    context = Context(data=data, original=teacher, planning=planning)
    options = {"layers": {"at": "layers.*", "calibration": 8, **options}}
    return apply(Tap, student, options, context).decision


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("uniform", [1, 3, 5]), ("last", [3, 4, 5]), ([[0, 4], [2, 5]], [4, 5])],
    ids=["uniform", "last", "list"],
)
def test_layers_are_matched(how, wanted):
    decision = layers(of_depth(3), of_depth(6), map=how, name="h")
    assert [tap.teacher for tap in decision.taps] == [f"layers.{i}" for i in wanted]
    names = ["h_0", "h_2"] if isinstance(how, list) else ["h_0", "h_1", "h_2"]
    assert [tap.name for tap in decision.taps] == names


def test_similarity_finds_layers_that_were_taken_out():
    teacher = of_depth(5)
    student = apply(SkipBlocks, teacher, {"layers": [1, 3]}).program
    # Weights of the layers that stay are those of the teacher; their inputs changed a little.
    decision = layers(student, teacher, map="similarity", what="output")
    (mapping,) = decision.mappings
    assert mapping.student == ("layers.0", "layers.2", "layers.4")
    assert mapping.chosen[0] == 0
    assert mapping.similarity[0][0] == pytest.approx(1, abs=1e-5)
    assert all(0 <= value <= 1 + 1e-5 for row in mapping.similarity for value in row)
    (figure,) = decision.figures()
    assert figure.chosen == mapping.chosen
    assert figure.columns == mapping.teacher


def test_similarity_of_layers_of_other_sizes_is_that_of_means():
    student, teacher = (
        capture(seeded(lambda width=width: ResNet(width), 0), (torch.randn(2, 3, 16, 16),))
        for width in (4, 8)
    )
    options = {"layers": {"at": "layer?", "map": "similarity", "calibration": 8}}
    context = Context(data={"calibration": image_batches(2)}, original=teacher)
    (mapping,) = apply(Tap, student, options, context).decision.mappings
    assert mapping.chosen == (0, 1)
    assert all(0 < value < 1 for row in mapping.similarity for value in row)


def test_a_plan_names_what_similarity_will_decide():
    decision = layers(of_depth(2), of_depth(4), planning=True, map="similarity")
    assert "known after measuring" in decision.pending[0]
    assert decision.figures() == ()
