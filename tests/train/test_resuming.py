"""A killed training ends in the same bits; a snapshot that is not its own is refused."""

import pytest
import torch

from fxcompress.errors import DataError, RunFolderError
from fxcompress.train import fit
from fxcompress.train._optimizers import _classes, _schedulers
from tests.train.trainings import (
    Killed,
    batches,
    bits,
    config,
    killed_at,
    net,
    same,
    whole_and_resumed,
)

OPTIMIZERS = sorted(set(_classes(torch.optim, torch.optim.Optimizer)) - {"LBFGS", "SparseAdam"})


SCHEDULERS = {
    "ConstantLR": {}, "CosineAnnealingLR": {}, "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9}, "LinearLR": {"total_iters": "all"},
    "MultiStepLR": {"milestones": [3, 9]}, "OneCycleLR": {"max_lr": 0.01},
    "PolynomialLR": {"total_iters": "all"}, "ReduceLROnPlateau": {"patience": 0},
    "StepLR": {"step_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_resumes_to_the_same_bits(tmp_path, name):
    matrices = ["0.weight", "4.weight"] if name == "Muon" else None
    options = {"optimizer": {"use": name}, "snapshot": 4}
    assert same(*whole_and_resumed(tmp_path, options, at=10, names=matrices))


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("per", ["step", "epoch"])
def test_every_scheduler_resumes_to_the_same_bits(tmp_path, name, per):
    options = {
        "epochs": 3, "snapshot": 4, "optimizer": {"use": "SGD", "lr": 0.05, "momentum": 0.9},
        "scheduler": {"use": name, "per": per, **SCHEDULERS[name]},
    }  # fmt: skip
    assert same(*whole_and_resumed(tmp_path, options, at=14))


def test_every_scheduler_is_tried():
    assert set(SCHEDULERS) == set(_schedulers())


@pytest.mark.parametrize("shuffle", ["batches", "samples", "none"])
def test_every_order_resumes_to_the_same_bits(tmp_path, shuffle):
    options = {"shuffle": shuffle, "snapshot": 5, "scheduler": {"use": "StepLR", "step_size": 3,
               "warmup": 2}, "clip_norm": 0.5, "keep": "best"}  # fmt: skip
    assert same(*whole_and_resumed(tmp_path, options, at=9))


@pytest.mark.parametrize("options", [
    {"accumulate": 2, "snapshot": 1}, {"accumulate": 4, "shuffle": "samples"},
    {"ema": {"decay": 0.9}, "snapshot": 5, "keep": "best"}, {"ema": {"warmup": False}},
    {"precision": "bf16", "snapshot": 5}, {"precision": "fp16", "snapshot": 5},
    {"groups": [{"targets": ["0.*"], "scale": 0.1}], "snapshot": 5, "clip_value": 0.01},
    {"groups": [{"targets": ["1.*"], "freeze": True}], "scheduler": {"use": "StepLR",
     "step_size": 3}, "snapshot": 4}, {"patience": 1, "min_delta": 0.01, "epochs": 3},
])  # fmt: skip
def test_every_option_resumes_to_the_same_bits(tmp_path, options):
    at = 4 if "accumulate" in options else 10
    if options.get("precision") == "fp16":
        # So large that the first steps overflow: the scale is part of the state.
        options = {**options, "losses": [{"use": "hard_labels", "weight": 3e4}]}
    assert same(*whole_and_resumed(tmp_path, options, at=at))


def test_a_finished_training_is_not_done_again(tmp_path):
    first = net()
    expected = fit(first, config(), batches(), snapshots=tmp_path)
    again, told = net(), []
    found = fit(again, config(), batches(), snapshots=tmp_path, progress=lambda *a: told.append(a))
    assert not told
    assert found.history == expected.history
    assert same(bits(first), bits(again))


@pytest.mark.parametrize("at", range(0, 60, 4))
def test_a_training_killed_while_it_writes_a_snapshot_ends_in_the_same_bits(
    tmp_path, monkeypatch, at
):
    """Dies before the call numbered `at` of what touches the disk."""
    import os
    import shutil

    from fxcompress import _files
    from fxcompress.train import _snapshots

    whole = net()
    fit(whole, config(snapshot=3), batches())
    calls = iter(range(10_000))

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(_snapshots, "write_tensors", deadly(_snapshots.write_tensors))
        patch.setattr(_files, "sync_folder", deadly(_files.sync_folder))
        patch.setattr(os, "fsync", deadly(os.fsync))
        patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        try:
            fit(net(), config(snapshot=3), batches(), snapshots=tmp_path)
        except Killed:
            pass
        else:
            assert at >= next(calls) - 1, "every call before the last kills"
    resumed = net()
    fit(resumed, config(snapshot=3), batches(), snapshots=tmp_path)
    assert same(bits(whole), bits(resumed))


class Augmented:
    """A source that draws from torch's default generator, and cannot be indexed."""

    def __iter__(self):
        for (x,), y in batches():
            yield (x + torch.randn(x.shape),), y


def test_augmentation_and_dropout_do_not_disturb_each_other(tmp_path):
    seen = []

    def watch(dropout, **kwargs):
        seen.clear()
        model = net(dropout)
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        fit(model, config(snapshot=5), Augmented(), **kwargs)
        return list(seen)

    plain, dropping = watch(0.0), watch(0.5)
    assert len(plain) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain, dropping, strict=True))
    with pytest.raises(Killed):
        watch(0.5, snapshots=tmp_path, progress=killed_at(9))
    resumed = watch(0.5, snapshots=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(dropping[5:], resumed, strict=True))


def test_a_split_that_became_shorter_is_noticed(tmp_path):
    with pytest.raises(Killed):
        fit(net(), config(snapshot=5), batches(), snapshots=tmp_path, progress=killed_at(6))
    with pytest.raises(DataError, match="shorter than when the training began"):
        fit(net(), config(snapshot=5), batches(3), snapshots=tmp_path)


def test_a_snapshot_of_another_training_is_refused_with_the_difference(tmp_path):
    fit(net(), config(), batches(), snapshots=tmp_path)
    with pytest.raises(RunFolderError, match="of another training") as caught:
        fit(net(), config(clip_norm=2.0), batches(), snapshots=tmp_path)
    assert "clip_norm was None and is 2.0" in caught.value.reason
    changed = {"accumulate": 2, "precision": "bf16", "ema": {"decay": 0.5}, "min_delta": 0.5,
               "clip_value": 1.0, "groups": [{"targets": ["0.*"], "freeze": True}]}  # fmt: skip
    with pytest.raises(RunFolderError, match="of another training") as caught:
        fit(net(), config(**changed), batches(), snapshots=tmp_path)
    assert all(f"{name} was " in caught.value.reason for name in changed)
    other = net()
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(RunFolderError, match="start was"):
        fit(other, config(), batches(), snapshots=tmp_path)


def test_a_damaged_snapshot_is_refused(tmp_path):
    fit(net(), config(), batches(), snapshots=tmp_path)
    path = next(tmp_path.glob("step-*")) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(RunFolderError, match="damaged"):
        fit(net(), config(), batches(), snapshots=tmp_path)
