"""`fxcompress run` in two processes: the same spec, the same result, one that writes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fxcompress.cli import main
from tests.train.processes import ROOT, finish, free_port, start

MODEL = """\
import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
DATA = """\
import os

import torch
from sklearn.datasets import load_digits


class Rows(list):
    given = 0

    def __getitem__(self, place):
        Rows.given += 1
        if Rows.given == 20 and os.environ.get("DIES") == os.environ.get("RANK", "none"):
            os._exit(9)
        return super().__getitem__(place)


def digits():
    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(raw.data, dtype=torch.float32)[order] / 16, torch.tensor(raw.target)[order]

    def cut(low, high):
        return [((a,), b) for a, b in zip(x[low:high].split(50), y[low:high].split(50))]

    return {"train": Rows(cut(0, 400)), "calibration": cut(0, 100), "eval": cut(1200, 1797)}
"""
SPEC = """\
fxcompress: 1
name: shared
model: {factory: "model.py:mlp"}
inputs: [{name: input, shape: [batch, 64]}]
data: {factory: "data.py:digits"}
metric: {use: accuracy, split: eval}
passes:
  - {use: prune.channels, ratio: 0.5}
  - {use: train.fit, epochs: 4, snapshot: 6, optimizer: {use: SGD, lr: 0.5, momentum: 0.9}}
  - {use: quantize.static, id: int8, calibration: 100}
"""


TAUGHT = """\
fxcompress: 1
name: taught
model: {factory: "model.py:mlp"}
inputs: [{name: input, shape: [batch, 64]}]
data: {factory: "data.py:digits"}
metric: {use: accuracy, split: eval}
passes:
  - {use: distill.tap, teacher: {spec: teacher.yaml}, taps: [{name: mid, at: "1", teacher: "1"}]}
  - use: prune.sparse_train
    epochs: 2
    ratio: 0.5
    teacher: {spec: teacher.yaml}
    losses: [{use: hard_labels}, {use: features}, {use: soft_labels}]
    optimizer: {use: SGD, lr: 0.1, momentum: 0.9}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for name, text in (("model.py", MODEL), ("data.py", DATA), ("spec.yaml", SPEC)):
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    assert main(["run", str(folder / "spec.yaml"), "-o", str(folder / "alone")]) == 0
    return folder / "alone"


def trained(folder):
    lock = json.loads((folder / "fxcompress.lock.json").read_text())
    arrays = load_file(folder / "fxcompress.lock.safetensors")
    (fit,) = (each for each in lock["passes"] if each["use"] == "train.fit")
    weights = {name: t for name, t in arrays.items() if name.startswith("fit")}
    assert weights
    return fit["decision"]["history"], weights


def alike(one, other):
    """Whether two runs trained to the same weights, but for rounding."""
    (expected, before), (found, after) = trained(one), trained(other)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, rtol=1e-3, atol=1e-4)


def run(folder, output, *arguments, **environment):
    told = ["-m", "fxcompress.cli", "run", folder / "spec.yaml", "-o", folder / output]
    return finish(start([*told, *arguments], **environment))


def launch(spec, output, *options):
    """Run a spec under `accelerate launch`, and return what it says."""
    told = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes=2",
            "--num_machines=1", "--num_cpu_threads_per_process=1", "--mixed_precision=no",
            "--dynamo_backend=no",
            f"--main_process_port={free_port()}", "-m", "fxcompress.cli", "run", "--format=json",
            spec, "-o", output]  # fmt: skip
    done = subprocess.run([str(each) for each in told], capture_output=True, text=True, cwd=ROOT,
                          timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launched(folder):
    """What a run under `accelerate launch` says; its folder is `launched`."""
    return launch(folder / "spec.yaml", folder / "launched", "--cpu")


def test_a_run_under_accelerate_ends_as_one_process_does(folder, alone, launched):
    assert len(launched["record"]["passes"]) == 3
    alike(alone, folder / "launched")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_it_can_be_resumed(folder, launched):
    first, second = run(folder, "killed", DIES="1")
    assert second[0] == 9
    assert first[0] == 1
    assert "error: process 0 of 2 lost the others" in first[2]
    assert "Traceback" not in first[2]
    resumed = run(folder, "killed", "--resume")
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    assert resumed[1][1:] == ("", ""), "only the first process speaks"
    alike(folder / "launched", folder / "killed")


@pytest.mark.slow
def test_taps_and_hooks_under_fsdp2_end_as_one_process_does(folder):
    """The teacher is wider, so that a projector learns along."""
    model = MODEL.replace("def mlp", "def wide").replace("seed(0)", "seed(1)").replace("32", "48")
    (folder / "model.py").write_text(MODEL + model)
    (folder / "teacher.yaml").write_text(
        SPEC.split("passes:")[0].replace("mlp", "wide") + "passes: []\n"
    )
    (folder / "taught.yaml").write_text(TAUGHT)
    spec, alone, spread = (folder / name for name in ("taught.yaml", "whole", "spread"))
    assert main(["run", str(spec), "-o", str(alone)]) == 0
    found = launch(spec, spread, "--use_fsdp", "--fsdp_version=2")
    assert len(found["record"]["passes"]) == 2
    before, after = (load_file(each / "fxcompress.lock.safetensors") for each in (alone, spread))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, atol=2e-6), name
