"""`train.fit`: what it learns, changes, decides, replays and resumes."""

import pytest
import torch
from torch import nn

from fxcompress import compress
from fxcompress.errors import (
    UsageError,
)
from fxcompress.ir import Note, capture
from fxcompress.pipeline import Context, Lock
from fxcompress.testing import hash_inputs, hash_weights_
from fxcompress.train.metrics import BUILT_IN
from passes.train.fit import Fit
from tests.passes.models import ResNet, image_batches
from tests.passes.support import apply, seeded
from tests.passes.train.digits import Killed, digits, kill_at, run, small, step


def test_a_small_network_learns_the_digits_and_the_history_says_how():
    result = run({"epochs": 4, "shuffle": "samples", "scheduler": {"use": "CosineAnnealingLR"}})
    assert result.record.passes[0].metric > 0.95
    history = result.record.passes[0].decision["history"]
    assert [each["epoch"] for each in history] == [1, 2, 3, 4]
    assert [each["step"] for each in history] == [19, 38, 57, 76]
    assert {each["samples"] for each in history} == {1200}
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["metric"] == result.record.passes[0].metric
    assert history[-1]["lr"] < 1e-5 < history[0]["lr"]
    assert len(result.record.passes[0].measured["samples_per_second"]) == 4


def test_only_values_change_and_statistics_are_among_them():
    program = small()
    result = run({"steps": 3, "epochs": None}, program=program)
    assert result.record.passes[0].proof.grade == "structure"
    assert result.record.passes[0].counts == {"set-tensor": 16}
    assert result.program.text(state=False) == program.text(state=False)
    before, after = program.state(), result.program.state()
    assert int(after["bn1.num_batches_tracked"]) == int(before["bn1.num_batches_tracked"]) + 3
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert not result.module.training
    assert all(p.requires_grad and p.grad is None for p in result.module.parameters())


def test_what_is_not_selected_stays_bit_identical():
    program = small()
    result = run({"epochs": 1, "targets": ["fc.*", "bn2.weight"]}, program=program)
    changed = set(result.program.fingerprint().changed(program.fingerprint()))
    statistics = {"bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"}
    assert changed == {"fc.weight", "fc.bias", "bn2.weight", *statistics}


def test_frozen_batch_norms_keep_their_statistics():
    program = small()
    result = run({"epochs": 1, "batch_norm": "frozen"}, program=program)
    changed = result.program.fingerprint().changed(program.fingerprint())
    assert set(changed) == {name for name, _ in program.module.named_parameters()}


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, again, other = (run({"epochs": 1}, seed=seed) for seed in (0, 0, 1))
    assert first.program.fingerprint() == again.program.fingerprint()
    assert first.lock.passes == again.lock.passes
    assert first.program.fingerprint() != other.program.fingerprint()


def test_a_locked_run_replays_without_training(tmp_path):
    program = small()
    result = run(run_dir=tmp_path, program=program)
    events = []
    replayed = run(lock=Lock.load(tmp_path), program=program, on_event=events.append)
    assert replayed.program.fingerprint() == result.program.fingerprint()
    assert not [event for event in events if event.kind == "progress"]


@pytest.mark.parametrize("snapshot", [None, 5])
@pytest.mark.parametrize("at", [7, 19, 33])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path, at, snapshot):
    options = {
        "epochs": 2, "snapshot": snapshot, "keep": "best", "shuffle": "samples",
        "scheduler": {"use": "CosineAnnealingLR", "warmup": 4},
    }  # fmt: skip
    whole = run(options, run_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        run(options, run_dir=tmp_path / "killed", on_event=kill_at(at))
    kept = sorted((tmp_path / "killed/scratch").rglob("training.json"))
    assert len(kept) == (at > 5 if snapshot else at > 19)
    resumed = run(options, run_dir=tmp_path / "killed", resume=True)
    assert resumed.program.fingerprint() == whole.program.fingerprint()
    for name in ("fxcompress.lock.json", "fxcompress.lock.safetensors", "graph.fxg"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed/scratch").exists()


def test_parameters_are_chosen_by_op_and_class():
    def chosen(**options):
        context = Context(planning=True)
        return apply(Fit, small(), {"epochs": 1, **options}, context).decision.parameters

    norms = ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")
    assert chosen(types=["batch_norm"]) == norms
    assert chosen(types=["torch.nn.BatchNorm2d"]) == norms
    assert chosen(types=["Conv2d"], exclude=["*.bias"]) == ("conv1.weight", "conv2.weight")


def test_soft_labels_pull_the_model_back_to_the_original():
    """Other activations are made up for without labels, by following the original."""
    trained = run({"epochs": 3, "shuffle": "samples"}).program
    data = digits()
    data["train"] = [batch for batch, _ in data["train"]]
    soft = {
        "teacher": "original",
        "losses": [{"use": "soft_labels", "temperature": {"from": 4, "to": 1}}],
        "epochs": 3,
    }
    bent = {"use": "tidy.replace_activation", "replace": {"relu": "hardswish"}}
    result = compress(
        trained,
        [bent, step(**soft, optimizer={"use": "AdamW", "lr": 1e-3})],
        data=data,
        metric=BUILT_IN["cosine"],
    )
    history = result.record.passes[1].decision["history"]
    assert history[-1]["losses"].keys() == {"soft_labels"}
    assert result.record.passes[1].metric > result.record.passes[0].metric


def test_a_loss_of_ones_own_lies_beside_the_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses.py").write_text(
        "def gap(outcome, power):\n"
        "    return (outcome.output - outcome.teacher).abs().pow(power).mean()\n"
        "def wide(outcome):\n"
        "    return outcome.output\n"
    )
    own = {"use": "custom", "factory": "losses.py:gap", "args": {"power": 2}}
    losses = [own, {"use": "mse", "against": "teacher"}]
    result = run({"teacher": "original", "losses": losses, "epochs": 1})
    (epoch,) = result.record.passes[0].decision["history"]
    assert epoch["losses"]["gap"] == pytest.approx(epoch["losses"]["mse"])
    with pytest.raises(UsageError, match=r"returned \(64, 10\)"):
        run({"losses": [{"use": "custom", "factory": "losses.py:wide"}], "epochs": 1})
    with pytest.raises(UsageError, match="has no `gapp`"):
        run({"losses": [{**own, "factory": "losses.py:gapp"}], "epochs": 1})


def test_a_quantised_graph_trains_and_keeps_its_scales():
    data = digits()
    steps = [
        {"use": "tidy.fold_batchnorm"},
        {"use": "quantize.static", "calibration": 64},
        step(epochs=1, optimizer={"use": "SGD", "lr": 0.01}),
    ]
    result = compress(small(), steps, data=data, metric=BUILT_IN["accuracy"])
    *_, quantised, trained = result.record.passes
    assert trained.metric > quantised.metric
    names = {edit.name for edit in trained.edits}
    assert names == {f"{layer}.{part}" for layer in ("conv1", "conv2", "fc")
                     for part in ("weight", "bias")}  # fmt: skip


def test_what_capture_found_to_differ_in_training_is_said():
    program = small().with_notes(Note("train-differs", "bn1", "its statistics stay"))
    context = Context(data=digits())
    done = apply(Fit, program, {"steps": 1}, context)
    assert done.reasons() == {"bn1": "in training: its statistics stay"}


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids).cumsum(1))

    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
    program = capture(seeded(Tied), (ids,))
    context = Context(data={"train": [(ids,)] * 4})
    options = {"steps": 4, "losses": [{"use": "next_token"}]}
    done = apply(Fit, program, options, context)
    assert done.decision.parameters == ("embed.weight",)
    assert done.program.module.out.weight is done.program.module.embed.weight
    assert done.decision.history[-1].loss < done.decision.history[0].loss or (
        len(done.decision.history) == 1
    )


@pytest.mark.golden("passes/train/fit")
def test_golden(golden_graph):
    program = hash_weights_(capture(ResNet(width=4).eval(), image_batches(1, 2, 3, 8, 8)[0]))
    batches = [
        (tuple(hash_inputs(program, {"batch": 4}, seed=seed).values()), torch.arange(4) + seed)
        for seed in range(2)
    ]
    options = {"steps": 2, "optimizer": {"use": "SGD", "lr": 0.05}}
    golden_graph(apply(Fit, program, options, Context(data={"train": batches})).program)
