"""`train.fit` from a spec on the command line: plan, run, kill, resume, report."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxcompress.cli import main

DIGITS = Path(__file__).parents[3] / "specs/digits"
SPEC = """\
fxcompress: 1
name: heal
model: {factory: "model.py:resnet8", args: {width: 4}}
inputs: [{name: x, shape: [batch, 1, 8, 8]}]
data: {factory: "data.py:digits"}
metric: {use: accuracy, split: eval}
passes:
  - use: train.fit
    epochs: 4
    shuffle: samples
    optimizer: {use: SGD, lr: 0.1, momentum: 0.9, nesterov: true}
    scheduler: {use: CosineAnnealingLR, warmup: 10}
  - {use: quantize.static, id: int8, calibration: 128}
constraints: {metric: {min: 0.9}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("model.py", "data.py"):
        shutil.copy(DIGITS / name, tmp_path / name)
    (tmp_path / "spec.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    return tmp_path


def content(folder):
    """Return what must not differ between two runs: everything that holds no seconds."""
    timed = {"record.json", "manifest.json", "run.json", ".running"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed and path.suffix not in (".html", ".md")
        and path.name != "report.json"
    }  # fmt: skip


def started(folder):
    """Start a run in a process of its own."""
    command = [sys.executable, "-m", "fxcompress", "run", "spec.yaml", "-o", folder.name]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_in_training(folder):
    """Start a run, and kill it once a snapshot is there."""
    process = started(folder)
    try:
        for _ in range(30_000):
            if list((folder / "scratch").glob("01-fit/step-*")) or process.poll() is not None:
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_run_of_a_spec_ends_in_the_same_bytes(folder, capsys):
    pytest.importorskip("sklearn")
    assert main(["plan", "spec.yaml"]) == 0
    planned = capsys.readouterr().out
    assert "known after training (4 epochs on train)" in planned
    assert started(folder / "whole").wait(300) == 0
    text = (folder / "whole/report.md").read_text()
    assert "<summary>fit: 4 epochs</summary>" in text
    assert 'aria-label="loss of fit per epoch"' in (folder / "whole/report.html").read_text()

    killed_in_training(folder / "killed")
    assert json.loads((folder / "killed/run.json").read_text())["state"] == "running"
    assert list((folder / "killed/scratch/01-fit").glob("step-*"))
    assert main(["run", "spec.yaml", "-o", "killed", "--resume"]) == 0
    whole, resumed = content(folder / "whole"), content(folder / "killed")
    assert [name for name in whole | resumed if whole.get(name) != resumed.get(name)] == []


def test_a_spec_without_the_split_is_refused_before_anything_is_loaded(folder, capsys):
    text = SPEC.replace('data: {factory: "data.py:digits"}', "data: {eval: {random: 4}, "
                        "calibration: {random: 4}, tune: {random: 4}}")  # fmt: skip
    (folder / "spec.yaml").write_text(text)
    assert main(["check", "spec.yaml"]) == 2
    assert "`train.fit` needs a split `train`" in capsys.readouterr().out
    (folder / "spec.yaml").write_text(
        text.replace("    epochs: 4", "    epochs: 4\n    split: tune")
    )
    assert main(["check", "spec.yaml"]) == 0
