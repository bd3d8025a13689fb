import subprocess
import sys

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.api import prepare
from fxcompress.errors import DataError, PassError, SelectorError, SpecError, UsageError
from fxcompress.spec import load_program
from fxcompress.train.metrics import Metric
from tests.rewrite import models


def data():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 6, 6, generator=generator),) for _ in range(4)]
    labels = [(batch, torch.arange(4)) for batch in batches]
    return {"calibration": batches, "eval": labels}


def test_passes_are_composed_in_code():
    program = models.convnet()
    text = program.text()
    steps = [
        fxc.passes.tidy.fold_batchnorm(),
        {"use": "quantize.static", "id": "int8", "calibration": 16},
    ]
    result = fxc.compress(program, steps, data=data())
    assert program.text() == text
    assert [each.id for each in result.record.passes] == ["fold_batchnorm", "int8"]
    assert "batch_norm" not in result.program.text(state=False)
    assert "fake_quant" in result.program.text(state=False)
    assert isinstance(result.module, nn.Module)
    assert result.module(torch.randn(3, 3, 6, 6)).shape == (3, 10)
    assert result.lock.data["calibration"].batches == 4
    assert result.plan.steps[0].settled
    assert not result.plan.steps[1].settled
    assert result.constraints == ()


def test_a_lock_replays_without_data():
    program = models.convnet()
    steps = [fxc.passes.quantize.static(calibration=16)]
    first = fxc.compress(program, steps, data=data())
    again = fxc.compress(program, steps, lock=first.lock)
    assert again.program.fingerprint() == first.program.fingerprint()


def test_the_metric_is_measured_after_every_pass():
    def spread(model, batches):
        return float(torch.stack([model(*batch).std() for batch, _ in batches]).mean())

    result = fxc.compress(
        models.convnet(),
        [fxc.passes.tidy.fold_batchnorm()],
        data=data(),
        metric=Metric("spread", spread),
    )
    assert result.record.metric_name == "spread"
    assert result.record.original_metric == pytest.approx(result.record.passes[0].metric)
    assert result.figures().result["metric"] == result.record.passes[0].metric
    assert result.report.metric_name == "spread"


def test_the_report_is_built_from_the_record():
    from fxcompress.report import render_html, render_markdown

    result = fxc.compress(models.convnet(), [fxc.passes.tidy.fold_batchnorm()])
    assert [row.id for row in result.report.passes][1:] == ["fold_batchnorm"]
    assert "fold_batchnorm" in render_markdown(result.report)
    assert "<html" in render_html(result.report)


def test_a_result_is_emitted_and_reloaded(tmp_path):
    result = fxc.compress(models.convnet(), [fxc.passes.tidy.fold_batchnorm()])
    (artifact,) = result.emit(tmp_path, ["program"])
    loaded = fxc.Program.load(artifact.path)
    assert loaded.fingerprint() == result.program.fingerprint()


def test_unknown_passes_and_options_are_named():
    with pytest.raises(AttributeError, match="fold_batchnorm"):
        fxc.passes.tidy.fold_batchnrom()
    with pytest.raises(SpecError, match="calibratoin"):
        fxc.passes.quantize.static(calibratoin=3)
    with pytest.raises(SpecError) as caught:
        fxc.compress(models.convnet(), [{"use": "tidy.fold"}, {"use": "quantize.static", "x": 1}])
    assert len(caught.value.problems) == 2
    with pytest.raises(UsageError, match="name no model"):
        prepare([fxc.passes.tidy.fold_batchnorm()])


def test_families_list_what_they_hold():
    assert {"quantize", "tidy"} <= set(dir(fxc.passes))
    assert "fold_batchnorm" in dir(fxc.passes.tidy)
    assert repr(fxc.passes.tidy) == "passes.tidy"
    made = fxc.passes.tidy.fold_batchnorm
    assert made.__doc__


def test_a_pass_that_has_nothing_to_do_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    program = fxc.capture(model, (torch.randn(2, 3),))
    with pytest.raises(SelectorError, match="nothing is selected"):
        fxc.compress(program, [fxc.passes.tidy.fold_batchnorm()])


SPEC = """
fxcompress: 1
name: small
model: {factory: "model.py:small"}
inputs: [{name: x, shape: [batch, 3, 6, 6]}]
passes:
  - {use: tidy.fold_batchnorm}
constraints: {nodes: 80%, size: 10%, output_error: 0.001}
"""
MODEL = """
from tests.rewrite.models import ConvNet

def small():
    return ConvNet()
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "model.py").write_text(MODEL)
    return fxc.Spec.load(tmp_path / "spec.yaml")


def test_a_spec_is_prepared_planned_and_run(spec, tmp_path):
    job = prepare(spec)
    plan = job.plan()
    assert {limit.name: limit.met for limit in plan.steps[0].limits} == {
        "size": False,
        "nodes": True,
    }
    result = job.run(tmp_path / "run", plan=plan)
    assert {each.name: each.met for each in result.constraints} == {
        "size": False,
        "nodes": True,
        "output_error": True,
    }
    assert (tmp_path / "run/spec.resolved.yaml").read_text() == spec.resolved_yaml()


def test_a_spec_applies_to_a_program_that_is_given(spec):
    result = fxc.compress(models.convnet(), spec)
    assert result.original.name == "convnet"
    assert result.record.name == "small"


@pytest.mark.parametrize(
    "module",
    ["fxcompress", "fxcompress.pipeline", "fxcompress.rewrite", "fxcompress.pipeline.base"],
)
def test_importing_needs_no_torch(module):
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


FAILING = """
fxcompress: 1
name: starved
model: {factory: "model.py:small"}
inputs: [{name: x, shape: [batch, 3, 6, 6]}]
data: {factory: "data.py:splits"}
passes:
  - {use: tidy.fold_batchnorm}
  - {use: quantize.static, id: int8, calibration: 64}
"""
DATA = """
import torch

def splits():
    return {"calibration": [(torch.ones(4, 3, 6, 6),)]}
"""


def test_the_reproducer_of_a_failure_is_a_spec_that_fails_again(tmp_path):
    (tmp_path / "spec.yaml").write_text(FAILING)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "data.py").write_text(DATA)
    job = prepare(fxc.Spec.load(tmp_path / "spec.yaml"))
    with pytest.raises(DataError, match="4 samples, and 64 are asked for") as first:
        job.run(tmp_path / "run")
    again = fxc.Spec.load(tmp_path / "run/failure/spec.yaml")
    assert [step.id for step in again.steps] == ["int8"]
    with pytest.raises(DataError) as second:
        prepare(again).run()
    assert str(second.value) == str(first.value)


TAUGHT = """
fxcompress: 1
name: taught
model: {factory: "model.py:small"}
inputs: [{name: x, shape: [batch, 3, 6, 6]}]
data: {factory: "data.py:labelled"}
passes:
  - {use: tidy.fold_batchnorm, id: fold}
  - use: train.fit
    id: learn
    steps: 2
    teacher: TEACHER
    losses: [{use: soft_labels}, {use: custom, factory: "loss.py:never"}]
"""
LABELLED = """
def labelled():
    return {"train": [((torch.ones(4, 3, 6, 6),), torch.zeros(4, dtype=torch.int64))]}
"""


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        ("{spec: teachers/one.yaml}", "teachers/one.yaml"),
        ("{run: old/run}", "old/run"),
        ("original", "elsewhere/original.yaml"),
        ("{step: fold}", "elsewhere/step-fold.yaml"),
    ],
)
def test_a_reproducer_finds_what_its_step_learned_from(tmp_path, teacher, named):
    (tmp_path / "teachers").mkdir()
    one = TAUGHT.partition("data:")[0].replace("model.py", "../model.py")
    (tmp_path / "teachers/one.yaml").write_text(one)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "data.py").write_text(DATA + LABELLED)
    (tmp_path / "loss.py").write_text("def never(outcome):\n    raise RuntimeError('no')\n")
    (tmp_path / "spec.yaml").write_text(TAUGHT.replace("TEACHER", teacher))
    spec = fxc.Spec.load(tmp_path / "spec.yaml")
    if "old" in named:
        fxc.compress(load_program(spec), spec.steps[:1], run_dir=tmp_path / "old/run")
    with pytest.raises(PassError, match="RuntimeError: no"):
        prepare(spec).run(tmp_path / "run")
    (tmp_path / "run/failure").rename(tmp_path / "elsewhere")
    assert (tmp_path / named).exists()
    assert named.removeprefix("elsewhere/") in (tmp_path / "elsewhere/spec.yaml").read_text()
    with pytest.raises(PassError, match="RuntimeError: no"):
        prepare(fxc.Spec.load(tmp_path / "elsewhere/spec.yaml")).run()
