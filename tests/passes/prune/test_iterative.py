"""prune.iterative: schedules, rounds as steps of a run, locks, resuming, and stopping early."""

import itertools
import json

import pytest
import torch

from fxcompress.api import compress, prepare
from fxcompress.errors import PassError, SpecError, UsageError
from fxcompress.pipeline import render_plan
from fxcompress.train.metrics import Metric
from passes.prune.iterative import Iterative
from tests.passes.models import ResNet
from tests.passes.support import captured, random_input

MACS = 333_984
FIT = {"use": "train.fit", "epochs": 1, "optimizer": {"use": "SGD", "lr": 0.01}}


def program():
    return captured(ResNet, 2, 3, 16, 16)


def labelled(batches=2):
    generator = torch.Generator().manual_seed(0)
    return {
        "train": [
            (
                (torch.randn(8, 3, 16, 16, generator=generator),),
                torch.randint(10, (8,), generator=generator),
            )
            for _ in range(batches)
        ],
        "eval": [((random_input(4, 3, 16, 16),), torch.zeros(4, dtype=torch.long))],
    }


def size_of(model, batches):
    return float(sum(p.numel() for p in model.parameters()))


PARAMETERS = Metric("parameters", size_of)


def step(**options):
    return {"use": "prune.iterative", "id": "shrink", **options}


def run(*steps, **more):
    return compress(program(), list(steps), data=labelled(), **more)


def options(**values):
    return Iterative.Options.model_validate_json(json.dumps(values))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("cubic", [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]),
        ("exponential", [(1 - 0.5**part) / 0.5 for part in (0.25, 0.5, 0.75, 1.0)]),
    ],
)
def test_schedules(schedule, expected):
    chosen = options(ratio=0.5, steps=4, schedule=schedule)
    assert [chosen.reached(k) for k in range(1, 5)] == pytest.approx(expected)


def test_exponential_rounds_leave_the_same_part():
    chosen = options(budget={"macs": "20%"}, steps=5, schedule="exponential")
    left = [1 - 0.8 * chosen.reached(k) for k in range(6)]
    parts = [after / before for before, after in itertools.pairwise(left)]
    assert parts == pytest.approx([0.2**0.2] * 5)


def test_rounds_are_steps_that_come_ever_closer_to_the_budget(tmp_path):
    result = run(
        step(budget={"macs": "50%"}, steps=3, passes=[FIT]),
        {"use": "tidy.fold_batchnorm"},
        run_dir=tmp_path / "run",
    )
    names = [f"shrink.{k}.{each}" for k in (1, 2, 3) for each in ("prune", "fit")]
    assert [each.id for each in result.record.passes] == [*names, "fold_batchnorm"]
    for k in (1, 2, 3):
        bound = MACS * (1 - k / 6)
        assert 0.94 * bound <= result.record.passes[2 * k - 2].after.macs <= bound
    assert (tmp_path / "run" / "checkpoints" / "04-shrink.2.fit").is_dir()
    assert result.program(random_input(3, 3, 16, 16)).shape == (3, 10)


@pytest.mark.slow
def test_a_ratio_in_rounds_ends_where_one_step_does():
    rounds = run(step(ratio=0.5, steps=5))
    once = run({"use": "prune.channels", "ratio": 0.5})
    sizes = {name: tensor.shape for name, tensor in once.program.state().items()}
    assert {name: tensor.shape for name, tensor in rounds.program.state().items()} == sizes


def test_a_round_may_change_nothing():
    result = run(step(ratio=0.5, steps=8, prune={"round_to": 4}))
    assert any(not each.edits for each in result.record.passes)
    assert result.program.state()["layer2.0.conv2.weight"].shape == (8, 8, 3, 3)


def test_numbers_are_counted_from_the_start():
    rounds = run(step(ratio={"layer2.*": 0.5}, steps=3))
    state = rounds.program.state()
    assert state["layer2.0.conv2.weight"].shape == (8, 8, 3, 3)
    assert state["layer1.0.conv1.weight"].shape == (8, 8, 3, 3)


def test_the_plan_shows_every_round_and_one_column():
    job = prepare([step(budget={"macs": "50%"}, steps=3, passes=[FIT])], program(), data=labelled())
    plan = job.plan()
    assert [each.id for each in plan.steps][:2] == ["shrink.1.prune", "shrink.1.fit"]
    assert plan.result.macs <= MACS / 2
    head = next(line for line in render_plan(plan).plain.splitlines() if "change" in line.split())
    assert head.split() == ["now", "shrink", "change"]


def test_a_lock_replays_every_round():
    steps = step(budget={"macs": "60%"}, steps=2, passes=[FIT])
    first = run(steps)
    again = run(steps, lock=first.lock)
    assert again.program.fingerprint() == first.program.fingerprint()
    assert (
        first.program.fingerprint()
        != run(step(budget={"macs": "60%"}, steps=2)).program.fingerprint()
    )


def test_a_run_follows_its_plan():
    job = prepare([step(budget={"macs": "60%"}, steps=2, passes=[FIT])], program(), data=labelled())
    plan = job.plan()
    assert job.run(plan=plan).record.result.macs == plan.result.macs


class _Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def kill_at(name):
    def on_event(event):
        if event.kind == "start" and event.step == name:
            raise _Killed

    return on_event


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_round(tmp_path):
    steps = step(budget={"macs": "60%"}, steps=2, passes=[FIT])
    whole = run(steps)
    with pytest.raises(_Killed):
        run(steps, run_dir=tmp_path / "run", on_event=kill_at("shrink.2.fit"))
    events = []
    resumed = run(steps, run_dir=tmp_path / "run", resume=True, on_event=events.append)
    assert [e.step for e in events if e.kind == "resume"] == [
        "shrink.1.prune", "shrink.1.fit", "shrink.2.prune",
    ]  # fmt: skip
    assert resumed.program.fingerprint() == whole.program.fingerprint()


DROPPING = step(ratio=0.5, steps=5, metric_drop="40%")
FOLD = {"use": "tidy.fold_batchnorm"}


def test_a_round_that_drops_too_far_is_undone(tmp_path):
    result = run(DROPPING, FOLD, metric=PARAMETERS, run_dir=tmp_path / "run")
    kept = [each.id for each in result.record.passes]
    assert kept == ["shrink.1.prune", "shrink.2.prune", "fold_batchnorm"]
    assert list(result.record.stopped) == ["shrink.3.prune", "shrink.4.prune", "shrink.5.prune"]
    assert "which is more than 40%" in result.record.stopped["shrink.3.prune"]
    original = result.record.original_metric
    assert result.record.passes[1].metric >= 0.6 * original
    two = run(step(ratio=0.2, steps=2), FOLD)
    assert result.program.fingerprint() == two.program.fingerprint()
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["00-original", "01-shrink.1.prune", "02-shrink.2.prune", "03-fold_batchnorm"]


def test_a_run_that_stopped_early_replays_and_resumes(tmp_path):
    first = run(DROPPING, FOLD, metric=PARAMETERS)
    again = run(DROPPING, FOLD, metric=PARAMETERS, lock=first.lock)
    assert again.program.fingerprint() == first.program.fingerprint()
    assert again.record.course == first.record.course
    with pytest.raises(_Killed):
        run(DROPPING, FOLD, metric=PARAMETERS, run_dir=tmp_path, on_event=kill_at("fold_batchnorm"))
    resumed = run(DROPPING, FOLD, metric=PARAMETERS, run_dir=tmp_path, resume=True)
    assert resumed.program.fingerprint() == first.program.fingerprint()
    assert resumed.record.stopped == first.record.stopped


def test_a_run_killed_before_it_went_back_goes_back(tmp_path, monkeypatch):
    from fxcompress.pipeline._store import FolderStore

    def die(*_):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "undo", die)
        with pytest.raises(_Killed):
            run(DROPPING, FOLD, metric=PARAMETERS, run_dir=tmp_path)
    resumed = run(DROPPING, FOLD, metric=PARAMETERS, run_dir=tmp_path, resume=True)
    assert resumed.record.course == ("shrink.1.prune", "shrink.2.prune", "fold_batchnorm")
    whole = run(DROPPING, FOLD, metric=PARAMETERS)
    assert resumed.program.fingerprint() == whole.program.fingerprint()


def test_a_first_round_that_drops_too_far_is_an_error():
    with pytest.raises(PassError, match="the first round of shrink goes too far") as caught:
        run(step(ratio=0.5, steps=2, metric_drop="10%"), metric=PARAMETERS)
    assert "parameters went from 1.115e+04 to" in caught.value.reason


def test_a_drop_needs_a_metric():
    steps = step(ratio=0.5, steps=2, metric_drop="1%")
    with pytest.raises(UsageError, match="shrink stops by the metric, and there is none"):
        run(steps)
    with pytest.raises(UsageError, match="shrink stops by the metric"):
        prepare([steps], program()).plan()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of ratio and budget"),
        ({"ratio": 0.5, "budget": {"macs": "50%"}}, "exactly one of ratio and budget"),
        ({"budget": {"latency": "50%"}}, "latency budget cannot be split"),
        ({"ratio": 0.5, "passes": [{"use": "train.fitt"}]}, "unknown pass `train.fitt`"),
        ({"ratio": 0.5, "passes": [{"use": "train.fit", "epoch": 1}]}, "unknown key"),
        ({"ratio": 0.5, "passes": [{"use": "prune.iterative", "ratio": 0.1}]}, "cannot hold"),
        ({"ratio": 0.5, "passes": [{"use": "prune.n_m", "id": "prune"}]}, "the pruning itself"),
        ({"ratio": 0.5, "prune": {"ratio": 0.5}}, "unknown key"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(values, message):
    with pytest.raises(SpecError) as caught:
        prepare([step(**values)], program())
    assert message in str(caught.value)
