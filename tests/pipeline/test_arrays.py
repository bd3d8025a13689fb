"""Arrays of decisions: kept once on disk, and out of memory once they are there."""

import pytest
import torch
from safetensors import safe_open

from fxcompress.errors import PassError
from fxcompress.pipeline import Context, Lock, execute
from tests.pipeline import passes
from tests.pipeline.passes import step
from tests.rewrite import models


class Weights(passes.Noise):
    """Decide on the weights themselves, as training does."""

    preserves = "trained"

    def decide(self, program, options, context):
        value = program.state()[self.target] * 2
        return passes.Names(arrays={self.target: value, "extra": torch.ones(2)})

    def rewrite(self, rewriter, decision):
        rewriter.set_tensor(self.target, decision.arrays[self.target])


def keys(path):
    with safe_open(str(path), framework="pt") as file:
        return set(file.keys())


def run(folder, **kwargs):
    steps = [step(Weights), step(passes.HeadNoise)]
    return execute(models.convnet(), steps, Context(seed=1), folder, **kwargs)


def test_what_is_state_already_is_not_written_twice(tmp_path):
    done = run(tmp_path)
    folder = tmp_path / "checkpoints/01-weights"
    assert keys(folder / "state.safetensors") == {"conv1.weight"}
    assert keys(folder / "decision.safetensors") == {"extra"}
    expected = models.convnet().state()["conv1.weight"] * 2
    assert torch.equal(done.lock.arrays["weights/conv1.weight"], expected)
    assert torch.equal(Lock.load(tmp_path).arrays["weights/conv1.weight"], expected)


def test_a_resumed_run_and_a_replay_find_the_arrays(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(passes.HeadNoise, "rewrite", None)
        with pytest.raises(PassError):
            run(tmp_path / "run")
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.program.fingerprint() == whole.program.fingerprint()
    names = ("fxcompress.lock.json", "fxcompress.lock.safetensors")
    assert all((tmp_path / "run" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes()
               for n in names)  # fmt: skip
    replayed = run(None, lock=Lock.load(tmp_path / "run"))
    assert replayed.program.fingerprint() == whole.program.fingerprint()


def test_the_lock_holds_no_second_copy_in_memory(tmp_path):
    done = run(tmp_path)
    held = done.lock.arrays["weights/conv1.weight"]
    assert held.data_ptr() != done.program.state()["conv1.weight"].data_ptr()
    assert torch.equal(held, done.program.state()["conv1.weight"])
