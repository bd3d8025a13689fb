"""Training between rounds of pruning, killed in the middle of one."""

import pytest
import torch

from fxcompress import compress
from fxcompress.train.metrics import BUILT_IN
from tests.passes.train.digits import Killed, digits, small, step


@pytest.mark.slow
def test_a_round_killed_in_its_training_ends_in_the_same_bits(tmp_path):
    data = digits()
    data["train"] = data["train"][:6]
    heal = step(epochs=2, snapshot=5)
    steps = [{"use": "prune.iterative", "ratio": 0.4, "steps": 2, "passes": [heal]}]

    def run(folder, **kwargs):
        metric = BUILT_IN["accuracy"]
        return compress(program, steps, data=data, metric=metric, run_dir=folder, **kwargs)

    def kill(event):
        if event.kind == "progress" and event.step == "iterative.2.fit" and event.done == 8:
            raise Killed

    program = small()
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", on_event=kill)
    assert list((tmp_path / "killed/scratch").rglob("step-00000005/training.json"))
    resumed = run(tmp_path / "killed", resume=True)
    assert resumed.lock.passes == whole.lock.passes
    left, right = whole.program.state(), resumed.program.state()
    assert all(torch.equal(left[name], right[name]) for name in left)
    (training,) = resumed.report.trainings
    assert [row.label for row in training.epochs] == ["1.1", "1.2", "2.1", "2.2"]
