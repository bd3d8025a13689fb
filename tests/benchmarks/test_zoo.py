"""The zoo is wide enough, and its measurements notice what they are there to notice."""

import pytest
import torch
from torch import nn

from benchmarks.zoo import ZooModel, load_zoo
from benchmarks.zoo._compare import (
    Mismatch,
    compare_gradients,
    compare_state,
    compare_values,
    tensors,
)
from benchmarks.zoo._measure import _Runner, measure
from benchmarks.zoo._models import image_inputs, randomise
from benchmarks.zoo._results import Check, Result, read_results, write_results
from benchmarks.zoo._table import render

MINIMUM_FAMILIES = {"torchvision": 20, "timm": 60, "huggingface": 30}


@pytest.mark.parametrize("source", MINIMUM_FAMILIES)
def test_the_zoo_covers_enough_families(source):
    families = {model.family for model in load_zoo() if model.source == source}
    assert len(families) >= MINIMUM_FAMILIES[source]


def test_text_inputs_tempt_with_a_full_mask_and_then_pad():
    text = [m for m in load_zoo() if "attention_mask" in m.inputs(2, 0)[1]]
    assert len(text) > 80
    for model in text:
        assert bool(model.inputs(2, 0)[1]["attention_mask"].all())
        padded = model.inputs(3, 1)[1]["attention_mask"]
        assert not bool(padded[0].all())
        assert bool(padded.any(dim=1).all())


def test_randomise_leaves_nothing_constant():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    nn.init.zeros_(model[1].weight)
    randomise(model, image_inputs(8)(4, 7))
    for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
        assert tensor.min() != tensor.max()
    assert model[1].momentum == pytest.approx(0.1)
    assert not model.training


def test_compare_values_bounds_the_error_by_the_range():
    expected = tensors({"logits": torch.linspace(0, 10, 11)})
    assert compare_values(expected, tensors({"logits": torch.linspace(0, 10, 11) + 5e-5}), "x") > 0
    with pytest.raises(Mismatch, match=r"out\.logits: off by"):
        compare_values(expected, tensors({"logits": torch.linspace(0, 10, 11) + 2e-4}), "x")
    with pytest.raises(Mismatch, match="instead of"):
        compare_values(expected, tensors({"logits": torch.zeros(12)}), "x")
    with pytest.raises(Mismatch, match="names"):
        compare_values(expected, tensors((torch.zeros(11),)), "x")


def test_compare_values_rejects_nan():
    with pytest.raises(Mismatch, match="off by inf"):
        compare_values({"out": torch.ones(2)}, {"out": torch.tensor([1.0, float("nan")])}, "x")


def test_compare_gradients_names_what_differs():
    expected, actual = nn.Linear(3, 2), nn.Linear(3, 2)
    actual.load_state_dict(expected.state_dict())
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected(x).square().sum().backward()
    with pytest.raises(Mismatch, match="weight gets no gradient"):
        compare_gradients(expected, actual)
    actual(x).square().sum().backward()
    compare_gradients(expected, actual)
    actual.bias.grad *= 1.01
    with pytest.raises(Mismatch, match="gradient of bias"):
        compare_gradients(expected, actual)


def test_compare_state_notices_statistics_that_did_not_move():
    expected, actual = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    expected(torch.randn(4, 3))
    with pytest.raises(Mismatch, match="running_mean"):
        compare_state(expected, actual)


def test_eager_rejects_a_model_that_ignores_its_input():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(4.0))

        def forward(self, x):
            return self.weight + 1e-6 * x.mean()

    zoo = ZooModel("timm", "constant", "constant", lambda: Constant().eval(), image_inputs(4))
    result = measure(zoo, eager_only=True, progress=lambda _: None)
    assert result.checks["eager"].status == "fail"
    assert "no output moves" in result.checks["eager"].detail


def test_the_table_lists_every_failure_with_its_reason():
    good, bad = Result("timm/good", "good", []), Result("timm/bad", "bad", [])
    for check in good.checks.values():
        check.status = "pass"
    bad.checks["capture"] = Check("fail", "CaptureError: a | b")
    page = render([good, bad], command="sweep")
    assert "- `timm/bad`, capture: CaptureError: a \\| b" in page
    assert "1 (50.0%)" in page
    assert "| timm/good | good | ✓ |" in page


def test_results_survive_their_file(tmp_path):
    result = Result("timm/a", "a", ["mixture"], capture_seconds=0.5, notes=["unused: x: y"])
    result.checks["equal"] = Check("fail", "off", 0.5)
    write_results(tmp_path / "zoo.json", [result])
    assert read_results(tmp_path / "zoo.json") == [result]


def test_a_wrong_program_is_noticed_in_both_modes():
    def build():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        return layers.eval()

    zoo = ZooModel("timm", "mlp", "mlp", build, image_inputs(4))
    result = Result(zoo.id, zoo.family, [])
    runner = _Runner(zoo, result)
    runner.eager()
    runner.capture()
    assert runner.equal() <= 1e-5
    assert runner.train() <= 1e-5
    assert not result.checks["train"].detail
    with torch.no_grad():
        runner.program.module.get_submodule("3").weight[0, 0] += 0.01
    with pytest.raises(Mismatch, match="output out"):
        runner.equal()
    runner.program.module.get_submodule("2").p = 0.4
    with pytest.raises(Mismatch, match="train output out"):
        runner.train()
