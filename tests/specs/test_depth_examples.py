"""The examples early_exit and mixture_of_depths: what they plan, their data, and that they run."""

import pytest
import torch

from fxcompress.api import compress
from fxcompress.ir import capture
from fxcompress.rewrite import early_exits
from fxcompress.spec import Spec
from passes.depth.mixture_of_depths import MixtureOfDepths
from tests.passes.support import apply
from tests.specs.examples import SPECS, load


def spec(name: str) -> Spec:
    return Spec.load(SPECS / name / "spec.yaml")


def test_exits_come_before_their_training_and_thresholds() -> None:
    steps = spec("early_exit").steps
    assert [step.id for step in steps] == ["exits", "heads", "when"]
    assert steps[1].options.targets == ("exits.*",)
    assert steps[2].options.metric_drop is not None
    model = load("early_exit/model.py").vit()
    assert sum(p.numel() for p in model.parameters()) == 205_834


def test_an_image_may_stop_early() -> None:
    model = load("early_exit/model.py").vit().eval()
    program = capture(model, (torch.randn(2, 1, 28, 28),), verify=False)
    recipe = [
        {"use": "depth.early_exit", "after": [1, 3]},
        {"use": "depth.exit_when", "thresholds": [0.5, 0.5]},
    ]
    result = compress(program, recipe).program
    assert [each.name for each in early_exits(result)] == ["exit_0", "exit_1"]


def test_windows_of_text_are_cut_and_held_out(tmp_path) -> None:
    data = load("mixture_of_depths/data.py")
    verses = [f"Ge{i}:1 {'abcdefgh ' * 300}." for i in range(200)]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(verses))
    splits = data.bible(str(file), train=24, calibration=8, evaluation=16)
    assert {name: sum(len(t) for _, t in split) for name, split in splits.items()} == {
        "train": 24, "calibration": 8, "eval": 16,
    }  # fmt: skip
    inputs, target = splits["train"][0]
    assert torch.equal(inputs["input_ids"], target)
    assert target.shape == (8, 128)
    assert int(target.max()) < 11


def test_the_shipped_characters_can_be_routed() -> None:
    steps = spec("mixture_of_depths").steps
    assert [step.id for step in steps] == ["routers", "heal"]
    model = load("mixture_of_depths/model.py").characters().eval()
    ids = torch.randint(0, 63, (2, 128), generator=torch.Generator().manual_seed(0))
    program = capture(model, (), {"input_ids": ids}, dynamic={"input_ids": {0: "batch"}},
                      verify=False)  # fmt: skip
    dense = apply(MixtureOfDepths, program, {"capacity": 1.0, "layers": [1, 2]})
    assert dense.decision.causal
    assert torch.equal(dense.program(input_ids=ids), program(input_ids=ids))


@pytest.mark.slow
def test_early_exit_keeps_its_accuracy_for_less_compute() -> None:
    data = load("early_exit/data.py")
    try:
        data.neighbour().find_root()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from fxcompress.spec import load_program

    chosen = spec("early_exit")
    result = compress(load_program(chosen), chosen)
    assert all(each.met for each in result.constraints if each.met is not None)
    decision = result.record.passes[-1].decision
    assert decision["compute"] < 0.95
