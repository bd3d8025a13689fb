"""The commands that run the compiler, on one small spec."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def done(call: Call, folder: Path) -> Path:
    said = call("run", "spec.yaml", "-o", "out")
    assert said.code == 0, said.err
    return folder / "out"


def test_plan(call: Call, folder: Path) -> None:
    said = call("plan", "spec.yaml", "-o", "plan.json")
    assert said.code == 0, said.err
    assert "1 fold" in said.out
    assert "- bn" in said.out
    assert "fxcompress run plan.json" in said.out
    assert not (folder / "runs").exists()
    document = call("plan", "spec.yaml", "--format", "json").document
    assert document["command"] == "plan"
    assert [step["id"] for step in document["steps"]] == ["fold"]
    meta = call("plan", "spec.yaml", "--meta")
    assert meta.code == 0, meta.err


def test_run_a_plan(call: Call, folder: Path) -> None:
    assert call("plan", "spec.yaml", "-o", "plan.json").code == 0
    assert call("run", "plan.json", "-o", "out").code == 0
    (folder / "model.py").write_text((folder / "model.py").read_text() + "\n# changed\n")
    said = call("run", "plan.json", "-o", "out2")
    assert said.code == 1
    assert "the plan does not match" in said.err


def test_run_writes_everything(call: Call, folder: Path) -> None:
    said = call("run", "spec.yaml", "--set", "emit=[{use: program, stem: net}]", "--format", "json")
    done = folder / "runs/small"
    names = {path.name for path in done.iterdir()}
    assert {
        "run.json", "spec.resolved.yaml", "fxcompress.lock.json", "checkpoints", "artifacts",
        "report.json", "report.html", "report.md", "graph.fxg",
    } <= names  # fmt: skip
    assert [path.name for path in (done / "artifacts").iterdir()] == ["net.fxp"]
    assert "net.fxp" in (done / "report.html").read_text()
    (artifact,) = said.document["artifacts"]
    assert (artifact["format"], artifact["paths"]) == ("program", ["runs/small/artifacts/net.fxp"])
    assert call("diff", "runs/small/artifacts/net.fxp", "runs/small").code == 0


def test_run_as_a_document(call: Call, folder: Path) -> None:
    said = call("run", "spec.yaml", "-o", "out", "--format", "json")
    document = said.document
    assert document["record"]["state"] == "done"
    assert document["constraints"] == [
        {
            "name": "parameters", "limit": "100%", "relation": "<=", "met": True,
            "bound": document["record"]["original"]["parameters"],
            "value": document["record"]["passes"][0]["after"]["parameters"],
        }
    ]  # fmt: skip
    assert document["artifacts"] == []
    assert "a factory that prints" in said.err


def test_a_run_is_not_repeated_unless_asked(call: Call, done: Path) -> None:
    again = call("run", "spec.yaml", "-o", "out")
    assert again.code == 1
    assert "--resume" in again.err
    assert call("run", "spec.yaml", "-o", "out", "--resume").code == 0
    assert call("run", "spec.yaml", "-o", "out", "--overwrite").code == 0
    other = call("run", "spec.yaml", "-o", "out", "--resume", "--set", "seed=4")
    assert other.code == 1
    assert "another run" in other.err


def test_a_foreign_folder_is_left_alone(call: Call, folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("x")
    said = call("run", "spec.yaml", "-o", "mine", "--overwrite")
    assert said.code == 1
    assert (folder / "mine/thesis.txt").read_text() == "x"


def test_a_missed_constraint_exits_4(call: Call, folder: Path) -> None:
    for command in (["plan"], ["run", "-o", "out"]):
        said = call(command[0], "spec.yaml", *command[1:], "--set", "constraints.size=10%")
        assert said.code == 4, said.err
    assert "NOT met" in said.out
    assert (folder / "out/report.html").exists()


def test_latency_is_measured_where_it_is_limited(call: Call, folder: Path) -> None:
    said = call(
        "run", "spec.yaml", "-o", "out", "--format", "json",
        "--set", "constraints={latency: 100s}",
    )  # fmt: skip
    (limit,) = said.document["constraints"]
    assert limit["met"] is True
    assert 0 < limit["value"] < 100


def test_locked(call: Call, folder: Path) -> None:
    missing = call("run", "spec.yaml", "-o", "out", "--locked")
    assert missing.code == 1
    assert "no lock file" in missing.err
    assert call("run", "spec.yaml", "-o", "out1", "--write-lock").code == 0
    assert (folder / "fxcompress.lock.json").exists()
    assert call("run", "spec.yaml", "-o", "out2", "--locked").code == 0
    assert call("run", "spec.yaml", "-o", "out3", "--lock", "out1").code == 0
    drift = call("run", "spec.yaml", "-o", "out4", "--locked", "--set", "seed=9")
    assert drift.code == 1
    assert "does not match" in drift.err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "model.py",
            "def net():\n    raise OSError('no disk')\n",
            "OSError: no disk, at model.py:2",
        ),
        ("model.py", "def net():\n    return 3\n", "returned a int"),
        ("data.py", "def splits():\n    return {'eval': []}\n", "empty"),
    ],
)
def test_what_the_user_wrote_fails(
    call: Call, folder: Path, file: str, text: str, message: str
) -> None:
    (folder / file).write_text(text)
    said = call("run", "spec.yaml", "-o", "out", "--format", "json")
    assert said.code == 1
    assert message in said.err
    assert "Traceback" not in said.err
    assert message in str(said.document["error"])


def test_explain(call: Call, done: Path) -> None:
    for source in ("spec.yaml", "out"):
        said = call("explain", source, "bn")
        assert said.code == 0, said.err
        assert "batch_norm" in said.out
        assert "used by /relu" in said.out
        assert "1 fold\n  - bn" in said.out
    document = call("explain", "spec.yaml", "conv", "--format", "json").document
    assert document["op"] == "conv2d"
    assert document["type"] == "f32[batch,4,2,2]"
    assert document["passes"][0]["changes"][0]["sign"] == "~"
    assert "leaves it as it is" in call("explain", "out", "fc").out
    wrong = call("explain", "spec.yaml", "con")
    assert wrong.code == 2
    assert "did you mean `conv`?" in wrong.err


def test_diff(call: Call, done: Path, folder: Path) -> None:
    assert call("diff", "out", "out/graph.fxg").code == 0
    assert call("run", "spec.yaml", "-o", "raw", "--set", "passes=[]").code == 0
    said = call("diff", "raw", "out")
    assert said.code == 3
    assert "structure" in said.out.lower()
    document = call("diff", "raw", "out", "--format", "json").document
    assert ("remove", "bn") in {(node["kind"], node["id"]) for node in document["nodes"]}
    (folder / "binary.fxg").write_bytes(b"\xff\xfe")
    assert call("diff", "binary.fxg", "out").code == 2


def test_golden(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    missing = call("golden", "spec.yaml")
    assert missing.code == 3
    assert (folder / "spec.fxg.new").exists()
    assert "--update" in missing.out
    written = call("golden", "spec.yaml", "--update")
    assert written.code == 1
    assert (folder / "spec.fxg").exists()
    assert call("golden", "spec.yaml").code == 0
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(text.replace("torch.relu", "torch.sigmoid"))
    changed = call("golden", "spec.yaml", "--format", "json")
    assert changed.code == 3
    assert changed.document["specs"][0]["state"] == "differs"
    monkeypatch.setenv("CI", "true")
    refused = call("golden", "spec.yaml", "--update")
    assert refused.code == 2
    assert "under CI" in refused.err


def test_report_and_bench(call: Call, done: Path) -> None:
    (done / "report.html").unlink()
    assert call("report", "out").out.splitlines()[1] == "out/report.html"
    assert (done / "report.html").exists()
    assert call("report", "out", "--markdown").out.startswith("#")
    document = call(
        "bench", "out", "--repeats", "2", "--spec", "spec.yaml", "--batch", "4", "--format", "json"
    ).document
    figures = document["figures"]
    assert figures["torch (ms)"]["original"] > 0
    assert figures["accuracy"]["original"] == figures["accuracy"]["result"]
    shutil.rmtree(done / "checkpoints")
    damaged = call("bench", "out")
    assert damaged.code == 1
    assert "Traceback" not in damaged.err


def test_ctrl_c_exits_130_and_can_be_resumed(call: Call, folder: Path) -> None:
    data = (folder / "data.py").read_text()
    marker = folder / "loading"
    pause = f"    import pathlib, time; pathlib.Path({str(marker)!r}).touch(); time.sleep(120)\n"
    (folder / "data.py").write_text(data.replace("def splits():\n", "def splits():\n" + pause))
    process = subprocess.Popen(
        [sys.executable, "-m", "fxcompress", "run", "spec.yaml", "-o", "out"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if marker.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    (folder / "data.py").write_text(data)
    assert call("run", "spec.yaml", "-o", "out", "--overwrite").code == 0
