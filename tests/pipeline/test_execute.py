import pytest
import torch

from fxcompress.errors import DataError, LockError, ModelError, NumericsError, PassError, UsageError
from fxcompress.pipeline import Context, Pipeline, execute
from tests.pipeline import passes
from tests.pipeline.passes import step
from tests.rewrite import models


def context(**kwargs):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 6, 6, generator=generator),) for _ in range(4)]
    return Context(data={"calibration": batches}, seed=3, **kwargs)


def test_every_pass_is_recorded_with_its_proof():
    program = models.convnet()
    before = program.fingerprint()
    steps = [step(passes.Identity), step(passes.Noise), step(passes.Calibrate), step(passes.Train)]
    done = execute(program, steps, context())
    assert program.fingerprint() == before
    assert done.record.state == "done"
    assert [p.proof.grade for p in done.record.passes] == [
        "equal", "measured", "measured", "structure",
    ]  # fmt: skip
    identity, noise, calibrate, train = done.record.passes
    assert identity.counts == {"add-node": 1, "change-node": 2}
    assert identity.proof.error == 0.0
    assert identity.proof.probes == 3
    assert identity.after.nodes == identity.before.nodes + 1
    assert noise.counts == {"set-tensor": 1}
    assert 0 < noise.to_previous.relative < 0.2
    assert calibrate.to_original.max_abs > 0
    assert calibrate.decision["peak"] > 1
    assert train.before == calibrate.after
    assert all(p.seconds > 0 for p in done.record.passes)


def test_seeds_make_runs_repeatable_whatever_came_before():
    program = models.convnet()
    first = execute(program, [step(passes.Noise)], context())
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    second = execute(program, [step(passes.Noise)], context())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.program.fingerprint() == second.program.fingerprint()
    other = execute(program, [step(passes.Noise)], Context(seed=4))
    assert other.program.fingerprint() != first.program.fingerprint()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (passes.LyingExact, PassError, "promises to be exact"),
        (passes.InPlace, PassError, "conv2.weight"),
        (passes.NotANumber, NumericsError, "conv1.weight holds 1 values"),
        (passes.Overflow, NumericsError, "the output of bn2"),
        (passes.Nothing, PassError, "its output is too narrow"),
        (passes.Crash, PassError, "ZeroDivisionError: by accident"),
        (passes.Broken, PassError, "the promise is broken"),
        (passes.TrainMore, PassError, "only trains"),
        (passes.WrongDecision, PassError, "not Names"),
    ],
)
def test_bad_passes_are_caught_by_name(bad, error, message):
    with pytest.raises(error) as caught:
        execute(models.convnet(), [step(bad, where="spec.yaml:7")], context())
    assert message in str(caught.value)
    assert any("spec.yaml:7" in note for note in caught.value.__notes__)


def test_a_bad_pass_does_not_harm_the_original():
    program = models.convnet()
    x = torch.randn(2, 3, 6, 6)
    expected = program(x)
    with pytest.raises(PassError):
        execute(program, [step(passes.Noise), step(passes.Crash)], context())
    assert torch.equal(program(x), expected)


def test_weights_without_values_cannot_run():
    with torch.device("meta"):
        model = models.ConvNet().eval()
    from fxcompress.ir import capture

    program = capture(model, (torch.randn(2, 3, 6, 6),), name="meta")
    with pytest.raises(ModelError, match="no values"):
        execute(program, [step(passes.Identity)], context())


def test_a_nan_in_the_original_is_found_before_any_pass():
    model = models.ConvNet().eval()
    model.fc.bias.data[2] = float("nan")
    from fxcompress.ir import capture

    program = capture(model, (torch.randn(2, 3, 6, 6),), verify=False)
    with pytest.raises(NumericsError, match=r"fc\.bias holds 1"):
        execute(program, [step(passes.Identity)], context())


def test_too_little_data_is_said():
    short = Context(data={"calibration": [(torch.randn(2, 3, 6, 6),)]})
    with pytest.raises(DataError, match="2 samples, and 6 are asked for"):
        execute(models.convnet(), [step(passes.Calibrate)], short)
    with pytest.raises(DataError, match="no split calibration"):
        execute(models.convnet(), [step(passes.Calibrate)], Context())
    with pytest.raises(DataError, match="empty"):
        execute(models.convnet(), [step(passes.Calibrate)], Context(data={"calibration": []}))


def test_ids_are_unique_and_name_folders():
    with pytest.raises(UsageError, match="two passes"):
        Pipeline((step(passes.Identity), step(passes.Identity)))
    with pytest.raises(UsageError, match="cannot be the id"):
        Pipeline((step(passes.Identity, "../x"),))


def test_events_frame_every_step():
    events = []
    execute(
        models.convnet(),
        [step(passes.Calibrate), step(passes.Train)],
        context(),
        on_event=events.append,
    )
    kinds = [(event.kind, event.step) for event in events if event.kind != "progress"]
    assert kinds == [
        ("start", "calibrate"), ("end", "calibrate"), ("start", "train"), ("end", "train"),
    ]  # fmt: skip
    progress = [event for event in events if event.kind == "progress"]
    assert [event.done for event in progress] == [2, 4, 6]
    assert {event.total for event in progress} == {6}


class TestLock:
    steps = (step(passes.Noise), step(passes.Calibrate))

    def test_replays_without_data_to_the_same_weights(self, tmp_path):
        program = models.convnet()
        done = execute(program, self.steps, context())
        done.lock.save(tmp_path)
        from fxcompress.pipeline import Lock

        lock = Lock.load(tmp_path)
        replayed = execute(program, self.steps, Context(seed=3), lock=lock)
        assert replayed.program.fingerprint() == done.program.fingerprint()
        replayed.lock.save(tmp_path / "..")
        first = (tmp_path / "fxcompress.lock.json").read_bytes()
        assert (tmp_path / "../fxcompress.lock.json").read_bytes() == first

    def test_names_every_drift(self):
        done = execute(models.convnet(), self.steps, context())
        other = context()
        other.seed = 5
        other.data["calibration"][0][0].mul_(2)
        changed = (step(passes.Noise, amount=0.5), step(passes.Calibrate))
        with pytest.raises(LockError) as caught:
            execute(models.convnet(), changed, other, lock=done.lock)
        message = str(caught.value)
        for drift in ("spec changed", "seed changed", "split calibration", "options of pass noise"):
            assert drift in message

    def test_refuses_another_model(self):
        done = execute(models.convnet(), self.steps, context())
        program = models.convnet()
        with torch.no_grad():
            program.state()["fc.bias"].add_(1)
        with pytest.raises(LockError, match="the model changed"):
            execute(program, self.steps, context(), lock=done.lock)

    def test_refuses_another_version_of_a_pass(self, monkeypatch):
        done = execute(models.convnet(), self.steps, context())
        monkeypatch.setattr(passes.Noise, "version", 2)
        with pytest.raises(LockError, match="has version 2, and 1 is locked"):
            execute(models.convnet(), self.steps, context(), lock=done.lock)

    def test_a_missing_or_damaged_lock_is_explained(self, tmp_path):
        from fxcompress.pipeline import Lock

        with pytest.raises(LockError, match="no lock file"):
            Lock.load(tmp_path)
        (tmp_path / "fxcompress.lock.json").write_text("{")
        with pytest.raises(LockError, match="cannot be read"):
            Lock.load(tmp_path)


def test_data_that_changes_between_reads_is_refused():
    unstable = Context(data={"calibration": [(torch.zeros(6, 3, 6, 6),)]})
    list(unstable.samples("calibration", 6))
    unstable.data["calibration"][0][0].add_(1)
    with pytest.raises(DataError, match="another batch 0"):
        list(unstable.samples("calibration", 6))


def test_a_lock_holds_the_batches_that_were_read_and_no_more():
    from fxcompress.pipeline.lock import Lock, data_locks, data_now

    data = {"eval": [(torch.full((2, 3), float(i)),) for i in range(4)]}
    reader = Context(data=data)
    assert len(list(reader.batches("eval", 2))) == 2
    assert list(reader.batches("eval", 0)) == []
    locked = data_locks(reader.read)
    assert locked["eval"].batches == 2
    lock = Lock.model_construct(data=locked)
    assert data_now(lock, Context(data=data)) == locked


def test_batches_come_without_labels_and_cut_to_size():
    x, y = torch.arange(8.0).reshape(4, 2), torch.arange(4)
    data = {"eval": [((x,), y), ({"x": x}, y), (x, x)]}
    reader = Context(data=data)
    first, second, third = reader.batches("eval")
    assert torch.equal(first[0], x)
    assert torch.equal(second["x"], x)
    assert len(third) == 2
    (whole, cut) = reader.samples("eval", 6)
    assert cut["x"].shape == (2, 2)
    assert whole[0].shape == (4, 2)
    assert [target is None for _, target in reader.labelled("eval")] == [False, False, True]
    with pytest.raises(DataError, match="3 batches, and 5"):
        list(reader.batches("eval", 5))


def test_approximate_passes_are_measured_on_data_where_there_is_any():
    program = models.convnet()
    steps = [step(passes.Noise)]
    on_data = execute(program, steps, context()).record.passes[0]
    on_random = execute(program, steps, Context(seed=3)).record.passes[0]
    assert (on_data.proof.on, on_data.proof.probes) == ("data", 3)
    assert (on_random.proof.on, on_random.proof.probes) == ("random inputs", 2)
    assert on_data.to_original != on_random.to_original
    (batch,) = context().data["calibration"][:1]
    done = execute(program, steps, context())
    with torch.no_grad():
        difference = (done.program(*batch) - program(*batch)).abs().max()
    assert on_data.to_original.max_abs == pytest.approx(float(difference), rel=1e-4)


def test_data_of_other_sizes_than_captured_is_cut_or_left_out():
    from fxcompress.ir import capture

    model = models.ConvNet().eval()
    fixed = capture(model, (torch.randn(1, 3, 6, 6),), dynamic={})
    cut = execute(fixed, [step(passes.Noise)], context()).record.passes[0]
    assert cut.proof.on == "data"
    wide = Context(data={"eval": [(torch.randn(1, 3, 9, 9),)]})
    left_out = execute(fixed, [step(passes.Noise)], wide).record.passes[0]
    assert left_out.proof.on == "random inputs"
