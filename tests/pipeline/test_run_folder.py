import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxcompress.errors import FxCompressError, LockError, PassError, RunFolderError
from fxcompress.pipeline import Context, RunFolder, execute
from fxcompress.pipeline.checkpoints import Checkpoints
from tests.pipeline import killed_runs, passes
from tests.pipeline.passes import step
from tests.rewrite import models

STEPS = (step(passes.Noise), step(passes.HeadNoise), step(passes.Identity))


def run(folder, steps=STEPS, **kwargs):
    return execute(models.convnet(), steps, Context(seed=1), folder, **kwargs)


def test_a_checkpoint_holds_only_what_changed(tmp_path):
    from safetensors import safe_open

    done = run(tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    names = {}
    for path in sorted(folder.iterdir()):
        with safe_open(str(path / "state.safetensors"), framework="pt") as file:
            names[path.name] = set(file.keys())
    assert names["00-original"] == set(models.convnet().state())
    assert names["01-noise"] == {"conv1.weight"}
    assert names["02-headnoise"] == {"fc.weight"}
    assert names["03-identity"] == set()
    checkpoints = Checkpoints(folder)
    *_, last = checkpoints.completed([each.id for each in STEPS])
    loaded = checkpoints.load(last)
    assert loaded.fingerprint() == done.program.fingerprint()
    x = torch.randn(3, 3, 6, 6)
    assert torch.equal(loaded(x), done.program(x))


def test_a_finished_run_leaves_record_lock_and_text(tmp_path):
    done = run(tmp_path, documents={"spec.resolved.yaml": "fxcompress: 1\n"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["state"] == "done"
    assert [each["id"] for each in record["passes"]] == ["noise", "headnoise", "identity"]
    assert (tmp_path / "graph.fxg").read_text() == done.program.text()
    assert (tmp_path / "spec.resolved.yaml").read_text() == "fxcompress: 1\n"
    assert (tmp_path / "fxcompress.lock.safetensors").exists()


def in_a_process(folder, points, hash_seed):
    """Run `killed_runs` in a process of its own, whose sets have an order of their own."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.killed_runs", str(folder), str(points)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)},
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_runs_write_the_same_bytes_in_every_process(tmp_path):
    for seed in (1, 2):
        in_a_process(tmp_path / str(seed), 0, seed)
    first, second = (killed_runs.content(tmp_path / str(seed) / "whole") for seed in (1, 2))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_killed_runs_end_in_the_same_bytes(tmp_path):
    points = in_a_process(tmp_path, 6, 3)
    assert len(points) == 12
    assert [point for point in points if point[2]] == []


def test_resuming_a_finished_run_does_nothing_again(tmp_path):
    done = run(tmp_path)
    before = killed_runs.content(tmp_path)
    events = []
    again = run(tmp_path, resume=True, on_event=events.append)
    assert [event.kind for event in events] == ["resume"] * 3
    assert again.program.fingerprint() == done.program.fingerprint()
    assert again.record.passes == done.record.passes
    assert killed_runs.content(tmp_path) == before


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(RunFolderError, match="holds another run") as caught:
        run(tmp_path, STEPS[:2], resume=True)
    assert "the passes differs: noise, headnoise, identity there" in str(caught.value)


def test_a_folder_of_the_same_run_needs_resume_or_force(tmp_path):
    done = run(tmp_path)
    with pytest.raises(RunFolderError, match="--resume"):
        run(tmp_path)
    again = run(tmp_path, overwrite=True)
    assert again.program.fingerprint() == done.program.fingerprint()


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        run(tmp_path)
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_in_use_is_refused(tmp_path):
    with RunFolder(tmp_path), pytest.raises(RunFolderError, match=f"process {os.getpid()}"):
        run(tmp_path)


def test_an_open_folder_can_be_handed_in(tmp_path):
    with RunFolder(tmp_path) as folder:
        done = run(folder)
        assert done.folder == tmp_path
    assert folder.record().state == "done"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="cannot write"):
        run(tmp_path / "run")


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="cannot write run"):
        run(tmp_path / "run")


def test_a_damaged_record_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "run.json").write_text('{"format_version": "1.0"')
    with pytest.raises(RunFolderError, match="record cannot be read"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("file", ["state.safetensors", "program.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(tmp_path, file):
    run(tmp_path)
    path = tmp_path / "checkpoints/02-headnoise" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunFolderError, match="damaged"):
        run(tmp_path, resume=True)


def test_a_full_disk_keeps_the_last_good_state(tmp_path, monkeypatch):
    import fxcompress.pipeline.checkpoints as target

    write = target.write_tensors

    def full(path, tensors):
        if "02-headnoise" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(target, "write_tensors", full)
    with pytest.raises(RunFolderError, match="the disk is full"):
        run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "00-original",
        "01-noise",
    ]
    monkeypatch.undo()
    resumed = run(tmp_path, resume=True)
    assert resumed.program.fingerprint() == run(None).program.fingerprint()


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    def interrupt(self, rewriter, decision):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes.HeadNoise, "rewrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    events = []
    resumed = run(tmp_path, resume=True, on_event=events.append)
    assert events[0].kind == "resume"
    assert resumed.program.fingerprint() == run(None).program.fingerprint()


def test_a_failure_leaves_the_error_the_graph_and_a_spec_that_fails_again(tmp_path):
    from ruamel.yaml import YAML

    from fxcompress.ir import Program

    steps = [step(passes.Noise), step(passes.Broken, amount=0.25)]
    with pytest.raises(PassError, match="promise is broken") as caught:
        run(tmp_path, steps)
    failure = tmp_path / "failure"
    assert any(str(failure) in note for note in caught.value.__notes__)
    assert ">   %relu " in (failure / "error.txt").read_text()
    spec = YAML(typ="safe", pure=True).load(failure / "spec.yaml")
    assert spec["model"] == {"program": "program.fxp"}
    assert spec["passes"] == [{"use": "test.broken", "id": "broken", "amount": 0.25}]
    last_good = Program.load(failure / "program.fxp")
    noise = execute(models.convnet(), steps[:1], Context(seed=1))
    assert last_good.fingerprint() == noise.program.fingerprint()
    with pytest.raises(PassError, match="promise is broken"):
        execute(last_good, steps[1:], Context(seed=1))
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"


def test_a_failed_run_can_be_resumed_once_the_pass_is_mended(tmp_path, monkeypatch):
    steps = [step(passes.Noise), step(passes.Broken)]
    with pytest.raises(FxCompressError):
        run(tmp_path, steps)
    monkeypatch.delattr(passes.Broken, "ensures")
    done = run(tmp_path, steps, resume=True)
    assert done.record.state == "done"


def test_nothing_to_resume_is_said():
    with pytest.raises(RunFolderError, match="nothing to resume"):
        run(None, resume=True)


class Gate(torch.nn.Module):
    """A module of a user's class, which no file can hold."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.scale


class Gated(models.ConvNet):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return self.gate(super().forward(x))


def test_runs_with_opaque_modules_resume(tmp_path, monkeypatch):
    from fxcompress.ir import capture

    torch.manual_seed(0)
    model = Gated().eval()
    inputs = (torch.randn(2, 3, 6, 6),)

    def start(folder, **kwargs):
        program = capture(model, inputs, opaque=("gate",), name="gated")
        return execute(program, STEPS, Context(seed=1), folder, **kwargs)

    expected = start(None)
    with monkeypatch.context() as patch:
        patch.setattr(passes.Identity, "rewrite", None)
        with pytest.raises(PassError, match="identity failed"):
            start(tmp_path)
    resumed = start(tmp_path, resume=True)
    assert resumed.program.fingerprint() == expected.program.fingerprint()
    x = torch.randn(3, 3, 6, 6)
    assert torch.equal(resumed.program(x), expected.program(x))


def test_a_checkpoint_of_another_version_of_a_pass_is_not_continued(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(passes.HeadNoise, "version", 2)
    # The digest of steps composed in code holds versions; that of a spec does not.
    found = json.loads((tmp_path / "run.json").read_text())
    from fxcompress.pipeline._identity import digest_of_steps
    from fxcompress.pipeline.steps import Pipeline

    found["spec"] = digest_of_steps(Pipeline(STEPS))
    (tmp_path / "run.json").write_text(json.dumps(found))
    with pytest.raises(LockError, match="was made by version 1"):
        run(tmp_path, resume=True)


def test_a_lock_with_other_decisions_does_not_continue_a_run(tmp_path):
    done = run(tmp_path)
    (first, *rest) = done.lock.passes
    other = first.model_copy(update={"decision": {**first.decision, "peak": 1.0}})
    lock = done.lock.model_copy(update={"passes": (other, *rest)})
    with pytest.raises(LockError, match="another decision than the lock"):
        run(tmp_path, resume=True, lock=lock)


def test_other_software_does_not_continue_a_run(tmp_path):
    run(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    found["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(found))
    with pytest.raises(RunFolderError, match=r"software differs: .*torch='1\.0'"):
        run(tmp_path, resume=True)
