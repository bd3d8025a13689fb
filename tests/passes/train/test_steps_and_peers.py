"""Teachers that are earlier steps, and teachers that learn along."""

from functools import cache

import pytest
import torch
import yaml

from fxcompress.api import compress, prepare
from fxcompress.errors import SpecError, UsageError
from fxcompress.ir import capture
from fxcompress.spec import Spec
from passes.train.fit import Fit
from tests.passes.support import seeded
from tests.train.joint.models import Vision

SOFT = [{"use": "hard_labels"}, {"use": "soft_labels"}]
FIT = {"use": "train.fit", "steps": 3, "losses": SOFT, "optimizer": {"use": "SGD", "lr": 0.05}}
HALF = {"use": "distill.student", "width": 0.5}


@cache
def program(width=8, seed=0):
    return capture(seeded(lambda: Vision(width=width), seed), (torch.randn(2, 3, 8, 8),))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    labels = (torch.arange(24) % 3).split(8)
    return {"train": [((a,), b) for a, b in zip(x.split(8), labels, strict=True)]}


def chain(last):
    return [
        {**HALF, "id": "medium"},
        {**FIT, "id": "assist", "teacher": "original"},
        {**HALF, "id": "small"},
        {**FIT, "id": "learn", "teacher": last},
    ]


def tensors(result):
    return result.program.state()


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@cache
def whole():
    return compress(program(), chain({"step": "assist"}), data=data())


def test_a_step_teaches_what_its_result_would():
    """The last two steps alone, with what the second left as the teacher."""
    medium = compress(program(), chain("original")[:2], data=data()).program
    given = compress(
        medium, [chain("")[2], {**FIT, "id": "learn", "teacher": "given"}],
        data=data(), teacher=medium,
    )  # fmt: skip
    assert same(tensors(whole()), tensors(given))


def test_a_resumed_run_finds_the_step_in_its_checkpoint(tmp_path):
    class Stopped(Exception):
        pass

    def stop(event):
        if event.kind == "start" and event.step == "learn":
            raise Stopped

    steps = chain({"step": "assist"})
    with pytest.raises(Stopped):
        compress(program(), steps, data=data(), run_dir=tmp_path / "run", on_event=stop)
    again = compress(program(), steps, data=data(), run_dir=tmp_path / "run", resume=True)
    assert same(tensors(whole()), tensors(again))


def test_a_plan_knows_the_step_and_only_an_earlier_one_is_taken():
    plan = prepare(chain({"step": "assist"}), program(), data=data()).plan()
    assert plan.steps[-1].pending
    with pytest.raises(UsageError, match="reads the result of the step learn, which is not before"):
        prepare(chain({"step": "learn"}), program(), data=data()).plan()
    with pytest.raises(UsageError, match="which is not before it") as caught:
        compress(program(), chain({"step": "gone"}), data=data())
    assert "medium, assist, small" in str(caught.value)


def test_taps_look_for_counterparts_in_the_result_of_a_step():
    tap = {"use": "distill.tap", "taps": [{"name": "mid", "at": "first"}],
           "teacher": {"step": "medium"}}  # fmt: skip
    learn = {**FIT, "teacher": {"step": "medium"}, "losses": [{"use": "features"}]}
    steps = [{**HALF, "id": "medium"}, {**HALF, "id": "small"}, tap, learn]
    plan = prepare(steps, program(), data=data()).plan()
    (line,) = (each for each in plan.steps[-1].summary if each.startswith("tap mid"))
    assert "first f32[batch,2,8,8] through 1×1 conv 2 → 4 ~ first" in line


@pytest.fixture
def peer(tmp_path):
    """Return a folder with the spec of a narrower model of another seed."""
    (tmp_path / "factory.py").write_text(
        "from tests.train.joint.models import Vision\n"
        "def model(width=4):\n    return Vision(width=width)\n"
    )
    spec = {
        "fxcompress": 1,
        "seed": 7,
        "model": {"factory": "factory.py:model"},
        "inputs": [{"name": "x", "shape": ["batch", 3, 8, 8]}],
    }
    (tmp_path / "peer.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


def along(folder, **options):
    steps = [{**FIT, "teacher": {"spec": str(folder / "peer.yaml"), "learns": True}, **options}]
    return prepare(steps, program(), data=data())


def test_a_peer_learns_along_and_is_dropped(peer):
    result = along(peer).run()
    assert set(tensors(result)) == set(program().state())
    losses = result.record.passes[0].decision["history"][0]["losses"]
    assert set(losses) == {"hard_labels", "soft_labels", "peer.hard_labels", "peer.soft_labels"}
    still = {**FIT, "teacher": {"spec": str(peer / "peer.yaml")}}
    taught = compress(program(), [still], data=data())
    assert not same(tensors(result), tensors(taught))
    assert "a peer of" in along(peer).plan().steps[0].pending[0]


def test_what_a_peer_cannot_do_is_refused(peer):
    taps = {"losses": [{"use": "features"}], "teacher": {"spec": "a", "learns": True}}
    with pytest.raises(ValueError, match="shows its outputs alone"):
        Fit.Options.model_validate({"steps": 1, **taps})
    with pytest.raises(ValueError, match="learns"):
        Fit.Options.model_validate({"steps": 1, "teacher": {"spec": "a", "learns": False}})
    (peer / "factory.py").write_text(
        "from tests.train.joint.models import Vision\n"
        "def model():\n    return Vision(width=4, classes=5)\n"
    )
    with pytest.raises(UsageError, match="other numbers of classes"):
        along(peer).run()


def test_a_spec_whose_step_is_not_there_is_refused_by_its_line(peer):
    document = (peer / "peer.yaml").read_text() + yaml.safe_dump({"passes": chain({"step": "no"})})
    (peer / "chain.yaml").write_text(document + "data: {train: {random: 8}}\n")
    with pytest.raises(SpecError, match="no step `no` before it"):
        Spec.load(peer / "chain.yaml")
