"""TensorBoard's files: what is in them, and what is said where they cannot be written."""

import sys

import pytest

from fxcompress import compress
from fxcompress.errors import MissingExtraError, UsageError
from fxcompress.ir import capture
from fxcompress.train import fit
from tests.train.trainings import Killed, batches, config, killed_at, net

pytest.importorskip("tensorboard")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_steps_terms_and_epochs_are_written_once_though_the_run_was_killed(tmp_path):
    losses = [{"use": "hard_labels"}, {"use": "soft_labels", "weight": 0.5}]
    told = config(tensorboard=True, snapshot=4, losses=losses)

    def run(progress=None):
        folders = {"snapshots": tmp_path / "kept", "curves": tmp_path / "curves"}
        return fit(net(), told, batches(), teacher=net().eval(), evaluate=lambda _: 0.5,
                   progress=progress, **folders)  # fmt: skip

    with pytest.raises(Killed):
        run(killed_at(10))
    done = run()
    found = scalars(tmp_path / "curves")
    assert sorted(found) == ["epoch/loss", "epoch/metric", "learning rate", "loss",
                             "terms/hard_labels", "terms/soft_labels"]  # fmt: skip
    assert [step for step, _ in found["loss"]] == list(range(1, 13))
    assert [step for step, _ in found["epoch/metric"]] == [6, 12]
    for (_, value), epoch in zip(found["epoch/loss"], done.history, strict=True):
        assert value == pytest.approx(epoch.loss, rel=1e-5)


def test_a_run_writes_them_into_its_folder(tmp_path):
    x, y = batches()[0]
    data = {"train": [(x, y)]}
    step = {"use": "train.fit", "id": "heal", "steps": 3, "tensorboard": True}
    program = capture(net().eval(), x)
    compress(program, [step], data=data, run_dir=tmp_path / "run")
    assert [step for step, _ in scalars(tmp_path / "run/tensorboard/01-heal")["loss"]] == [1, 2, 3]
    with pytest.raises(UsageError, match="no folder for TensorBoard's files"):
        compress(program, [step], data=data)


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    x, y = batches()[0]
    step = {"use": "train.fit", "steps": 3, "tensorboard": True}
    with pytest.raises(MissingExtraError, match="tensorboard is not installed") as caught:
        compress(capture(net().eval(), x), [step], data={"train": [(x, y)]})
    assert "fxcompress[train]" in caught.value.hint
