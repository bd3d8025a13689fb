"""Teachers from everywhere, joint training in passes, plans, resumption, and what is refused."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from fxcompress.api import compress
from fxcompress.errors import FxCompressError, ModelError, RunFolderError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline import Context
from fxcompress.rewrite import taps_of
from fxcompress.spec import Spec, load_program
from fxcompress.train import cache_outputs
from passes.train.fit import Fit
from tests.passes.support import apply, seeded
from tests.train.joint.models import Vision, tapped

FACTORY = """
import sys
import torch
from torch import nn
sys.path.insert(0, {root!r})
from tests.train.joint.models import Vision

def model(width=6):
    torch.manual_seed(1)
    return Vision(width=width).eval()

def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=g)
    return {{"train": [((a,), b) for a, b in zip(x.split(8), (torch.arange(24) % 3).split(8))]}}
"""


@cache
def student(width=4):
    return capture(seeded(lambda: Vision(width=width)), (torch.randn(2, 3, 8, 8),))


def train_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    labels = (torch.arange(24) % 3).split(8)
    return {"train": [((a,), b) for a, b in zip(x.split(8), labels, strict=True)]}


SOFT = [{"use": "soft_labels"}]
TAPS = {
    "use": "distill.tap",
    "taps": [{"name": "mid", "at": "first"}, {"name": "end", "at": "second"}],
}
FIT = {"steps": 4, "optimizer": {"use": "SGD", "lr": 0.05}}


def fitted(teacher="original", folder=Path(), program=None, given=None, planning=False, **options):
    """Train on the original's data; the teacher is what a spec would say."""
    context = Context(
        data=train_data(), folder=folder, original=student(), teacher=given, planning=planning
    )
    told = {**FIT, "losses": SOFT, "teacher": teacher, **options}
    return apply(Fit, program or student(), told, context)


def state_of(result):
    return {name: tensor.clone() for name, tensor in result.program.state().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def elsewhere(tmp_path):
    """Return a folder with a spec of a wider model, its run, and its outputs on the data."""
    root = str(Path(__file__).parents[3])
    (tmp_path / "factory.py").write_text(FACTORY.format(root=root))
    spec = {
        "fxcompress": 1,
        "model": {"factory": "factory.py:model"},
        "inputs": [{"name": "x", "shape": ["batch", 3, 8, 8]}],
        "data": {"factory": "factory.py:data"},
        "passes": [{"use": "tidy.fold_batchnorm"}],
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(spec))
    result = compress(
        _model_of(tmp_path), [{"use": "tidy.fold_batchnorm"}], run_dir=tmp_path / "run"
    )
    cache_outputs(result.program.module, train_data()["train"], tmp_path / "outputs")
    return tmp_path


def _model_of(folder):
    return load_program(Spec.load(folder / "teacher.yaml"))


def test_every_source_teaches_the_same(elsewhere):
    given = fitted("given", given=_model_of(elsewhere))
    by_spec = fitted({"spec": "teacher.yaml"}, elsewhere)
    assert same(state_of(given), state_of(by_spec))
    by_run = fitted({"run": "run"}, elsewhere)
    by_outputs = fitted({"outputs": "outputs"}, elsewhere)
    assert same(state_of(by_run), state_of(by_outputs))
    pairs = zip(state_of(by_spec).values(), state_of(by_run).values(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in pairs)
    assert not same(state_of(by_spec), state_of(fitted()))


def test_a_missing_or_damaged_teacher_is_one_error(elsewhere):
    def fails(teacher, error, match, reason=""):
        with pytest.raises(error, match=match) as caught:
            fitted(teacher, elsewhere)
        assert reason in str(caught.value)

    fails({"spec": "gone.yaml"}, ModelError, "spec gone.yaml is not there", "relative to the spec")
    fails({"run": "gone"}, ModelError, "run folder gone is not there")
    fails({"outputs": "gone"}, RunFolderError, "holds no outputs")
    fails({"run": "outputs"}, ModelError, "is no run folder")
    fails("given", UsageError, "there is no teacher", "compress")
    (elsewhere / "teacher.yaml").write_text("model: 5\n")
    fails({"spec": "teacher.yaml"}, ModelError, "teacher of teacher.yaml cannot be loaded")
    (checkpoint,) = (elsewhere / "run/checkpoints").glob("01-*")
    (checkpoint / "program.json").write_text("{}")
    fails({"run": "run"}, ModelError, "teacher of run cannot be loaded")
    shutil.rmtree(checkpoint.parent)


def test_a_teacher_of_another_kind_is_refused(tmp_path):
    wide = capture(seeded(lambda: Vision(classes=5)), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(UsageError, match="other numbers of classes"):
        fitted("given", given=wide)
    cache_outputs(wide.module, train_data()["train"], tmp_path / "outputs")
    with pytest.raises(UsageError, match="of another model"):
        fitted({"outputs": "outputs"}, tmp_path)
    large = capture(seeded(Vision), (torch.randn(2, 3, 12, 12),))
    with pytest.raises(UsageError, match="different inputs"):
        fitted("given", given=large)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher": {"spec": "a", "run": "b"}}, "either"),
        (
            {"teacher": {"outputs": "a"}, "losses": [{"use": "features"}]},
            "cached outputs have none",
        ),
        ({"teacher": "original", "losses": [{"use": "hard_labels"}]}, "no loss compares"),
        ({"losses": [{"use": "features"}]}, "compares with a teacher"),
        ({"projectors": [{"use": "cubic"}]}, "linear"),
    ],
    ids=str,
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Fit.Options.model_validate({"steps": 1, **options})


# -- joint training ------------------------------------------------------------------------------


LOSSES = [{"use": "hard_labels"}, {"use": "features"}, {"use": "crd", "taps": ["end"], "dim": 4}]


@cache
def wider():
    return capture(seeded(lambda: Vision(width=6), 1), (torch.randn(2, 3, 8, 8),))


def test_features_are_learned_through_projectors_that_are_dropped():
    program = tapped(student(), ("mid", "first"), ("end", "second"))
    result = fitted("given", program=program, given=wider(), losses=LOSSES)
    assert set(result.program.state()) == set(student().state())
    assert set(taps_of(result.program)) == {"mid", "end"}
    decision = result.decision
    assert [tap.fitting for tap in decision.taps] == ["1×1 conv 4 → 6", "1×1 conv 8 → 12"]
    assert decision.joint["projectors"] == 2
    terms = decision.history[-1].losses
    assert set(terms) == {"hard_labels", "features", "crd"}
    alone = fitted("given", program=program, given=wider(), losses=LOSSES[:1] + SOFT)
    assert not same(state_of(result), state_of(alone))


def test_a_plan_shows_taps_shapes_projectors_and_the_graph():
    program = tapped(student(), ("mid", "first"), ("end", "second"))
    options = {"losses": LOSSES, "projectors": [{"taps": ["mid"], "use": "mlp", "hidden": 3}]}
    result = fitted("given", program=program, given=wider(), planning=True, **options)
    lines = "\n".join(result.decision.summary())
    assert "tap mid: first f32[batch,4,8,8] through mlp 4 → 3 → 6 ~ first of the teacher" in lines
    assert "f32[batch,6,8,8]; read by features" in lines
    assert "one joint graph: nodes 9 of the student, 6 of the teacher, 4 of the projectors" in lines
    (ladder,) = result.decision.figures()
    assert [rung.left for rung in ladder.rungs] == ["first", "second", "output"]
    assert ladder.inputs == "x"


def test_a_function_of_ones_own_reads_taps(tmp_path):
    (tmp_path / "loss.py").write_text(
        "def gap(outcome):\n"
        "    return sum((outcome.taps[n] - outcome.teacher_taps[n]).square().mean()\n"
        "               for n in outcome.taps)\n"
    )
    program = tapped(student(), ("mid", "first"))
    losses = [{"use": "custom", "factory": "loss.py:gap"}]
    result = fitted("original", tmp_path, program=program, losses=losses)
    # The model is its own teacher: only what training changes (the norm's batches) differs.
    assert result.decision.history[0].loss < 0.5
    assert [tap.losses for tap in result.decision.taps] == [("gap",)]


def test_taps_that_a_loss_names_must_be_there():
    program = tapped(student(), ("mid", "first"))
    with pytest.raises(FxCompressError, match="gone"):
        fitted(program=program, losses=[{"use": "features", "taps": ["gone"]}])
    with pytest.raises(UsageError, match="reads taps"):
        fitted(losses=[{"use": "features"}])


class _Killed(Exception):
    pass


def test_a_killed_training_ends_in_the_same_bits(tmp_path):
    program = tapped(student(), ("mid", "first"), ("end", "second"))

    def run(folder, stop=None):
        def progress(text, done, total):
            if stop is not None and done == stop:
                raise _Killed

        context = Context(
            data=train_data(), teacher=wider(), scratch=folder, original=student(),
            on_progress=progress,
        )  # fmt: skip
        options = {**FIT, "steps": 8, "losses": LOSSES, "teacher": "given", "snapshot": 3,
                   "optimizer": {"use": "AdamW", "lr": 0.01}}  # fmt: skip
        return apply(Fit, program, options, context)

    whole = run(tmp_path / "whole")
    with pytest.raises(_Killed):
        run(tmp_path / "killed", stop=5)
    (snapshot,) = (tmp_path / "killed").glob("step-*")
    assert "projectors.mid" in (snapshot / "training.json").read_text()
    again = run(tmp_path / "killed")
    assert same(state_of(whole), state_of(again))
    assert whole.decision.history == again.decision.history


def test_a_training_does_not_resume_under_another_teacher(tmp_path):
    program = tapped(student(), ("mid", "first"), ("end", "second"))

    def run(teacher, stop):
        def progress(text, done, total):
            if done == stop:
                raise _Killed

        context = Context(
            data=train_data(), teacher=teacher, scratch=tmp_path, original=student(),
            on_progress=progress,
        )  # fmt: skip
        options = {**FIT, "losses": LOSSES, "teacher": "given", "snapshot": 2}
        return apply(Fit, program, options, context)

    with pytest.raises(_Killed):
        run(wider(), 3)
    other = capture(seeded(lambda: Vision(width=6), 2), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(RunFolderError, match="of another training") as caught:
        run(other, 9)
    assert "taught by" in caught.value.reason


def test_sparse_training_and_quantization_learn_features_too():
    qat = {
        "use": "quantize.qat",
        "calibration": 8,
        "weights": {"observer": "minmax"},
        "activations": {"observer": "minmax"},
    }
    learn = {**FIT, "teacher": "original", "losses": LOSSES[:2]}
    sparse = {"use": "prune.sparse_train", **learn}
    steps = [TAPS, sparse, qat, {"use": "train.fit", **learn}]
    data = {**train_data(), "calibration": [batch for batch, _ in train_data()["train"]]}
    result = compress(student(), steps, data=data)
    for record in result.record.passes[1::2]:
        assert any("tap mid" in line for line in record.summary)
        assert [type(figure).__name__ for figure in record.figures] == ["Ladder"]
    report = result.build_report()
    assert [figure.id for figure in report.figures] == ["sparse_train", "fit"]
